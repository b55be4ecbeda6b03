"""Progress of a segment run: a live bar on a terminal, or a line every 10 s in a log."""

import datetime
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import ray
from tqdm import tqdm

from jobs import metrics
from jobs.command import logger
from vlsm.errors import ProbeError
from vlsm.events import event, shows_bars
from vlsm.shown import public_uri
from vlsm.words import count

_LOG_INTERVAL_S = 10.0
_LOOK_INTERVAL_S = 0.5
_PHASE_INTERVAL_S = 60.0  # after this time, and again, a log repeats what the run waits for
# what a run does until the first image is done: the last milestone that it has reached, and the words for a person
_PHASES = {
    "model": "the model is ready: segmenting the first images",
    "model's process": "loading the model",
    "Ray": "reading images, and starting the model's process",
}


class Progress:
    """Counts the images of a run; a thread prints the counts to stderr.

    Args:
        total: returns the number of images in the whole run, as far as they are known.
        done: number of images that earlier runs have finished.
        failed: number of failed images among these.
        board: the `jobs.crash_watch.CrashBoard` of the run.
        output: OUTPUT of the run; it labels the metrics.
        note: gets what the job does, as a phrase, whenever this changes.
    """

    def __init__(  # noqa: PLR0913 - all that one line of progress tells
        self,
        total: Callable[[], int],
        done: int,
        failed: int,
        board: Any,
        output: str,
        note: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._output, self._note = output, note
        self.total, self.done, self.failed = total, done, failed
        self._done_before, self._is_first_shard = done, True
        self._reasons = Counter[str]()  # of the images that failed in this job
        self._num_shown = 0  # messages of the board
        self._board = board
        self._shown: tuple[int, int, int] | None = None  # done, total and failed of the last line
        self._phase: str | None = ""  # None: images are counted
        self._phase_s = self._phase_said_s = time.monotonic()
        self._refusal: str | None = None
        self._model_ready_s, self._shown_s = time.time(), 0.0
        self._stop = threading.Event()
        self._bar = (
            tqdm(total=total(), initial=done, unit="image", unit_scale=False, smoothing=0.05, dynamic_ncols=True)
            if _has_columns()
            else None
        )
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._update_metrics()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show_messages()
        if self._shown != (self.done, self.total(), self.failed):  # else this line is there already
            self._show(self.done)
        if self._bar is not None:
            self._bar.close()

    def finish_shard(self, shard: int, num_images: int, failed: Mapping[str, int]) -> None:
        """Count the images of a shard whose part file is written, and the failed ones of them by reason.

        Raises:
            ProbeError: the device of an actor, perhaps of another one, computes otherwise than it should.
        """
        if self._refusal is not None:
            raise ProbeError(self._refusal)
        if self._is_first_shard:
            self._is_first_shard = False
            logger.info("%s", ray.get(self._board.describe.remote()))
            self._show_messages()
        self._board.finish.remote(shard)
        self.done += num_images
        self.failed += sum(failed.values())
        self._reasons.update(failed)
        self._update_metrics()

    def _show_messages(self) -> None:
        """Log what the actors have logged since the last call: their batch size, and models that cannot be compiled."""
        try:
            messages = ray.get(self._board.messages.remote(), timeout=5)
        except ray.exceptions.RayError:
            return  # a slow or ended cluster
        for level, message in messages[self._num_shown :]:
            logger.log(level, "%s", message)
        self._num_shown = len(messages)

    def _update_metrics(self) -> None:
        values = {"planned": self.total(), "done": self.done, "failed": self.failed}
        for name, value in values.items():
            metrics.show(f"vlsm_{name}_images", value, output=public_uri(self._output))

    def _tick(self) -> None:
        while not self._stop.wait(_LOOK_INTERVAL_S):
            try:
                partial, milestones, self._refusal = ray.get(self._board.look.remote(), timeout=5)
            except ray.exceptions.RayError:
                partial, milestones = 0, {}  # a slow or ended cluster: show only finished shards
            done = min(self.total(), self.done + partial)
            if done == self._done_before:
                self._show_phase(milestones)
                continue
            self._begin_counting(milestones)
            self._note(f"{done:,} of {count(self.total(), 'image')} done")
            if self._bar is not None or time.monotonic() - self._shown_s >= _LOG_INTERVAL_S:
                self._show(done)

    def _show_phase(self, milestones: Mapping[str, float]) -> None:
        """Say what the run does before its first image is done, when this changes."""
        phase = next((words for name, words in _PHASES.items() if name in milestones), self._phase)
        now_s = time.monotonic()
        if phase != self._phase:
            self._phase, self._phase_s, self._phase_said_s = phase, now_s, now_s
            self._note(phase or "")
            if self._bar is not None:
                self._bar.set_description_str(phase)
            else:
                logger.info("%s", phase, extra=event("phase", phase=phase))
        elif phase and self._bar is None and now_s - self._phase_said_s >= _PHASE_INTERVAL_S:
            self._phase_said_s = now_s
            logger.info("%s, for %d s", phase, now_s - self._phase_s)

    def _begin_counting(self, milestones: Mapping[str, float]) -> None:
        """Measure the rate from the time at which the model was ready: a start says nothing about the time left."""
        if self._phase is None:
            return
        self._phase = None
        self._model_ready_s = milestones.get("model", self._model_ready_s)
        if self._bar is not None:
            self._bar.set_description_str("segmenting")
            self._bar.unpause()  # tqdm measures its rate from here

    def _show(self, done: int) -> None:
        self._shown_s, self._shown = time.monotonic(), (done, self.total(), self.failed)
        if self._bar is not None:
            self._bar.n, self._bar.total = done, self.total()
            self._bar.set_postfix(failed=self.failed)
            return
        rate = (done - self._done_before) / max(1e-3, time.time() - self._model_ready_s)
        total = self.total()
        left_s = round((total - done) / rate) if rate else None
        left = "time left unknown" if left_s is None else f"{datetime.timedelta(seconds=left_s)} left"
        fields = {"done": done, "total": total, "unit": "image", "failed": self.failed, "left_s": left_s}
        fields |= {"failed_by_reason": dict(self._reasons), "per_s": round(rate, 3)}
        logger.info(
            "%s of %s (%.1f %%), %.1f images/s, %s failed, %s",
            *(f"{done:,}", count(total, "image"), 100 * done / max(1, total), rate, f"{self.failed:,}", left),
            extra=event("progress", **fields),
        )


def _has_columns() -> bool:
    """Return whether stderr is a terminal with columns for a bar. Terminals of some containers have 0 columns."""
    return shows_bars() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
