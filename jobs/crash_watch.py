"""Finds the images that kill the processes of a segment run, and holds the run's progress and milestones.

If a process dies, Ray repeats its shard, without a limit. An image may be the cause. The second attempt is therefore
careful: it takes one image at a time, and notes each image on the board before the work on it starts. An image that was
under way at two deaths is skipped and recorded as failed. A death with another cause, such as a lost node, rarely hits
the same image twice. A shard whose processes die too often outside any image ends the run.
"""

import contextlib
import faulthandler
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from jobs import metrics
from vlsm.errors import VlsmError

_DEATHS_TO_BLAME = 2  # an image that was under way at so many deaths is skipped
_NOTE_INTERVAL_S = 0.5  # between notes of an attempt: as often as `Progress` looks at the board, which all GPUs share
_MOST_MESSAGES = 100  # that are kept for the driver
_MOST_UNEXPLAINED = 10  # deaths of one stage on one shard outside any image; more are not accidents


def start_board(kind: type, milestones: Mapping[str, float]) -> Any:
    """Start a board as an actor on this node, and return its handle.

    The loss of another node does not end an actor on this node.

    Args:
        kind: the class of the board.
        milestones: the milestones that the run has already reached, as for `Milestones`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(kind).options(**options).remote(milestones)


class Milestones:
    """The times at which a run reaches its milestones for the first time, in seconds since 1970.

    Args:
        milestones: times of the milestones that are already reached; the earliest is the start.
    """

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        self._milestones = dict(milestones or {})

    def reach(self, name: str, time_s: float) -> None:
        """Record the time of a milestone; later calls for the same milestone change nothing."""
        self._milestones.setdefault(name, time_s)

    def describe(self) -> str:
        """Return a log line with the seconds from the start to each milestone."""
        (_, start_s), *reached = sorted(self._milestones.items(), key=lambda item: item[1])
        return f"seconds from the start: {', '.join(f'{name} {time_s - start_s:.1f}' for name, time_s in reached)}"


class EarlierAttempts(NamedTuple):
    """Earlier attempts of a stage on a shard that ended with the death of their process.

    Attributes:
        num_deaths: number of all such attempts.
        num_unexplained: number of those that died outside any image.
        blamed: positions in the shard of the images to skip.
    """

    num_deaths: int
    num_unexplained: int
    blamed: list[int]


@dataclass
class _Attempts:
    """The attempts of one stage on one shard.

    Attributes:
        count: number of attempts that started.
        under_way: position of the image that the current attempt works on, or None.
        deaths: number of deaths by position of the image that was under way.
    """

    count: int = 0
    under_way: int | None = None
    deaths: Counter[int] = field(default_factory=Counter)


class CrashBoard(Milestones):
    """The shared state of a segment run. Tasks and actors may die; the board survives them."""

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        super().__init__(milestones)
        self._images: dict[int, int] = {}
        self._attempts: dict[tuple[str, int], _Attempts] = {}
        self._errors: dict[tuple[str, int], str] = {}
        self._messages: dict[tuple[int, str], None] = {}
        self._refusal: str | None = None

    def tell(self, level: int, message: str) -> None:
        """Keep a log message of an actor for the driver; the same message of several actors counts once."""
        if len(self._messages) < _MOST_MESSAGES:
            self._messages.setdefault((level, message))

    def messages(self) -> list[tuple[int, str]]:
        """Return the level and text of all messages so far."""
        return list(self._messages)

    def refuse(self, reason: str) -> None:
        """Keep the reason why an actor must not segment; the driver ends the run with it."""
        self._refusal = self._refusal or reason

    def refusal(self) -> str | None:
        """Return the first reason of an actor that must not segment."""
        return self._refusal

    def note(self, shard: int, num_images: int) -> None:
        """Record the number of done images of an unfinished shard; a retry overwrites the earlier number."""
        self.reach("first image", time.time())
        self._images[shard] = num_images

    def finish(self, shard: int) -> None:
        """Forget the done images of a shard, because its part file is written and `Progress` counts them."""
        self._images.pop(shard, None)

    def look(self) -> tuple[int, dict[str, float], str | None]:
        """Return the number of done images in shards that are not written yet, the milestones, and `refusal`."""
        return sum(self._images.values()), self._milestones, self._refusal

    def begin(self, stage: str, shard: int) -> EarlierAttempts:
        """Start an attempt and return its earlier deaths. An earlier attempt that never called `end` has died."""
        attempts = self._attempts.setdefault((stage, shard), _Attempts())
        if attempts.under_way is not None:
            attempts.deaths[attempts.under_way] += 1
            attempts.under_way = None
        attempts.count += 1
        blamed = [image for image, deaths in attempts.deaths.items() if deaths >= _DEATHS_TO_BLAME]
        num_deaths = attempts.count - 1
        return EarlierAttempts(num_deaths, num_deaths - attempts.deaths.total(), blamed)

    def enter(self, stage: str, shard: int, image: int | None) -> None:
        """Record the position of the image that is under way, or None if no image is."""
        self._attempts.setdefault((stage, shard), _Attempts()).under_way = image

    def end(self, stage: str, shard: int, error: str | None) -> None:
        """End an attempt whose process is still alive; `error` is its reason if it has failed."""
        self._attempts.pop((stage, shard), None)
        self._errors.pop((stage, shard), None)  # a retry has replaced the failed attempt: its error is obsolete
        if error:
            self._errors[stage, shard] = error

    def last_error(self) -> str | None:
        """Return the reason of the last failed attempt. Ray's own message is long and hides the reason."""
        return next(reversed(self._errors.values()), None)


class Watch:
    """One attempt of one stage on one shard, recorded on the board.

    Attributes:
        is_careful: whether an earlier attempt died. The images must then be done one at a time, each within `image`.
        blamed: positions of the images to skip, because they were under way at repeated deaths.

    Raises:
        VlsmError: too many attempts on this shard died outside any image.
    """

    def __init__(self, board: Any, stage: str, shard: int, image_timeout_s: float) -> None:
        self._board, self._stage, self._shard, self._started_s = board, stage, shard, time.monotonic()
        self._image_timeout_s, self._noted_s = image_timeout_s, -math.inf
        earlier: EarlierAttempts = self._call_board("begin")
        if earlier.num_unexplained > _MOST_UNEXPLAINED:
            message = (
                f"the {stage} process died {earlier.num_unexplained} times on shard {shard} outside any image; "
                f"at most {_MOST_UNEXPLAINED} such deaths are tolerated"
            )
            self._call_board("end", message)
            raise VlsmError(message)
        self.is_careful, self.blamed = earlier.num_deaths > 0, frozenset(earlier.blamed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        metrics.observe("vlsm_stage_seconds", time.monotonic() - self._started_s, stage=self._stage)
        # only an Exception is a reason: Ray cancels the other tasks of a failed run with interrupts
        failed = isinstance(error, Exception)
        self._call_board("end", f"{type(error).__name__}: {' '.join(str(error).split())}" if failed else None)

    @contextlib.contextmanager
    def image(self, position: int) -> Iterator[None]:
        """Enclose the work on one image; its position is in the shard."""
        if self.is_careful:  # the board must know the image before the work can kill this process
            self._call_board("enter", position)
        try:
            yield
        finally:  # after an error this process is still alive, so the image has not killed it
            if self.is_careful:
                self._call_board("enter", None)

    def note(self, num_images: int) -> None:
        """Tell the board the number of done images of the shard, or nothing if it was told a moment ago."""
        now_s = time.monotonic()
        if now_s - self._noted_s >= _NOTE_INTERVAL_S:
            self._noted_s = now_s
            self._board.note.remote(self._shard, num_images)

    @contextlib.contextmanager
    def time_limit(self) -> Iterator[None]:
        """Enclose the decoding of one image; end this process if it takes longer than `run.image_timeout_s`.

        A decoder that hangs in C code stops only with its process, by a signal that no Python code handles. The next
        attempt on the shard is careful. `faulthandler.dump_traceback_later` would start a thread for each image.
        """
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)  # type: ignore[arg-type]
        signal.setitimer(signal.ITIMER_REAL, self._image_timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _call_board(self, method: str, *args: Any) -> Any:
        """Call a method of the board for this stage and shard, and wait for its result."""
        import ray

        return ray.get(getattr(self._board, method).remote(self._stage, self._shard, *args))
