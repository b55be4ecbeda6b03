"""The time left of a job; the times of a training: seconds per epoch, and examples per second."""

import datetime
import time
from collections import Counter
from typing import Any

PROGRESS_S = 10.0  # between two progress lines


def seconds_left(done: float, total: float, seconds: float) -> int | None:
    """Return the seconds left of work of which a part is done after some seconds; None while nothing is known."""
    return round(max(0.0, total - done) / done * seconds) if done and seconds else None


def describe_left(seconds: int | None) -> str:
    """Return the words for the time left, such as "0:04:10 left"."""
    return "time left unknown" if seconds is None else f"{datetime.timedelta(seconds=seconds)} left"


class TrainClock:
    """Counts examples, and makes a progress line at most every 10 s.

    The time left is for all epochs, as if none is left out by an early stop. Training and validation are measured
    separately; until the first validation, its examples are taken to need as long as those of training.

    Args:
        epochs: planned number of epochs.
        num_steps: number of optimiser steps of an epoch.
        num_train: number of training examples of an epoch.
        num_val: number of validation examples.
    """

    def __init__(self, epochs: int, num_steps: int, num_train: int, num_val: int) -> None:
        self._epochs, self._num_steps, self._num_train, self._num_val = epochs, num_steps, num_train, num_val
        self._epoch_s = self._said_s = time.monotonic()
        self._counted_s: float | None = None
        self._num_since_line = self._num_validated = 0
        self._seconds: Counter[str] = Counter()
        self._examples: Counter[str] = Counter()

    def count(self, split: str, num_examples: int) -> None:
        """Count the examples of a batch. The first one only starts the clock: it has waited for its data."""
        now_s = time.monotonic()
        if self._counted_s is not None:
            self._seconds[split] += now_s - self._counted_s  # type: ignore[assignment]
            self._examples[split] += num_examples
        self._counted_s = now_s
        self._num_since_line += num_examples
        self._num_validated += num_examples if split == "val" else 0

    def line(self, epoch: int, step: int, loss: float | None = None) -> tuple[str, dict[str, Any]] | None:
        """Return a progress line and the fields of its event, or None within 10 s after the last one.

        Args:
            epoch: the current epoch, from 0.
            step: the current step of training, from 0; the number of steps while the epoch is validated.
            loss: loss of the last batch of training.
        """
        elapsed_s = time.monotonic() - self._said_s
        if elapsed_s < PROGRESS_S:
            return None
        rate, self._num_since_line = self._num_since_line / elapsed_s, 0
        self._said_s = time.monotonic()
        fields: dict[str, Any] = {"epoch": epoch + 1, "epochs": self._epochs, "steps": self._num_steps}
        if loss is not None:
            what = f"step {step + 1} of {self._num_steps}, loss {loss:.4f}"
            fields |= {"step": step + 1, "loss": loss}
        else:
            validated = min(self._num_validated, self._num_val)
            what = f"validating, {validated:,} of {self._num_val:,}"
            fields |= {"step": step, "validated": validated, "to_validate": self._num_val}
        left_s = self._left_s(epoch, step)
        line = f"epoch {epoch + 1} of {self._epochs}, {what}, {rate:.1f} examples/s, {describe_left(left_s)}"
        return line, fields | {"per_s": round(rate, 3), "left_s": left_s}

    def _left_s(self, epoch: int, step: int) -> int | None:
        measured = {split: self._seconds[split] / count for split, count in self._examples.items() if count}
        if not measured:
            return None
        train_s = measured.get("train", measured.get("val", 0.0))
        val_s = measured.get("val", train_s)
        epochs = self._epochs - epoch - step / max(1, self._num_steps)
        left_s = epochs * self._num_train * train_s
        left_s += max(0, (self._epochs - epoch) * self._num_val - self._num_validated) * val_s
        return round(left_s)

    def end_epoch(self) -> dict[str, float]:
        """Return the time fields of the epoch's rows, and start the next epoch."""
        seconds = time.monotonic() - self._epoch_s
        self._epoch_s, self._num_validated = time.monotonic(), 0
        return {"seconds": round(seconds, 3), "finished_at": time.time()}
