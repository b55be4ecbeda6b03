"""Busy loops beside a measurement. Each one occupies a core, as another program on the same machine would."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# it ends by itself if the benchmark is killed: then its parent is another process
_LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
_POLL_S = 0.05

Turn = dict[str, float]


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[list[int]]:
    """Return a context in which `count` busy loops run with the niceness of this process; it gives their process ids.

    A kill of this process ends them too.
    """
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        yield [loop.pid for loop in loops]
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


class Levels(threading.Thread):
    """A thread that sets the load of a run, level by level, while the run writes its turns to a file.

    The first turn warms up, without a load. Then `repeats` turns run at each level.

    Args:
        path: JSON file of the run, a list with one dict per turn; `is_complete` tells whether a turn has ended.
        counts: numbers of busy loops, one per level.
        repeats: turns of a level.
        limit_s: longest time of a level with a load, in seconds. Turns that end later do not count.
        is_complete: whether a turn has all its figures.
    """

    def __init__(
        self, path: Path, counts: Sequence[int], repeats: int, limit_s: float, is_complete: Callable[[Turn], bool]
    ) -> None:
        super().__init__(daemon=True)
        self._path, self._counts, self._repeats, self._limit_s = path, counts, repeats, limit_s
        self._is_complete, self._is_over = is_complete, threading.Event()
        self.turns: list[list[Turn]] = []  # of each level

    def run(self) -> None:
        """Follow the run to the end of its last level."""
        first = 1
        for count in self._counts:
            self._wait_for(first)
            with busy_cores(count):
                turns = self._wait_for(first + self._repeats, self._limit_s if count else None)
            self.turns.append(turns[first : first + self._repeats])
            first += self._repeats

    def __enter__(self) -> "Levels":
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over.set()
        self.join()

    def _wait_for(self, num_turns: int, limit_s: float | None = None) -> list[Turn]:
        """Return the turns as soon as so many have ended, at the latest after the limit or at the end of the run."""
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        while True:
            is_over = self._is_over.is_set()  # before the file is read: the last turns are in it
            turns: list[Turn] = json.loads(self._path.read_bytes()) if self._path.exists() else []
            is_late = deadline_s is not None and time.monotonic() > deadline_s
            if is_over or is_late or sum(map(self._is_complete, turns)) >= num_turns:
                return turns
            self._is_over.wait(_POLL_S)
