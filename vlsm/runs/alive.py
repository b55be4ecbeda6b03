"""Signs of life of the jobs that work on the OUTPUT of a segment run.

OUTPUT/alive/ID.json   of one job: who it is and what it does; written again every few seconds

Several jobs may work on one OUTPUT at the same time, so this is not a lease, and no job is refused. The file vanishes
when the job has finished the run. A job that fails or is interrupted writes why; a killed job leaves its last sign. The
next job removes the files of dead jobs, and other files that they have left.

A sign of life never makes a run fail: if it cannot be written, the log says so once.
"""

import contextlib
import json
import logging
import re
import threading
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vlsm import storage
from vlsm.documents import parse_json
from vlsm.errors import VlsmError
from vlsm.runs import processes
from vlsm.runs.lease import INTERVAL_S, PATIENCE_S
from vlsm.runs.plan import list_plans, plan_of, remove_plan
from vlsm.runs.record import read_record
from vlsm.shown import show
from vlsm.version import FORMAT

logger = logging.getLogger("vlsm")

_FOLDER = "alive"
_NAME = re.compile(r"[0-9a-f]{32}\.json")
_MOST_BYTES = 1 << 14  # of a file; anybody may have written it
_MOST_READ = 50  # files; there is one for each job
_LONGEST_WORDS = 280  # letters of what a job does, or of its last words
_LAST_BEAT_S = 2.0  # how long the end of a job waits for a sign that is being written


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a job.

    Attributes:
        uri: location of its file.
        job: the job as a phrase: its command, process, host and start.
        doing: what it told last, or "".
        ended: why it ended, or "" if it works, or if it ended without a word.
        is_alive: whether it works. Its process on this machine is looked for; a job on another machine is taken for
            dead if its file is older than PATIENCE_S.
        silent_s: seconds since the file was written.
    """

    uri: str
    job: str
    doing: str
    ended: str
    is_alive: bool
    silent_s: float

    def __str__(self) -> str:
        if self.is_alive:
            return f"running: {self.job}{self.doing and f'; {self.doing}'}"
        return f"ended: {self.job}; {self.ended or 'without a word, as a killed job does'}"


def read_signs(output: str, now_s: float) -> list[Sign]:
    """Return the signs of life in an OUTPUT, the newest first.

    Args:
        output: OUTPUT of a segment run.
        now_s: current time by the clock of the store, in seconds since 1970.
    """
    folder = storage.join(output, _FOLDER)
    times = {name: time_s for name, time_s in storage.list_times(folder).items() if _NAME.fullmatch(name)}
    newest = sorted(times, key=lambda name: times[name], reverse=True)[:_MOST_READ]
    signs = [_read_sign(storage.join(folder, name), max(0.0, now_s - times[name])) for name in newest]
    return [sign for sign in signs if sign is not None]


def _read_sign(uri: str, silent_s: float) -> Sign | None:
    """Return the sign in a file, or None if it is gone."""
    try:
        stated = dict(parse_json(storage.read_bytes(uri, max_bytes=_MOST_BYTES), "the sign of life"))
    except FileNotFoundError:
        return None
    except (VlsmError, ValueError, TypeError):
        stated = {}
    ended = processes.as_word(stated.get("ended") or "")
    is_there = processes.is_alive(stated)
    return Sign(
        uri,
        processes.describe(stated),
        processes.as_word(stated.get("doing") or ""),
        ended,
        not ended and (silent_s < PATIENCE_S if is_there is None else is_there),
        silent_s,
    )


class SignOfLife(contextlib.AbstractContextManager["SignOfLife"]):
    """The sign of life of this job, from `start` to the end of the context.

    Args:
        output: OUTPUT of the run.
        job: the command, for messages.
        interval_s: seconds between two signs.
    """

    def __init__(self, output: str, job: str, interval_s: float = INTERVAL_S) -> None:
        self.output, self._name = output, f"{uuid.uuid4().hex}.json"
        self._identity: dict[str, Any] = {"format": FORMAT, **processes.identify(job)}
        self._interval_s, self._doing = interval_s, ""
        self._has_begun, self._is_failing = False, False
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sign of life", daemon=True)

    def start(self) -> None:
        """Give the first sign, and more until the end of the context. Call it before anything is written to OUTPUT."""
        if not self._thread.ident:
            self._beat(storage.QUICK_S)
            self._thread.start()

    def note(self, doing: str) -> None:
        """Set what the next sign tells that the job does, as a phrase."""
        self._doing = _phrase(doing)

    def begin(self) -> None:
        """Log which other jobs work on OUTPUT or have died there, and remove what dead jobs have left.

        Call it when the run is prepared: a job that is refused before leaves no sign.
        """
        self.start()
        self._has_begun = True
        with self._tolerance("looked at"):
            self._meet()

    def _meet(self) -> None:
        # listed before the signs: a job that writes a file later has given its first sign before
        temporary, plans = _list_temporary(self.output), list_plans(self.output)
        folder = storage.join(self.output, _FOLDER)
        own_s = storage.list_times(folder).get(self._name, 0.0)  # the time of the store, whatever this clock says
        others = [sign for sign in read_signs(self.output, own_s) if sign.uri != storage.join(folder, self._name)]
        for sign in others:
            if sign.is_alive:
                logger.info(
                    "%s works on this OUTPUT too: both write equal parts, and may segment the same images", sign.job
                )
            elif not sign.ended:
                logger.info("%s has ended without a word; this job goes on with its run", sign.job)
        for sign in others:
            if not sign.is_alive:
                storage.remove(sign.uri)
        if not any(sign.is_alive for sign in others):
            _remove_leftovers(self.output, temporary, plans)

    def _beat(self, patience_s: float, ended: str = "") -> None:
        with self._tolerance("written"):
            sign = self._identity | {"doing": self._doing, "ended": ended or None}
            storage.write_bytes(storage.join(self.output, _FOLDER, self._name), json.dumps(sign).encode(), patience_s)
            self._is_failing = False

    def _keep(self) -> None:
        while not self._is_ending.wait(self._interval_s):
            self._beat(storage.QUICK_S)

    @contextlib.contextmanager
    def _tolerance(self, verb: str) -> Any:
        """Log an error once, instead of raising it: whatever the store's client raises, the job itself goes on."""
        try:
            yield
        except Exception as error:
            if not self._is_failing:
                logger.warning("signs of life in %s cannot be %s: %s", self.output, verb, error)
            self._is_failing = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the sign, or write why the job ended."""
        if not self._thread.ident:
            return
        self._is_ending.set()
        self._thread.join(_LAST_BEAT_S)
        if error is not None and self._has_begun:
            self._beat(storage.FIRST_S, _last_words(error))
            return
        with self._tolerance("removed"):
            storage.remove(storage.join(self.output, _FOLDER, self._name))
            storage.remove_empty_folder(storage.join(self.output, _FOLDER))

    def __enter__(self) -> Self:
        return self


def _last_words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return _phrase(f"failed: {error}" if isinstance(error, VlsmError) else type(error).__name__)


def _phrase(text: str) -> str:
    """Return a text as `processes.as_word` accepts it."""
    return "".join(letter if letter.isprintable() else " " for letter in show(text))[:_LONGEST_WORDS]


def _list_temporary(output: str) -> list[str]:
    """Return the temporary files that killed jobs, or jobs at work, have in an OUTPUT. Stores have none."""
    fs, _ = storage.open_uri(output)
    folders = [storage.join(output, name) for name in ("masks", "manifest", _FOLDER)] if storage.is_local(fs) else []
    return [
        storage.join(folder, name)
        for folder in ([output, *folders] if folders else [])
        for name in storage.list_names(folder)
        if storage.is_temporary(name)
    ]


def _remove_leftovers(output: str, temporary: list[str], plans: set[str]) -> None:
    """Remove temporary files, and those of the plans that are not the current one."""
    for uri in temporary:
        storage.remove(uri)
    if (record := read_record(output)) is not None:
        for plan_id in plans - {plan_of(record, output).id}:
            remove_plan(output, plan_id)
