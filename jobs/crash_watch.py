"""What tasks and actors tell each other while a run lasts: how far they are, and what they were doing when one died.

Ray does a shard again whose process has died, for ever. If an image has killed it, the second try goes carefully, one
image at a time, each noted before it is begun; an image that was under way at two such deaths is left out and recorded
as failed. A death that has another cause, such as a lost node, hardly strikes the same image twice; a shard that goes
on killing without one ends the run.
"""

import contextlib
import faulthandler
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from jobs import metrics
from vlsm.errors import VlsmError

_DEATHS_TO_BLAME = 2
_MOST_UNEXPLAINED = 10  # deaths at one shard in one stage: more are no accidents


@dataclass
class _Tries:
    """Of one stage's work on one shard."""

    count: int = 0
    under_way: int | None = None
    deaths: Counter[int] = field(default_factory=Counter)


def start_board(kind: type, milestones: Mapping[str, float]) -> Any:
    """Start a board as an actor, with the milestones that the run has reached already.

    It lives where this process does, so that no other node's loss ends it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(kind).options(**options).remote(milestones)


class Milestones:
    """The times at which a run reaches its milestones for the first time, in seconds since 1970.

    Args:
        milestones: those that are reached already; the first is the start.
    """

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        self._milestones = dict(milestones or {})

    def reach(self, name: str, time_s: float) -> None:
        """A milestone is reached; the first time counts."""
        self._milestones.setdefault(name, time_s)

    def describe(self) -> str:
        """Each milestone with the seconds from the start to it."""
        (_, start_s), *reached = sorted(self._milestones.items(), key=lambda item: item[1])
        return f"seconds from the start: {', '.join(f'{name} {time_s - start_s:.1f}' for name, time_s in reached)}"


class Board(Milestones):
    """The one place that outlives tasks and actors."""

    def __init__(self, milestones: Mapping[str, float] | None = None) -> None:
        super().__init__(milestones)
        self._images: dict[int, int] = {}
        self._tries: dict[tuple[str, int], _Tries] = {}
        self._errors: dict[tuple[str, int], str] = {}

    def note(self, shard: int, num_images: int) -> None:
        """So many images of an unfinished shard are done; a retry overwrites its first try's note."""
        self.reach("first image", time.time())
        self._images[shard] = num_images

    def finish(self, shard: int) -> None:
        """A shard is written and counts as a whole."""
        self._images.pop(shard, None)

    def total(self) -> int:
        """Images done in shards that are not written yet."""
        return sum(self._images.values())

    def begin(self, stage: str, shard: int) -> tuple[int, int, list[int]]:
        """A try begins: how many there were before that nobody ended, of them at no image, and whom to blame."""
        tries = self._tries.setdefault((stage, shard), _Tries())
        if tries.under_way is not None:
            tries.deaths[tries.under_way] += 1
            tries.under_way = None
        tries.count += 1
        blamed = [image for image, deaths in tries.deaths.items() if deaths >= _DEATHS_TO_BLAME]
        return tries.count - 1, tries.count - 1 - tries.deaths.total(), blamed

    def enter(self, stage: str, shard: int, image: int | None) -> None:
        """An image is under way, or none is."""
        self._tries.setdefault((stage, shard), _Tries()).under_way = image

    def end(self, stage: str, shard: int, error: str | None) -> None:
        """A try has ended otherwise than by death, and why where it has failed."""
        self._tries.pop((stage, shard), None)
        self._errors.pop((stage, shard), None)  # what was got over explains nothing
        if error:
            self._errors[stage, shard] = error

    def last_error(self) -> str | None:
        """Why the last try that failed has failed: what Ray says of it is long, and the reason lost in it."""
        return next(reversed(self._errors.values()), None)


class Watch:
    """One try of one stage at one shard, noted on the board.

    Attributes:
        is_careful: whether an earlier try has died, so that images are to be done one at a time, each within `image`.
        blamed: images that are to be left out, since they have killed the process at each try.
    """

    def __init__(self, board: Any, stage: str, shard: int, image_timeout_s: float) -> None:
        self._board, self._place, self._started_s = board, (stage, shard), time.monotonic()
        self._image_timeout_s = image_timeout_s
        deaths, unexplained, blamed = self._ask("begin")
        if unexplained > _MOST_UNEXPLAINED:
            message = f"the process of {stage} died {unexplained} times at shard {shard}, and at no image of it"
            self._ask("end", message)
            raise VlsmError(message)
        self.is_careful, self.blamed = deaths > 0, frozenset(blamed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        metrics.observe("vlsm_stage_seconds", time.monotonic() - self._started_s, stage=self._place[0])
        # only an Exception is a reason; Ray cancels the other tasks of a failed run by interrupts
        failed = isinstance(error, Exception)
        self._ask("end", f"{type(error).__name__}: {' '.join(str(error).split())}" if failed else None)

    @contextlib.contextmanager
    def image(self, position: int) -> Iterator[None]:
        """Around the work on one image."""
        if self.is_careful:  # the note must have arrived before the work can kill
            self._ask("enter", position)
        try:
            yield
        finally:  # an error is no death
            if self.is_careful:
                self._ask("enter", None)

    @contextlib.contextmanager
    def time_limit(self) -> Iterator[None]:
        """Around the decoding of one image: end this process if it takes longer than `run.image_timeout_s`.

        A decoder that hangs in C code can only be stopped with its process, by a signal that no Python code handles.
        The next try of the shard is careful. A timer of faulthandler's own would start a thread for each image.
        """
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
        signal.setitimer(signal.ITIMER_REAL, self._image_timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ask(self, what: str, *words: Any) -> Any:
        import ray

        return ray.get(getattr(self._board, what).remote(*self._place, *words))
