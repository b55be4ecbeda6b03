"""What a training run has shown so far, a row per epoch, split and dataset: judgements and pictures come from it."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa

MEAN = "mean"  # over datasets: each counts the same, however large


@dataclass(frozen=True)
class Row:
    """Of an epoch, a split and a dataset, or of their mean.

    Attributes:
        epoch: from 1.
        step: optimiser steps of the run until then.
        split: "train", "val" or "test".
        dataset: its name, or "mean" over the datasets that are learned from.
        loss, dice: means over the examples; Dice of the masks at the model's size.
        num_examples: how many uses of examples they are means of.
        lr: the highest learning rate of the epoch's last step.
        seconds: since the epoch began, training and evaluation.
        finished_at: seconds since 1970.
    """

    epoch: int
    step: int
    split: str
    dataset: str
    loss: float
    dice: float
    num_examples: int
    lr: float
    seconds: float
    finished_at: float


@dataclass
class History:
    """Rows in the order of their epochs."""

    rows: list[Row] = field(default_factory=list)

    def monitored(self, monitor: Literal["dice", "loss"]) -> list[float]:
        """The value that judges each epoch: of validation, the mean over datasets."""
        return [getattr(row, monitor) for row in self.rows if (row.split, row.dataset) == ("val", MEAN)]

    def best_epoch(self, monitor: Literal["dice", "loss"]) -> int:
        """The first epoch with the best value, from 1; 0 before there is one."""
        values = np.array(self.monitored(monitor))
        if not len(values):
            return 0
        values = values if monitor == "dice" else -values
        return int(np.where(np.isfinite(values), values, -np.inf).argmax()) + 1

    def table(self) -> pa.Table:
        """The rows as metrics.parquet holds them."""
        types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
        schema = pa.schema([pa.field(column.name, types[column.type], nullable=False) for column in fields(Row)])  # type: ignore[index]
        return pa.Table.from_pylist([asdict(row) for row in self.rows], schema=schema)


def summarize(
    scores: Sequence[tuple[str, float, float]],
    datasets: Sequence[str],
    common: dict[str, Any],
    external: Collection[str] = (),
) -> list[Row]:
    """A row per dataset, and one for the mean of those that were learned from.

    Args:
        scores: dataset, loss and Dice of each example.
        datasets: their names, in order; one without a score is passed over.
        common: the other fields of the rows.
        external: names of datasets that nothing was learned from.
    """
    rows = []
    for dataset in datasets:
        own = np.array([score[1:] for score in scores if score[0] == dataset])
        if len(own):
            loss, dice = own.mean(axis=0)
            rows.append(Row(dataset=dataset, loss=float(loss), dice=float(dice), num_examples=len(own), **common))
    if own_rows := [row for row in rows if row.dataset not in external]:
        loss, dice = (float(np.mean([getattr(row, name) for row in own_rows])) for name in ("loss", "dice"))
        num_examples = sum(row.num_examples for row in own_rows)
        rows.append(Row(dataset=MEAN, loss=loss, dice=dice, num_examples=num_examples, **common))
    return rows


def describe_epoch(rows: list[Row], epochs: int, is_best: bool) -> str:
    """An epoch's rows, of so many epochs, in a line for the log."""
    train = next(row for row in rows if (row.split, row.dataset) == ("train", MEAN))
    val = [row for row in rows if row.split == "val"]
    shown = val if len(val) > 2 else val[:1]
    dice = ", ".join(f"{row.dataset} {row.dice:.3f}" for row in shown)
    loss = next(row.loss for row in val if row.dataset == MEAN)
    best = ", the best so far" if is_best else ""
    return (
        f"epoch {train.epoch} of {epochs}: loss {train.loss:.4f}, val loss {loss:.4f}, val Dice {dice}{best} "
        f"({train.seconds:.1f} s)"
    )
