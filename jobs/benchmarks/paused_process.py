"""A process that can be paused, so that the benchmark can measure something else between two measurements of it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Self

import psutil

from vlsm.errors import ResultError

_ROOT = Path(__file__).parents[2]
_LONGEST_S = 300.0  # time limit for the next file
# its Ray is its own, so that all processes are its children; Ray's workers have the priority of all others
_OWN = {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}


class Held:
    """A program that writes one file per fixed number of images, and can be paused between measurements.

    Its archive is so large that it never finishes. Measurements begin after its third file, when all of its processes
    exist.

    Args:
        module: module that `python -m` runs.
        arguments: arguments of the module.
        outputs: folder of its output files.
        images_per_file: number of images per output file; may be a fraction.
        environment: variables in addition to those of this process.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        outputs: Path,
        images_per_file: float,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._outputs, self._images_per_file = outputs, images_per_file
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            env=os.environ | _OWN | (environment or {}),
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> Self:
        self._wait_for_files(3)
        self._hold()
        return self

    def __exit__(self, *error: object) -> None:
        self._release()
        children = [process for process, _ in self._processes()]
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()

    def measure(self, seconds: float) -> tuple[float, dict[str, float]]:
        """Resume the program for `seconds` and until its next file, then pause it.

        Returns:
            Images per second between the first and the last file of this time, and the CPU seconds per image by kind of
            process: "driver", and of Ray "model" (actors), "tasks" (other workers) and "ray" (daemons).
        """
        self._release()
        first, start_s = self._wait_for_files(1)  # the file that was in progress
        before = self._core_seconds()
        time.sleep(seconds)
        last, end_s = self._wait_for_files(1)
        after = self._core_seconds()
        self._hold()
        num_images = (last - first) * self._images_per_file
        return num_images / (end_s - start_s), {kind: (after[kind] - before[kind]) / num_images for kind in after}

    def _wait_for_files(self, count: int) -> tuple[int, float]:
        """Wait until there are `count` more files; return the number of files, and the time of the last one."""
        wanted, deadline_s = len(self._files()) + count, time.monotonic() + _LONGEST_S
        while len(files := self._files()) < wanted:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._log.seek(0)
                log = self._log.read()[-1500:]
                raise ResultError(f"a measured process ended, or wrote no file in {_LONGEST_S:.0f} s: {log}")
            time.sleep(0.01)
        return len(files), max(file.stat().st_mtime for file in files)

    def _files(self) -> list[Path]:
        return list(self._outputs.glob("[!.]*.*"))

    def _hold(self) -> None:
        """Suspend all of its processes, except for the daemons of Ray, which are idle then."""
        for process, kind in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if kind != "ray":
                    process.suspend()

    def _release(self) -> None:
        for process, _ in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[tuple[psutil.Process, str]]:
        if self._process.poll() is not None:
            return []
        driver = psutil.Process(self._process.pid)
        kinds = [(driver, "driver")]
        for child in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # short-lived processes may end meanwhile
                kinds.append((child, _kind(child)))
        return kinds

    def _core_seconds(self) -> Counter[str]:
        seconds = Counter[str]()
        for process, kind in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds[kind] += times.user + times.system
        return seconds


def _kind(process: psutil.Process) -> str:
    """Return the kind of a child process of the driver: model, tasks, ray, or driver."""
    title = " ".join(process.cmdline())
    if title.startswith("ray::"):
        return "model" if "Actor" in title else "tasks"
    return "driver" if "jobs." in title else "ray"  # "driver": a fork of the driver


def hold_job(
    arguments: list[str],
    checkpoint: Path,
    output: Path,
    images_per_part: int,
    read_ahead_bytes: int = 100 << 20,
    num_prompts: int = 1,
) -> Held:
    """Start the segment job as a user does, but with a small object store of Ray.

    The small store fills after some parts. From then on the job reads images exactly as fast as the models use them.
    """
    words = [
        *arguments,
        str(output),
        "--checkpoint",
        str(checkpoint),
        "--set",
        f"shard_rows={images_per_part * num_prompts}",
    ]
    weights_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    # the store also holds the weights, and Ray Data uses at most half of it; a smaller store spills to disk
    store_bytes = 2 * (weights_bytes + read_ahead_bytes)
    environment = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(store_bytes)}
    return Held("jobs.segment", words, output / "masks", images_per_part, environment)
