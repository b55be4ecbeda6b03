"""Metrics of a training run, one row per epoch, split and dataset. The best epoch and the curves follow from them."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from vlsm import storage
from vlsm.runs.tables import name_damage, open_table

METRICS_NAME = "metrics.parquet"
MEAN = "mean"  # over datasets: a large dataset has the same weight as a small one


@dataclass(frozen=True)
class Row:
    """Metrics of one dataset, or of the mean over datasets, in one split after one epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        step: optimiser steps since the start of the run.
        split: "train", "val" or "test".
        dataset: name of the dataset, or "mean" for the mean over all datasets but the external ones.
        loss, dice: means over the examples; Dice is measured at the model's image size.
        num_examples: number of scores in these means; an example that was used twice counts twice.
        lr: learning rate of the epoch's last step, the highest one of all parameter groups.
        seconds: duration of the epoch, training and validation together; for test, duration of the test.
        finished_at: time of the epoch's end, in seconds since 1970.
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


_TIES_KEY = b"vlsm.ties"  # in the metadata of metrics.parquet
_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_SCHEMA = pa.schema([pa.field(column.name, _TYPES[column.type], nullable=False) for column in fields(Row)])  # type: ignore[index]
_ROWS = TypeAdapter(list[Row])


def parse_rows(rows: Any) -> list[Row]:
    """Return the rows of a stored history, checked.

    Raises:
        ValueError: these are no such rows.
    """
    try:
        parsed = _ROWS.validate_python(rows)
    except ValidationError as error:
        detail = error.errors()[0]
        raise ValueError(f"row {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from error
    if wrong := [row for row in parsed if not (1 <= row.epoch < 1 << 31 and row.step >= 0 and row.num_examples >= 0)]:
        raise ValueError(f"there is no epoch {wrong[0].epoch} with {wrong[0].num_examples} examples")
    return parsed


def parse_ties(stated: object) -> Literal["other", "first"]:
    """Return how a stored history breaks ties; one of an earlier version does not state it."""
    return "other" if stated in ("other", b"other") else "first"


def read_history(output: str) -> "History":
    """Return the history in metrics.parquet, without rows before the end of the first epoch.

    Raises:
        ResultError: the file is damaged.
    """
    uri = storage.join(output, METRICS_NAME)
    if not storage.exists(uri):
        return History()
    table = open_table(uri, _SCHEMA)
    with name_damage(uri):
        return History(parse_rows(table.read().to_pylist()), parse_ties(table.metadata.get(_TIES_KEY)))


@dataclass
class History:
    """Rows in the order of the epochs.

    Attributes:
        rows: the metrics.
        ties: which of several epochs with the best monitored value is the best. "other": the one that is better by the
            other metric (the lower loss for Dice), then the first. "first": the first, as in runs of earlier versions,
            whose checkpoint was chosen so.
    """

    rows: list[Row] = field(default_factory=list)
    ties: Literal["other", "first"] = "other"

    def monitored(self, monitor: Literal["dice", "loss"]) -> list[float]:
        """Return the monitored value of each epoch: validation Dice or loss, the mean over datasets."""
        return [getattr(row, monitor) for row in self.rows if (row.split, row.dataset) == ("val", MEAN)]

    def best_epoch(self, monitor: Literal["dice", "loss"]) -> int:
        """Return the epoch with the best monitored value, counted from 1, or 0 if no epoch has ended.

        Equal values are common: a model that marks nothing has the same Dice in each of its first epochs.
        """
        scores = {"dice": np.array(self.monitored("dice")), "loss": -np.array(self.monitored("loss"))}
        if not len(scores[monitor]):
            return 0
        value, other = (np.where(np.isfinite(each), each, -np.inf) for each in (scores.pop(monitor), *scores.values()))
        equal = np.flatnonzero(value == value.max())
        return int(equal[0 if self.ties == "first" else other[equal].argmax()]) + 1

    def stale_epochs(self, monitor: Literal["dice", "loss"], min_delta: float) -> int:
        """Return the number of epochs since the last improvement of the monitored value by more than min_delta.

        Source: early stopping of PyTorch Lightning, which compares each epoch with the last one that counted as better.
        """
        sign, best, improved, epoch = 1 if monitor == "dice" else -1, -np.inf, 0, 0
        for epoch, value in enumerate(self.monitored(monitor), start=1):
            if sign * value - min_delta > best:
                best, improved = sign * value, epoch
        return epoch - improved

    def table(self) -> pa.Table:
        """Return the rows as a table with the columns of metrics.parquet; its metadata states `ties`."""
        schema = _SCHEMA.with_metadata({_TIES_KEY: self.ties})
        return pa.Table.from_pylist([asdict(row) for row in self.rows], schema=schema)


def summarize(
    scores: Sequence[tuple[str, float, float]],
    datasets: Sequence[str],
    common: dict[str, Any],
    external: Collection[str] = (),
) -> list[Row]:
    """Return one row per dataset, then one row for the mean over the datasets that were trained on.

    Args:
        scores: dataset, loss and Dice of each use of an example.
        datasets: names of the datasets, in the order of the rows; a dataset without scores gets no row.
        common: the fields that all rows share.
        external: names of datasets that were only tested, not trained on; the mean leaves them out.
    """
    rows = []
    for dataset in datasets:
        pairs = np.array([score[1:] for score in scores if score[0] == dataset])  # (N, 2): loss, Dice
        if len(pairs):
            loss, dice = pairs.mean(axis=0)
            rows.append(Row(dataset=dataset, loss=float(loss), dice=float(dice), num_examples=len(pairs), **common))
    if trained_rows := [row for row in rows if row.dataset not in external]:
        loss, dice = (float(np.mean([getattr(row, name) for row in trained_rows])) for name in ("loss", "dice"))
        num_examples = sum(row.num_examples for row in trained_rows)
        rows.append(Row(dataset=MEAN, loss=loss, dice=dice, num_examples=num_examples, **common))
    return rows


def describe_epoch(rows: list[Row], epochs: int, is_best: bool) -> str:
    """Return one log line that describes the rows of an epoch; `epochs` is the planned number of epochs."""
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
