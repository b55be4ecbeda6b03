"""The parts that all commands share: arguments, logging, exit codes, and the start of Ray."""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from importlib import import_module
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobs.ray_output import RayEvents, quiet_start
from vlsm import storage
from vlsm.commands import new_parser
from vlsm.config import Settings
from vlsm.errors import CheckpointError, ConfigError, ManifestError, VlsmError
from vlsm.events import FORMATS, event, set_up_log
from vlsm.shown import say, say_error, show_records

logger = logging.getLogger("vlsm")

_STARTED_S = time.time()  # every command imports this module first
_RAY_STARTS = 5
_CONNECT_S = 10.0
_STARTING_S = 10.0  # after this time, and again, the log says that Ray is still starting
_JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks the folder of a submitted job

_RECIPES = Path(__file__).with_name("configs")

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 configuration or usage wrong, 130 interrupted"


def job_parser(
    module: str, description: str, examples: Sequence[str], settings: type[Settings], common: Sequence[str]
) -> argparse.ArgumentParser:
    """Return the parser of a job: `vlsm.commands.new_parser` with --config, --set and --dry-run."""
    parser = new_parser(module, description, examples, settings, common, EXIT_CODES)
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=_find_recipe,
        help="YAML with settings; or a recipe of the package: strong/unet",
    )
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="one setting; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on a terminal too")
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="json: one object a line, for machines (text)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what would be done")
    return parser


def _find_recipe(config: str) -> str:
    """Return the file of `--config`: as given, or else a recipe of this package, with or without its folder and suffix.

    An installed package has no clone beside it, and yet the commands of the README work.
    """
    if os.path.lexists(config):
        return config
    name = config.removeprefix(f"{_RECIPES.parent.name}/{_RECIPES.name}/")
    recipes = {str(path.relative_to(_RECIPES).with_suffix("")): path for path in _RECIPES.rglob("*.yaml")}
    return str(recipes.get(name.removesuffix(".yaml"), config))


def parse_pairs(flag: str, words: list[str]) -> dict[str, str]:
    """Return the names and absolute locations of NAME=URI words.

    Raises:
        ConfigError: a word has another form, or a name is given twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, separator, uri = word.partition("=")
        if not (name and separator and uri):
            raise ConfigError(f"{flag} {word!r} is not of the form NAME=URI, such as kvasir=s3://bucket/kvasir")
        if name in pairs:
            raise ConfigError(f"{flag} {name} is given twice; each {flag} needs its own name")
        pairs[name] = locate(uri)
    return pairs


def locate(uri: str) -> str:
    """Return the absolute location of a word of the command line.

    Raises:
        ConfigError: the path is relative, and this is a submitted job. It runs in a copy of the submitted folder, which
            other nodes lack and Ray deletes.
    """
    if "://" not in uri and not uri.startswith(("/", "~")) and _JOB_FOLDER in os.getcwd():
        raise ConfigError(
            f"{uri!r} is a relative path; a submitted job runs in a temporary copy of its folder, so give a location "
            f"that every node can reach, such as s3://bucket/{uri} or a shared folder"
        )
    return storage.absolute(uri)


def run_command(
    work: Callable[[], dict[str, Any] | None],
    describe: Callable[[dict[str, Any]], list[str]] = lambda result: [],
    as_json: bool = False,
    log_format: str = "text",
) -> int:
    """Run the work of a command, print its result, and return the exit code.

    On a terminal, stdout gets the lines that describe the result. Otherwise it gets the result as one JSON line, for
    programs, and the lines go to the log. All other output goes to stderr. SIGTERM (`ray job stop`) ends the work as
    Ctrl-C does.

    Args:
        work: returns the result, or None if it has printed everything itself.
        describe: returns the lines for a person.
        as_json: print JSON on a terminal too.
        log_format: one of `vlsm.events.FORMATS`.
    """
    set_up_log(log_format)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = work()
    except (VlsmError, KeyboardInterrupt) as error:
        return _say_end(error, log_format)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if result is not None and sys.stdout.isatty() and not as_json:
        say("\n".join(describe(result)))
    elif result is not None:
        for line in describe(result):
            logger.info("%s", line)
        say(json.dumps(result))
    if result is not None and log_format == "json":
        logger.info("finished", extra=event("finished", **result))
    return 0


def _say_end(error: VlsmError | KeyboardInterrupt, log_format: str) -> int:
    """Say how a command ended that has no result, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        exit_code, words = 130, "interrupted; the same command goes on from here"
        ended = event("interrupted", exit_code=exit_code)
    else:
        exit_code = 2 if isinstance(error, ConfigError | CheckpointError | ManifestError) else 1
        words, ended = str(error), event("error", exit_code=exit_code, error=type(error).__name__)
    if log_format == "json":
        logger.error("%s", words, extra=ended)
    elif exit_code == 130:
        say(words, sys.stderr)
    else:
        say_error(error)
    return exit_code


class RaySession(contextlib.AbstractContextManager["RaySession"]):
    """A context with Ray: the cluster of the environment (RAY_ADDRESS, a submitted job), or a new one on this machine.

    `start` returns at once; a thread starts Ray while the caller continues. `wait` returns when Ray runs. If Ray
    already runs in this process, the context uses it and does not shut it down.

    The output of Ray, of tasks and of actors is in Ray's log files only. If the work fails, the log names their folder.
    """

    def __init__(self) -> None:
        self._is_running: Future[None] = Future()
        self._is_imported, self._is_closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.milestones = {"start": _STARTED_S}  # time of each milestone, in seconds since 1970
        # stdout holds only the JSON result; all other output goes to stderr
        self._stdout = contextlib.redirect_stdout(RayEvents())

    def __enter__(self) -> Self:
        self._stdout.__enter__()
        return self

    def start(self) -> None:
        """Start Ray in a thread. Further calls do nothing."""
        if self._thread is None:
            self.milestones["checked"] = time.time()
            address = cluster_address()
            check_address(address)  # here, before anything is planned
            words = f"joining the Ray cluster at {address}" if address else "starting Ray"
            logger.info("%s", words, extra=event("phase", phase="starting Ray"))
            if not address:
                _warn_if_uncompiled()
            self._thread = threading.Thread(target=self._run_ray, name="ray")
            self._thread.start()
            self._is_imported.wait()  # two threads that import at the same time only wait for each other

    def wait(self) -> None:
        """Wait until Ray runs, and switch off the progress output of Ray Data. Raises the error of a failed start."""
        self.start()
        import_module("pandas")  # half of the import time of ray.data, while Ray still starts
        while not wait_for([self._is_running], _STARTING_S).done:
            logger.info("Ray is still starting, after %d s", time.time() - self.milestones["checked"])
        self._is_running.result()
        self.milestones.setdefault("Ray", time.time())
        import ray.data

        # Ray Data logs its progress, slow stages and the errors of tasks in a file too; the job prints its own
        # progress, and one sentence about an error
        for handler in logging.getLogger("ray.data").handlers:
            show_records(handler)
            if isinstance(handler, logging.StreamHandler) and handler not in logging.root.handlers:
                handler.setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False

    def _run_ray(self) -> None:
        """Start Ray, and shut it down when the context ends: both in one thread, because Ray dies with it."""
        try:
            has_started_ray = self._open()
        except BaseException as error:  # `wait` raises it in the main thread
            self._is_running.set_exception(error)
            return
        finally:
            self._is_imported.set()
        self._is_running.set_result(None)
        self._is_closing.wait()
        if has_started_ray:
            import ray

            ray.shutdown()

    def _open(self) -> bool:
        """Start Ray or join a cluster; return False if Ray already runs in this process, or is not needed any more."""
        import ray  # not ray.data: two threads that import parts of one package can deadlock

        self._is_imported.set()
        if self._is_closing.is_set() or ray.is_initialized():
            return False
        # for a cluster that starts here: tasks use fractions of a CPU, so there are more workers than CPUs. Above this
        # limit, for which actors count too, Ray ends workers that are idle for 1 s and starts new ones a moment later.
        # A start takes 1 to 3 s of a core, an idle worker 0.006 cores
        os.environ.setdefault("RAY_num_workers_soft_limit", str(max(64, 4 * (os.cpu_count() or 1))))
        # for a cluster that starts here: Ray adds 15 to the niceness of its workers, so beside other load on the same
        # CPUs they hardly run, while this job, which waits for them, has priority; now they get the job's niceness
        os.environ.setdefault("RAY_worker_niceness", "0")
        # training workers do not read preemption notices, and the watcher process takes seconds to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to the makers of Ray
        os.environ.setdefault("RAY_verbose_spill_logs", "0")  # the raylet logs to the terminal what it moves to a disk
        # what will change in Ray is for those who change this code
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray(\.|$)")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray(\.|$)")
        # ERROR hides the warning that Ray sets no SIGTERM handler outside the main thread; `run_command` sets one. It
        # also hides what Ray says about its tokens, which `cluster.yaml` requires
        with quiet_start():
            init_ray(
                is_needed=lambda: not self._is_closing.is_set(),
                logging_level=logging.ERROR,
                include_dashboard=False,
                log_to_driver=False,
            )
        logging.getLogger("ray").setLevel(logging.ERROR)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _release_frames(error)
            is_of_usage = isinstance(error, ConfigError | CheckpointError | ManifestError)
            if isinstance(error, Exception) and not is_of_usage and "Ray" in self.milestones:
                where = " on each node" if cluster_address() else ""
                logger.info("the logs of Ray and of its processes are in %s%s", logs_folder(), where)
            self._is_closing.set()
            if self._thread is not None:
                if not self._is_running.done():  # a half-started Ray would leave processes behind
                    why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopping"
                    logger.info("%s: waiting until Ray has started and can be ended, so that no process stays", why)
                self._thread.join()
        finally:
            self._stdout.__exit__(kind, error, trace)


def cluster_address() -> str:
    """Return the address of the cluster that the environment names, or "" if Ray shall start here."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _warn_if_uncompiled() -> None:
    """Log a warning where each process of this machine compiles all that it imports: its start takes twice as long."""
    spec = find_spec("ray")
    file = spec.origin if spec else None
    if sys.dont_write_bytecode and file and not Path(cache_from_source(file)).exists():
        logger.warning(
            "each process compiles its libraries anew, so its start takes twice as long: PYTHONDONTWRITEBYTECODE is "
            "set, and they were installed without compiled files; python -m compileall -q %s writes these",
            Path(file).parents[1],
        )


def check_address(address: str) -> None:
    """Raise a VlsmError if nothing listens at the address of a cluster: Ray would wait without an end."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise VlsmError(f"the Ray cluster at RAY_ADDRESS={address} cannot be reached: {error}") from error


def init_ray(*address: str, is_needed: Callable[[], bool] = lambda: True, **options: Any) -> Any:
    """Call `ray.init`, again if the node did not start in time; see `start_patiently`.

    Args:
        address: as for `ray.init`.
        is_needed: as for `start_patiently`.
        options: options of `ray.init`.

    Raises:
        VlsmError: Ray did not start, or its cluster cannot be joined.
    """
    import ray

    try:
        return start_patiently(lambda: ray.init(*address, **options), ray.shutdown, is_needed)
    except Exception as error:  # Ray's own is a bare Exception
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if cluster := cluster_address():
            raise VlsmError(f"the Ray cluster at RAY_ADDRESS={cluster} cannot be joined: {reason}") from error
        raise VlsmError(
            f"Ray did not start: {reason}; the same command tries again. The machine may be too busy, or have too "
            f"little memory or room in /tmp; the logs of Ray are in {logs_folder()}"
        ) from error


def logs_folder() -> str:
    """Return the folder on this machine where Ray and all its processes log."""
    node = import_module("ray._private.worker")._global_node
    return node.get_logs_dir_path() if node is not None else "/tmp/ray/session_*/logs"  # noqa: S108


def start_patiently(
    start: Callable[[], Any],
    clean_up: Callable[[], object] = lambda: None,
    is_needed: Callable[[], bool] = lambda: True,
) -> Any:
    """Return the result of a function that starts a Ray node. Call it again if the node did not start in time.

    Ray allows 30 s, and no setting changes that. A busy machine needs longer.

    Args:
        start: starts the node.
        clean_up: is called before each further try.
        is_needed: returns whether there may be another try.
    """
    for attempt in range(1, _RAY_STARTS + 1):
        try:
            return start()
        except Exception as error:  # Ray's own is a bare Exception
            if attempt == _RAY_STARTS or "imed out" not in str(error) or not is_needed():
                raise
            logger.info(
                "Ray did not start within 30 s, which happens on a busy machine: starting it again, try %d of %d",
                attempt + 1,
                _RAY_STARTS,
            )
            clean_up()


def _release_frames(error: BaseException | None) -> None:
    """Clear the local variables in the frames of an error and of its causes.

    They may hold an interrupted stream of Ray Data. If Python deletes this stream after Ray has shut down, the stream
    starts Ray again to cancel its tasks.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
