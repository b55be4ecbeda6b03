"""A segment job that can be held still, so that something else is measured between two looks at its steady state."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Self

import psutil

from vlsm.errors import ResultError

_ROOT = Path(__file__).parents[2]
_LONGEST_S = 300.0  # until the next part
_OBJECT_STORE_BYTES = 100 << 20


class HeldJob:
    """The job as a user starts it, over an archive that it does not get to the end of.

    Its steady state is looked at from the third part on: all processes are there then, and what is read ahead of the
    models is as much as it will be at any time, since Ray's object store is small. So as much is read as is used.

    Args:
        arguments: of `jobs.segment`.
        output: its OUTPUT, on a local disk.
        shard_rows: images of a part.
    """

    def __init__(self, arguments: list[str], output: Path, shard_rows: int) -> None:
        self._shard_rows, self._masks, self._log = shard_rows, output / "masks", output.with_suffix(".log")
        environment = os.environ | {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(_OBJECT_STORE_BYTES)}
        command = [sys.executable, "-m", "jobs.segment", *arguments, "--set", f"shard_rows={shard_rows}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log)

    def __enter__(self) -> Self:
        self._wait_for_parts(3)
        self._hold()
        return self

    def __exit__(self, *error: object) -> None:
        self._release()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(_LONGEST_S)

    def measure(self, seconds: float) -> tuple[float, dict[str, float]]:
        """Let it go on for so many seconds or until the next part.

        Returns:
            Images per second between the first and the last part that it wrote meanwhile, and the core seconds that an
            image took, by kind of process: "model", "tasks", "driver" and "ray".
        """
        self._release()
        first, start_s = self._wait_for_parts(1)  # which was under way
        before = self._core_seconds()
        time.sleep(seconds)
        last, end_s = self._wait_for_parts(1)
        after = self._core_seconds()
        self._hold()
        num_images = (last - first) * self._shard_rows
        return num_images / (end_s - start_s), {kind: (after[kind] - before[kind]) / num_images for kind in after}

    def _wait_for_parts(self, count: int) -> tuple[int, float]:
        """Until there are so many more; how many there are then, and when the last one was written."""
        wanted, deadline_s = len(self._parts()) + count, time.monotonic() + _LONGEST_S
        while len(parts := self._parts()) < wanted:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ResultError(f"the job ended or stood still: {self._log.read_text()[-1500:]}")
            time.sleep(0.01)
        return len(parts), max(part.stat().st_mtime for part in parts)

    def _parts(self) -> list[Path]:
        return list(self._masks.glob("part-*"))

    def _hold(self) -> None:
        """Nothing of it goes on, but for Ray's daemons, which have nothing to do then."""
        for process, kind in self._processes():
            if kind != "ray":
                process.suspend()

    def _release(self) -> None:
        for process, kind in self._processes():
            if kind != "ray":
                process.resume()

    def _processes(self) -> list[tuple[psutil.Process, str]]:
        driver = psutil.Process(self._process.pid)
        return [(driver, "driver"), *((child, _kind(child)) for child in driver.children(recursive=True))]

    def _core_seconds(self) -> Counter[str]:
        seconds = Counter[str]()
        for process, kind in self._processes():
            times = process.cpu_times()
            seconds[kind] += times.user + times.system
        return seconds


def _kind(process: psutil.Process) -> str:
    """Of a child of the driver."""
    title = " ".join(process.cmdline()[:1])
    if not title.startswith("ray::"):
        return "ray"
    return "model" if "SegmentActor" in title else "tasks"
