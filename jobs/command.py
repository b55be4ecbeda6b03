"""What the commands have in common: arguments, logging, exit codes, and how Ray is started."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from vlsm import storage
from vlsm.config import Settings, describe_settings
from vlsm.errors import CheckpointError, ConfigError, ManifestError, VlsmError

logger = logging.getLogger("vlsm")

_STARTED_S = time.time()  # every command imports this module first

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 configuration or usage wrong, 130 interrupted"


def make_parser(module: str, description: str, settings: type[Settings]) -> argparse.ArgumentParser:
    """A parser with --config, --set and --dry-run, whose help lists every setting."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="\n".join(
            ["settings, as --set key=value or in --config FILE:", *describe_settings(settings), "", EXIT_CODES]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with settings")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="one setting; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what would be done")
    return parser


def parse_pairs(flag: str, words: list[str]) -> dict[str, str]:
    """NAME=URI words as names and locations.

    Raises:
        ConfigError: a word is not of this form, or a name stands there twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, separator, uri = word.partition("=")
        if not (name and separator and uri):
            raise ConfigError(f"{flag} {word!r} is not of the form NAME=URI, such as kvasir=s3://bucket/kvasir")
        if name in pairs:
            raise ConfigError(f"{flag} {name} is given twice; each has a name of its own")
        pairs[name] = storage.absolute(uri)
    return pairs


def run_command(work: Callable[[], dict[str, Any] | None]) -> int:
    """Do a command's work and turn how it ends into an exit code; what it returns is one JSON line on stdout.

    Everything else goes to stderr. SIGTERM (`ray job stop`) ends a run as Ctrl-C does.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("aiobotocore", "botocore", "httpx", "s3fs"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = work()
    except (ConfigError, CheckpointError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except VlsmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    if result is not None:
        print(json.dumps(result), flush=True)
    return 0


class RaySession(contextlib.AbstractContextManager["RaySession"]):
    """Ray for a while: the cluster of the environment (RAY_ADDRESS, a submitted job), or one started on this machine.

    `start` returns at once, and Ray starts in a thread beside what the caller does; `wait` returns when Ray is there. A
    session that the caller has already opened is used and left open.

    Args:
        log_to_driver: whether what tasks and actors print stands in the job's log as well as in their own.
    """

    def __init__(self, log_to_driver: bool = True) -> None:
        self._log_to_driver = log_to_driver
        self._there: Future[None] = Future()
        self._is_imported, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.milestones = {"start": _STARTED_S}  # when the run reached each milestone, in seconds since 1970
        # stdout is the result's: what Ray and its processes print goes beside the log
        self._stdout = contextlib.redirect_stdout(sys.stderr)

    def __enter__(self) -> Self:
        self._stdout.__enter__()
        return self

    def start(self) -> None:
        """Begin to start Ray; once is enough."""
        if self._thread is None:
            self.milestones["checked"] = time.time()
            self._thread = threading.Thread(target=self._hold, name="ray")
            self._thread.start()
            self._is_imported.wait()  # two threads that import at once only take turns

    def wait(self) -> None:
        """Wait until Ray runs, and silence Ray Data's progress. Raises the error with which Ray failed to start."""
        self.start()
        import_module("pandas")  # half of the time that `import ray.data` takes; Ray still starts meanwhile
        self._there.result()
        self.milestones.setdefault("Ray", time.time())
        import ray.data

        # warnings stay; what Ray Data says of its own progress would stand beside ours
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler) and handler not in logging.root.handlers:
                handler.setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False

    def _hold(self) -> None:
        """Start Ray, and end it when the session is over: its processes die with the thread that has started them."""
        try:
            is_opened = self._open()
        except BaseException as error:  # `wait` raises it in the main thread
            self._there.set_exception(error)
            return
        finally:
            self._is_imported.set()
        self._there.set_result(None)
        self._over.wait()
        if is_opened:
            import ray

            ray.shutdown()

    def _open(self) -> bool:
        import ray  # and not ray.data: two threads that import parts of one package can wait for each other

        self._is_imported.set()
        if ray.is_initialized():
            return False
        # of a cluster that starts here: ours are fractions of a CPU, and beyond the limit Ray ends processes that are
        # idle for a second, to start others in the next; a third of a small machine went that way
        os.environ.setdefault("RAY_num_workers_soft_limit", str(4 * (os.cpu_count() or 1)))
        # our workers do not ask for preemption notices, and the watcher process takes seconds to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # outside of the main thread Ray warns that it sets no SIGTERM handler; `run_command` has set one
        ray.init(logging_level=logging.ERROR, include_dashboard=False, log_to_driver=self._log_to_driver)
        logging.getLogger("ray").setLevel(logging.WARNING)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _release_frames(error)
            self._over.set()
            if self._thread is not None:
                self._thread.join()
        finally:
            self._stdout.__exit__(kind, error, trace)


def _release_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold.

    A stream that was interrupted between two rows lives on there; released after Ray has gone, it would start Ray anew
    to cancel its tasks.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
