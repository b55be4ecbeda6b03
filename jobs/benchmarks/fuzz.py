"""Damaged files against every reader of the product: no crash, no hang, no memory without end, no foreign exception.

Each try damages a small valid file (seeds that this job draws) and reads it in another process, as the product does.
The file must be accepted, or refused by an error of the product. A fault is any of these: another exception; the death
of the process; 5 s of CPU time, or 60 s in all; 1 GiB of memory; a file that is written elsewhere. Its files are kept.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobs.benchmarks.figures import write_json
from jobs.benchmarks.fuzz_readers import READERS
from jobs.benchmarks.fuzz_seeds import WRITTEN
from jobs.benchmarks.fuzz_worker import CPU_S, STACK, TRY, Outcome, serve
from vlsm.errors import ConfigError

_LONGEST_S = 60.0  # wall-clock time of a try; other processes may have the CPUs meanwhile
_START_S = 600.0  # of the first imports and the seeds
_MOST_KEPT = 2  # of the files of faults with one cause
_NEEDS = {"checkpoint": WRITTEN, "output": WRITTEN, "training": WRITTEN, "evaluation": WRITTEN}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark fuzz`."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5, metavar="N", help="for all readers together (5)")
    length.add_argument("--tries", type=int, metavar="N", help="of each reader, instead of minutes")
    parser.add_argument("--reader", action="append", choices=READERS, help="may be repeated (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="equal seeds give equal files (0)")
    parser.add_argument("--again", metavar="DIR", help="read the kept files of a fault again, with one --reader")


def measure(args: Namespace) -> int:
    """Read damaged files with every reader, and keep those that cause a fault. The exit code is 1 if there is one."""
    names = list(dict.fromkeys(args.reader or READERS))
    if args.again:
        if len(names) != 1:
            raise ConfigError("--again needs one --reader, the one that the folder is named after")
        return _read_again(names[0], args.again)
    for name in [name for name in names if not _can_read(name)]:
        print(f"left out: {name} needs {'the package av' if name == 'video' else _NEEDS[name]}")
        names.remove(name)
    print(f"{'reader':12} {'tries':>8} {'tries/s':>8} {'accepted':>9} {'rejected':>9} {'faults':>7}")
    kept = Path(tempfile.mkdtemp(prefix="vlsm-fuzz-"))
    budget_s = args.minutes * 60 / max(1, len(names))
    with _Child(args.seed) as child:
        tallies = [_Tally(name, kept).fill(child, args.tries, budget_s) for name in names]
    num_faults = sum(tally.faults.total() for tally in tallies)
    for tally in tallies:
        for cause, count in tally.faults.most_common():
            print(f"{tally.reader}: {count} x {cause}: {tally.kept[cause]}")
    if num_faults:
        print(f"{num_faults} faults with seed {args.seed}; their files are below {kept}")
    else:
        kept.rmdir()
    write_json(args.json, "fuzz", {"seed": args.seed, "runs": [tally.describe() for tally in tallies]})
    return 1 if num_faults else 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines of Markdown."""
    lines = [
        "Damaged files that each reader has accepted, or refused with an error of its own; faults are crashes, hangs, "
        f"1 GiB of memory and other exceptions. Seed {figures['seed']}.",
        "",
        "| reader | tries | per second | accepted | rejected | faults |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        "| {reader} | {tries:,} | {tries_per_s:,.0f} | {accepted:,} | {rejected:,} | {faults} |".format(**row)
        for row in figures["runs"]
    ]


@dataclass
class _Tally:
    """The results of one reader; `kept` has the folder of the first fault of each cause."""

    reader: str
    folder: Path
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kept: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0

    def fill(self, child: "_Child", tries: int | None, budget_s: float) -> Self:
        """Try until the number of tries is reached, or else until the time is over; print a line."""
        start_s, number = time.monotonic(), 0
        while number < tries if tries is not None else time.monotonic() < start_s + budget_s:
            outcome = child.read(self.reader, number)
            self.kinds[outcome.kind] += 1
            if outcome.kind == "fault":
                self._keep(child, number, outcome)
            number += 1
        self.seconds = time.monotonic() - start_s
        row = self.describe()
        print(
            "{reader:12} {tries:8,} {tries_per_s:8,.1f} {accepted:9,} {rejected:9,} {faults:7,}".format(**row),
            flush=True,
        )
        return self

    def _keep(self, child: "_Child", number: int, outcome: Outcome) -> None:
        self.faults[outcome.cause] += 1
        folder = self.folder / f"{self.reader}-{number}"
        self.kept.setdefault(outcome.cause, folder)
        if self.faults[outcome.cause] <= _MOST_KEPT:
            shutil.copytree(child.folder / TRY, folder, symlinks=True)
            folder.with_suffix(".txt").write_text(f"{outcome.cause}\n\n{outcome.text}\n", encoding="utf-8")

    def describe(self) -> dict[str, Any]:
        """Return the figures of the reader."""
        tries = self.kinds.total()
        return {
            "reader": self.reader,
            "tries": tries,
            "tries_per_s": round(tries / max(self.seconds, 1e-9), 2),
            "accepted": self.kinds["accepted"],
            "rejected": self.kinds["rejected"],
            "faults": self.faults.total(),
            "causes": dict(self.faults),
        }


class _Child:
    """The process that reads. It is started again when it dies.

    Attributes:
        folder: its folder, with the files of the last try.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._context = seed, multiprocessing.get_context("spawn")
        self._home = tempfile.TemporaryDirectory(prefix="vlsm-fuzz-work-")
        self.folder = Path(self._home.name)
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def read(self, reader: str, number: int, again: str | None = None) -> Outcome:
        """Do one try, or read the files of a folder as they are."""
        if self._connection is None:
            self._start()
        assert self._connection is not None  # noqa: S101 - for mypy
        self._connection.send((reader, number, again))
        for longest_s in (_START_S, _LONGEST_S):
            if not self._connection.poll(longest_s):
                os.kill(self._process.pid, signal.SIGPROF)  # it writes its stack and dies
                break
            try:
                if (outcome := self._connection.recv()) is not None:
                    return outcome
            except EOFError:  # it is dead
                break
        return self._bury()

    def _bury(self) -> Outcome:
        """Return why the process has died."""
        self._process.join(10)
        code = self._process.exitcode
        stack = (self.folder / STACK).read_text(encoding="utf-8", errors="replace")
        self._stop()
        is_hang = code in (None, -signal.SIGPROF)
        name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        lines = [line.strip() for line in stack.splitlines() if "/vlsm/" in line]
        what = f"hang of {CPU_S:g} s of CPU time or {_LONGEST_S:g} s" if is_hang else f"crash ({name})"
        return Outcome("fault", f"{what} {lines[0] if lines else ''}".strip(), stack)

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(other, str(self.folder), self._seed), daemon=True)
        self._process.start()
        other.close()
        if not self._connection.poll(_START_S) or self._connection.recv() is not None:
            raise ConfigError("the process that reads did not start")

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the process ends by itself, unless it hangs
        if self._process is not None:
            self._process.join(5)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._home.cleanup()


def _can_read(name: str) -> bool:
    if name == "video":
        return find_spec("av") is not None
    return name not in _NEEDS or _NEEDS[name].exists()


def _read_again(name: str, folder: str) -> int:
    with _Child(0) as child:
        outcome = child.read(name, 0, os.path.abspath(folder))
    print(f"{outcome.kind} {outcome.cause}\n{outcome.text}".strip())
    return 1 if outcome.kind == "fault" else 0
