"""A process that can be held still, so that something else is measured between two looks at its steady state."""

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
_LONGEST_S = 300.0  # until the next file
_EVEN = {"RAY_worker_niceness": "0"}  # else whatever stirs on the machine slows what runs on Ray and nothing else


class Held:
    """A program that writes a file for each or some images, over an archive that it does not get to the end of.

    It is looked at from its third file on, when all of its processes are there.

    Args:
        module: `python -m` this.
        arguments: of it.
        outputs: the folder into which it writes.
        images_per_file: how many images a file stands for.
        environment: of it, beside this process's own.
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
            env=os.environ | _EVEN | (environment or {}),
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
        """Let it go on for so many seconds and until the next file.

        Returns:
            Images per second between the first and the last file that it wrote meanwhile, and the core seconds that an
            image took, by kind of process: "driver", and Ray's "model" actors, other "tasks" and daemons ("ray").
        """
        self._release()
        first, start_s = self._wait_for_files(1)  # which was under way
        before = self._core_seconds()
        time.sleep(seconds)
        last, end_s = self._wait_for_files(1)
        after = self._core_seconds()
        self._hold()
        num_images = (last - first) * self._images_per_file
        return num_images / (end_s - start_s), {kind: (after[kind] - before[kind]) / num_images for kind in after}

    def _wait_for_files(self, count: int) -> tuple[int, float]:
        """Until there are so many more; how many there are then, and when the last one was written."""
        wanted, deadline_s = len(self._files()) + count, time.monotonic() + _LONGEST_S
        while len(files := self._files()) < wanted:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._log.seek(0)
                raise ResultError(f"a measured process ended or stood still: {self._log.read()[-1500:]}")
            time.sleep(0.01)
        return len(files), max(file.stat().st_mtime for file in files)

    def _files(self) -> list[Path]:
        return list(self._outputs.glob("[!.]*.*"))

    def _hold(self) -> None:
        """Nothing of it goes on, but for Ray's daemons, which have nothing to do then."""
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
        found = [(driver, "driver")]
        for child in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # some come and go
                found.append((child, _kind(child)))
        return found

    def _core_seconds(self) -> Counter[str]:
        seconds = Counter[str]()
        for process, kind in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds[kind] += times.user + times.system
        return seconds


def _kind(process: psutil.Process) -> str:
    """Of a child of the driver."""
    title = " ".join(process.cmdline())
    if title.startswith("ray::"):
        return "model" if "Actor" in title else "tasks"
    return "driver" if "jobs." in title else "ray"  # a process that the driver has forked


def hold_job(
    arguments: list[str],
    checkpoint: Path,
    output: Path,
    images_per_part: int,
    read_ahead_bytes: int = 100 << 20,
    num_prompts: int = 1,
) -> Held:
    """The segment job as a user starts it, but for the size of Ray's object store.

    What is read ahead of the models is then as much after some parts as it will be at any time: as much is read as is
    used.
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
    # the weights lie there as well, and Ray Data fills half of the store: with less of it all is spilled to disk
    store_bytes = 2 * (weights_bytes + read_ahead_bytes)
    environment = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(store_bytes)}
    return Held("jobs.segment", words, output / "masks", images_per_part, environment)
