"""The process in which readers read damaged files, and its limits: CPU time, memory, files outside of its folder."""

import contextlib
import faulthandler
import itertools
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from jobs.benchmarks.fuzz_mutations import Files, mutate
from jobs.benchmarks.fuzz_readers import READERS
from jobs.benchmarks.fuzz_seeds import SEEDS, read_folder
from vlsm import storage
from vlsm.errors import VlsmError

TRY, STACK = "try", "stack"  # in the work folder: the folder with the files of a try, and the stack of a dead process
CPU_S = 5.0  # of one try; more is a hang
MEMORY_BYTES = 1 << 30  # by which a try may raise the resident memory
_MOST_ADDRESSES = 4 << 30  # by which a try may raise the virtual memory: protects the machine
_OURS = re.compile(r"/(vlsm|jobs)/(?!benchmarks/)")


@dataclass(frozen=True)
class Outcome:
    """The result of a try.

    Attributes:
        kind: "accepted", "rejected" by an error of the product, or "fault".
        cause: of a fault: the same text for equal causes.
        text: of a fault: all details, such as a traceback.
    """

    kind: str
    cause: str = ""
    text: str = ""


def serve(connection: Connection, folder: str, seed: int) -> None:
    """Do the tries that the parent asks for, until it closes the connection.

    A request is the name of a reader, the number of a try, and None, or else a folder whose files are read as they are.
    Each has two answers: None when the try begins, then its outcome. An undamaged file of the try that is new here is
    read before, so that the imports of its reader are no part of the try. If it is refused, this is the only answer.

    Args:
        connection: to the parent.
        folder: for the files of each try.
        seed: together with the name and the number it decides the files.
    """
    work = Path(folder)
    stack = _prepare(work)
    seeds: dict[str, list[Files]] = {}
    known: set[tuple[str, int]] = set()
    connection.send(None)  # it has started
    with contextlib.suppress(EOFError):
        while True:
            name, number, again = connection.recv()
            if again is not None:
                files = read_folder(Path(again))
            else:
                if name not in seeds:
                    seeds[name] = SEEDS[name]()
                rng = random.Random(f"{seed} {name} {number}")
                chosen = rng.randrange(len(seeds[name]))
                if (name, chosen) not in known and (refused := _read_seed(work, name, seeds[name][chosen])):
                    connection.send(refused)
                    continue
                known.add((name, chosen))
                files = mutate(seeds[name][chosen], rng)
            connection.send(None)
            connection.send(_try(work, name, files, stack))


def _prepare(work: Path) -> int:
    """Silence this process, and let it tell its stack when it dies. Returns the file of the stack."""
    stack = os.open(work / STACK, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    faulthandler.enable(stack)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, stack, chain=True)  # then the signal ends the process
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):  # libraries in C print too
        os.dup2(silence, number)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    storage._delays = lambda patience_s: iter(())  # a run waits minutes for a store on purpose; no try may
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115
    return stack


def _read_seed(work: Path, name: str, files: Files) -> Outcome | None:
    """Read undamaged files; return the fault if they are refused."""
    with _enter(work, files):
        try:
            if READERS[name]():
                return None
            reason = "nothing was read"
        except Exception:
            reason = traceback.format_exc()
    return Outcome("fault", "undamaged files are refused", reason)


def _try(work: Path, name: str, files: Files, stack: int) -> Outcome:
    os.ftruncate(stack, 0)
    with _enter(work, files):
        before = _memory("VmRSS")
        with _limits():
            outcome = _judge(name)
        grown = _memory("VmHWM") - before
    if grown > MEMORY_BYTES:
        outcome = Outcome("fault", f"{outcome.kind} with too much memory", f"{grown:,} bytes\n{outcome.text}")
    if others := set(os.listdir(work)) - {TRY, STACK}:
        for other in others:
            subprocess.run(["rm", "-rf", "--", work / other], check=True)  # a file, a folder or a link
        outcome = Outcome("fault", "a file outside of the folder", f"{sorted(others)}\n{outcome.text}")
    return outcome


def _judge(name: str) -> Outcome:
    try:
        return Outcome("accepted" if READERS[name]() else "rejected")
    except VlsmError:
        return Outcome("rejected")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind: this is what the product must not let through
        return Outcome("fault", _cause(error), traceback.format_exc())


def _cause(error: BaseException) -> str:
    """Return the type of an error, and the last place in the product that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _OURS.search(frame.filename)]
    place = ""
    if frames:
        path = Path(frames[-1].filename)
        place = f" at {path.parent.name}/{path.name}:{frames[-1].lineno}"
    return f"{type(error).__name__}{place}"


@contextlib.contextmanager
def _enter(work: Path, files: Files) -> Iterator[None]:
    """Write the files into an empty folder, and work there."""
    folder = work / TRY
    os.chdir(work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.chdir(folder)
    yield
    os.chdir(work)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit the CPU time and the addresses of what follows, and count its memory from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _MOST_ADDRESSES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _memory(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(itertools.dropwhile(lambda line: not line.startswith(f"{key}:"), status.splitlines()))
    return int(line.split()[1]) * 1024
