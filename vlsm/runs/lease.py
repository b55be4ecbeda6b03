"""The lease of an OUTPUT: one job at a time writes to it.

OUTPUT/lease/00000001.json   the claim of a job: who, where, since when; written once, never changed
OUTPUT/lease/00000001.beat   its heartbeat, replaced every few seconds; it also tells the progress of the job

The claim with the highest number holds the lease. To take over a dead job's lease, a job creates the next number. Every
store creates a file for one writer only, so of two jobs one gets it. No job writes to the files of another job. A job
that wakes up after a long pause finds a higher claim, or its own claim gone, and stops.

A job is dead if its process on this machine has ended, or if its heartbeat did not change for `PATIENCE_S`, measured
with the clock of the job that looks. The clocks of two machines are never compared.

One gap remains: a process that is paused after a check and before the write that follows may still do this one write.
"""

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vlsm import storage
from vlsm.documents import parse_json
from vlsm.errors import LeaseError, VlsmError
from vlsm.runs import processes
from vlsm.runs.links import check_links

logger = logging.getLogger("vlsm")

INTERVAL_S = 10.0  # between two heartbeats
PATIENCE_S = 60.0  # a job on another machine without a heartbeat for this time is dead
_CLAIM = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Token:
    """The number and the owner of a claim. Workers get it from the driver and check it before they write."""

    output: str
    number: int
    owner: str

    @property
    def uri(self) -> str:
        """Location of the claim."""
        return storage.join(self.output, "lease", f"{self.number:08d}.json")

    @property
    def beat_uri(self) -> str:
        """Location of the heartbeat."""
        return storage.join(self.output, "lease", f"{self.number:08d}.beat")

    def check(self, patience_s: float = storage.PATIENT_S) -> None:
        """Check in storage that the job still holds the lease: one listing and one small read.

        Raises:
            LeaseError: another job has taken the lease over.
        """
        numbers = _list_numbers(self.output, patience_s)
        if numbers and numbers[-1] == self.number:
            with contextlib.suppress(FileNotFoundError):
                if _parse(storage.read_bytes(self.uri, patience_s)).get("owner") == self.owner:
                    return
        raise LeaseError(
            f"another job has taken over {self.output!r}, because this one gave no sign of life for a while; this job "
            "stops and leaves the files to the other one"
        )


@dataclass(frozen=True)
class Holder:
    """The job that holds a lease.

    Attributes:
        job: its command, such as "jobs.train".
        host, pid: its machine and process.
        since: time of its claim, in ISO format.
        progress: what it told last, or None.
        silent_s: seconds since its last heartbeat, by the times of the store.
        is_dead: whether its process is known to have ended; False if it ran on another machine.
    """

    job: str
    host: str
    pid: int
    since: str
    progress: dict[str, Any] | None
    silent_s: float
    is_dead: bool


class Lease(contextlib.AbstractContextManager["Lease"]):
    """The lease of an OUTPUT, from `take` to the end of the context.

    Args:
        output: the OUTPUT folder.
        job: the command, for messages.
        holder: a job with the same holder that is not empty is an earlier try of this one: it is dead.
        interval_s: seconds between two heartbeats.
        patience_s: seconds without a change of the heartbeat after which another job is dead.
    """

    def __init__(
        self, output: str, job: str, holder: str = "", interval_s: float = INTERVAL_S, patience_s: float = PATIENCE_S
    ) -> None:
        self.output, self.token = output, None
        self._job, self._holder, self._interval_s, self._patience_s = job, holder, interval_s, patience_s
        self._owner = uuid.uuid4().hex
        self._progress: dict[str, Any] | None = None
        self._lost: LeaseError | None = None
        self._num_beats = 0
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    token: Token | None

    @property
    def owner(self) -> str:
        """Id of this job, also before it has the lease."""
        return self._owner

    def take(self) -> None:
        """Take the lease and keep it alive. Does nothing if this job has it.

        Temporary files that killed processes left directly in OUTPUT are removed.

        Raises:
            LeaseError: another job holds it.
            ConfigError: a link leads out of OUTPUT.
        """
        check_links(self.output)
        claim = {"owner": self._owner, "holder": self._holder, **processes.identify(self._job)}
        while self.token is None:
            dead = self.wait_until_free()
            token = Token(self.output, max(dead, default=0) + 1, self._owner)
            # a job that ends at this moment removes its files and the empty folder: look again
            with contextlib.suppress(FileNotFoundError):
                if storage.create_bytes(token.uri, json.dumps(claim).encode()) and _is_first(token, dead):
                    self.token = token
                    self._beat(token)
        if not self._thread.ident:
            _remove_below(self.token)
            storage.remove_leftovers(self.output)
            self._thread.start()

    def wait_until_free(self) -> dict[int, bytes]:
        """Wait until no job holds the lease, as far as this is soon. Write nothing.

        Returns:
            The claims of dead jobs by their numbers.

        Raises:
            LeaseError: another job is alive and holds it.
        """
        if self.token is not None:
            return {}
        seen: bytes | None = None
        since_s = time.monotonic()
        while claims := _read_claims(self.output):
            number = max(claims)
            claim = _parse(claims[number])
            is_own = bool(self._holder) and claim.get("holder") == self._holder
            is_alive = None if is_own else processes.is_alive(claim)  # None: unknown
            if is_own or is_alive is False:
                break
            beat = claims[number] + _read(Token(self.output, number, "").beat_uri)
            if is_alive or beat != (seen or beat):
                raise LeaseError(_refusal(self.output, claim, self._patience_s))
            if seen is None:
                seen = beat
                logger.info("%s", _waiting(self.output, claim, self._patience_s))
            if time.monotonic() - since_s >= self._patience_s:
                break
            time.sleep(min(1.0, self._interval_s / 4))
        return claims

    def note(self, progress: dict[str, Any] | None) -> None:
        """Set the progress that the next heartbeat tells."""
        self._progress = progress

    def check(self) -> None:
        """Raise a LeaseError if the last heartbeat found that another job has taken over. Reads nothing."""
        if self._lost is not None:
            raise self._lost

    def _beat(self, token: Token) -> None:
        self._num_beats += 1
        beat = {"beat": self._num_beats, "at": time.time(), "progress": self._progress}
        storage.write_bytes(token.beat_uri, json.dumps(beat).encode(), storage.QUICK_S)

    def _keep(self) -> None:
        """Write heartbeats until the end. A store that fails is tried again at the next one."""
        token, is_failing = self.token, False
        assert token is not None  # noqa: S101  `take` starts the thread
        while not self._is_ending.wait(self._interval_s):
            try:
                token.check(storage.QUICK_S)
                self._beat(token)
                is_failing = False
            except LeaseError as error:
                self._lost = error
                return
            except Exception as error:  # whatever the store's client raises: the job itself goes on
                if not is_failing:
                    logger.warning("the heartbeat of %s cannot be written: %s", self.output, error)
                is_failing = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back. If the store fails, others find out by the missing heartbeat."""
        token, self.token = self.token, None
        if token is None:
            return
        self._is_ending.set()
        if self._thread.ident:
            self._thread.join()
        try:
            token.check(storage.QUICK_S)
            for uri in (token.beat_uri, token.uri):
                storage.remove(uri)
            storage.remove_empty_folder(storage.join(self.output, "lease"))
        except LeaseError:
            return  # the files are no longer ours
        except Exception as failure:  # as in `_keep`
            logger.warning("the lease of %s could not be given back: %s", self.output, failure)

    def __enter__(self) -> Self:
        return self


def read_holder(output: str, now_s: float) -> Holder | None:
    """Return the job that holds the lease of OUTPUT, or None. A dead job holds it until another job takes over.

    Args:
        output: the OUTPUT folder.
        now_s: current time, in seconds since 1970.
    """
    numbers = _list_numbers(output, storage.QUICK_S)
    if not numbers:
        return None
    token = Token(output, numbers[-1], "")
    claim, beat = _parse(_read(token.uri)), _parse(_read(token.beat_uri))
    times = storage.list_times(storage.join(output, "lease"))
    names = [uri.rpartition("/")[2] for uri in (token.uri, token.beat_uri)]
    newest_s = max((times[name] for name in names if name in times), default=now_s)
    progress = beat.get("progress")
    return Holder(
        **{key: processes.as_word(claim.get(key, "")) for key in ("job", "host", "since")},
        pid=pid if isinstance(pid := claim.get("pid"), int) else 0,
        progress=progress if isinstance(progress, dict) else None,
        silent_s=max(0.0, now_s - newest_s),
        is_dead=processes.is_alive(claim) is False,
    )


def _list_numbers(output: str, patience_s: float) -> list[int]:
    names = storage.list_names(storage.join(output, "lease"), patience_s)
    return [int(found[1]) for name in names if (found := _CLAIM.fullmatch(name))]


def _read_claims(output: str) -> dict[int, bytes]:
    """Return the content of each claim by its number; a claim that vanishes meanwhile is left out.

    No job writes an empty claim, but a copy of the folder or a damaged disk may have one: it is of no known job.
    """
    claims = {}
    for number in _list_numbers(output, storage.QUICK_S):
        with contextlib.suppress(FileNotFoundError):
            claims[number] = storage.read_bytes(Token(output, number, "").uri)
    return claims


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return b""


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(parse_json(content, "the claim"))
    except (VlsmError, ValueError, TypeError):
        return {}


def _is_first(token: Token, dead: dict[int, bytes]) -> bool:
    """Return whether all other claims are those of the dead jobs; if not, withdraw the claim.

    Between a look at the dead claims and the new claim, other jobs may have come and gone, and one may be there.
    """
    others = {number: content for number, content in _read_claims(token.output).items() if number != token.number}
    if all(dead.get(number) == content for number, content in others.items()):
        return True
    storage.remove(token.uri)
    return False


def _remove_below(token: Token) -> None:
    """Remove the files of the jobs before this one."""
    folder = storage.join(token.output, "lease")
    for name in storage.list_names(folder):
        if name[:8].isdigit() and int(name[:8]) < token.number:
            storage.remove(storage.join(folder, name))


def _refusal(output: str, claim: dict[str, Any], patience_s: float) -> str:
    return (
        f"OUTPUT {output!r} is in use by {processes.describe(claim)}; wait until it has ended, stop it, or choose "
        f"another OUTPUT; if it dies, OUTPUT is free again after {patience_s:.0f} s at most"
    )


def _waiting(output: str, claim: dict[str, Any], patience_s: float) -> str:
    return (
        f"OUTPUT {output!r} was last in use by {processes.describe(claim)}; it is taken over if no sign of life comes "
        f"within {patience_s:.0f} s"
    )
