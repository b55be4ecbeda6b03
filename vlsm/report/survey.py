"""One pass over the rows of a run, however many: counts, distributions, a sample, and what lies at the ends.

Only columns without masks are read here, and only a bounded number of rows is kept.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

METRICS = {"dice": "Dice", "confidence": "Confidence", "agreement": "Agreement", "area_fraction": "Area fraction"}
KEY = ("dataset", "split", "system", "prompt_name", "prompt", "image_id", "mask_uri")  # of a row within its run
FILE = "__filename"  # pyarrow's own column: the file that a row was read from
_PLACES = ("image_id", "image_uri", "selector", "mask_uri")
_WORDS = ("dataset", "split", "system", "prompt", "prompt_name", "prompt_class", "model", "status", "error")
ROW = pa.schema(
    [pa.field(name, pa.string()) for name in (*_PLACES, *_WORDS, FILE)]
    + [pa.field(name, pa.int64()) for name in ("height", "width")]
    + [pa.field(name, pa.float64()) for name in (*METRICS, "priority")]
)
_BATCH_ROWS = 1 << 14
_FINE = 4000  # bins in which medians are looked up: they are right to 0.00025
_MAX_VALUES = 1000  # distinct values of a column that are counted one by one; prompts may be as many as images
_MAX_STRATA, _PER_STRATUM, _CANDIDATES = 200, 240, 512
_OTHERS = "others"


def scan(
    dataset: ds.Dataset,
    condition: pc.Expression | None = None,
    computed: dict[str, pc.Expression] | None = None,
) -> Iterator[pa.Table]:
    """The rows of a dataset in its order, in tables of some thousand rows with the columns of ROW.

    A column that the dataset lacks is null; so is a number that is not finite. `priority` is drawn for each row from
    its place alone, so that samples are the same each time. `computed` has columns that the
    dataset lacks.
    """
    known = set(dataset.schema.names)
    names = [name for name in ROW.names if name in known]
    # pyarrow gives a file's name beside plain columns only
    columns = {name: pc.field(name) for name in names} | computed if computed else [*names, FILE]
    batches: list[pa.RecordBatch] = []
    generator, num_rows = np.random.default_rng(0), 0
    for batch in dataset.to_batches(columns=columns, filter=condition, batch_size=_BATCH_ROWS):
        batches.append(batch)
        num_rows += len(batch)
        if num_rows >= _BATCH_ROWS:
            yield _as_rows(pa.Table.from_batches(batches), generator)
            batches, num_rows = [], 0
    if num_rows:
        yield _as_rows(pa.Table.from_batches(batches), generator)


def _as_rows(table: pa.Table, generator: np.random.Generator) -> pa.Table:
    columns = []
    for column in ROW:
        if column.name == "priority":
            values = pa.array(generator.random(len(table)))
        elif column.name not in table.column_names:
            values = pa.nulls(len(table), column.type)
        else:
            values = table[column.name].cast(column.type)
            if pa.types.is_floating(column.type):
                values = pc.if_else(pc.is_finite(values), values, None)
        columns.append(values)
    # a record that no run knows has no id
    names = pc.replace_substring_regex(columns[ROW.get_field_index("image_uri")], ".*/", "")
    columns[0] = pc.coalesce(columns[0], names)
    return pa.table(columns, schema=ROW)


@dataclass
class Distribution:
    """Of values in [0, 1]; the mean is exact, the median that of bins so fine that nobody sees the difference."""

    fine: np.ndarray = field(default_factory=lambda: np.zeros(_FINE, np.int64))
    total: float = 0.0
    highest: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count more values."""
        places = np.clip((values * _FINE).astype(np.int64), 0, _FINE - 1)
        self.fine += np.bincount(places, minlength=_FINE)
        self.total += float(values.sum())
        self.highest = max(self.highest, float(values.max(initial=0.0)))

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.fine.sum())

    @property
    def mean(self) -> float:
        """Of all values; there must be one."""
        return self.total / self.count

    @property
    def median(self) -> float:
        """Of all values; there must be one."""
        middle = [(self.count + 1) // 2, self.count // 2 + 1]  # one and the same where there is an odd number
        return float(np.mean(np.searchsorted(self.fine.cumsum(), middle)) + 0.5) / _FINE

    def bins(self, limit: float, number: int) -> np.ndarray:
        """How many values there are in each of so many equal parts of [0, limit]."""
        return self.fine[: round(_FINE * limit)].reshape(number, -1).sum(axis=1)


class Extremes:
    """The rows whose value of a column is the lowest, the highest, or nearest to another one.

    Args:
        column: of ROW.
        is_highest: whether high values count.
        around: the value to be near to, instead of low or high.
    """

    def __init__(self, column: str, is_highest: bool = False, around: float | None = None) -> None:
        self._column, self._is_highest, self._around = column, is_highest, around
        self._kept = ROW.append(pa.field("distance", pa.float64())).empty_table()

    def add(self, table: pa.Table) -> None:
        """Look at more rows; those without a value are passed over."""
        table = table.filter(pc.and_(pc.is_valid(table[self._column]), pc.equal(table["status"], "ok")))
        values = table[self._column]
        distance = values if self._around is None else pc.abs(pc.subtract(values, self._around))
        table = table.append_column("distance", pc.negate(distance) if self._is_highest else distance)
        merged = pa.concat_tables([self._kept, table])
        keys = [(name, "ascending") for name in ("distance", "image_id", "priority")]
        self._kept = merged.take(pc.select_k_unstable(merged, min(_CANDIDATES, len(merged)), keys)).combine_chunks()

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The first of them, at most one of an image."""
        first: dict[tuple[Any, Any], dict[str, Any]] = {}
        for row in self._kept.to_pylist():
            first.setdefault((row["dataset"], row["image_id"]), row)
        return list(first.values())[:number]


class Sample:
    """Rows drawn from each kind of row: of each dataset, system, prompt, status and range of the first metric."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._strata: dict[str, int] = {}
        self._kept = ROW.append(pa.field("stratum", pa.int64())).empty_table()

    def add(self, table: pa.Table) -> None:
        """Look at more rows."""
        band = pc.cast(pc.floor(pc.multiply(pc.fill_null(table[self._metric], -1.0), 4.999)), pa.string())
        # prompts of evaluations have names; those of archives may be as many as images, and then share one stratum
        names = pc.coalesce(table["prompt_name"], table["prompt"])
        parts = [pc.fill_null(column, "") for column in (table["dataset"], table["split"], table["system"], names)]
        texts = pc.binary_join_element_wise(*parts, table["status"], band, "\0")
        for text in pc.unique(texts).to_pylist():
            if len(self._strata) < _MAX_STRATA:
                self._strata.setdefault(text, len(self._strata))
        places = pc.fill_null(pc.index_in(texts, pa.array(list(self._strata), pa.string())), _MAX_STRATA)
        merged = pa.concat_tables([self._kept, table.append_column("stratum", places.cast(pa.int64()))])
        merged = merged.sort_by([("stratum", "ascending"), ("priority", "ascending")])
        numbers = merged["stratum"].to_numpy()
        rank = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        self._kept = merged.filter(pa.array(rank < _PER_STRATUM)).combine_chunks()

    def rows(self, number: int) -> list[dict[str, Any]]:
        """So many rows, as evenly from all strata as they allow: one of each, then another of each."""
        numbers = self._kept["stratum"].to_numpy()
        rank = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        order = np.lexsort((self._kept["priority"].to_numpy(), rank))[:number]
        return self._kept.take(pa.array(order)).to_pylist()


@dataclass
class Survey:
    """What all rows together say.

    Attributes:
        metric: that the sample is spread over.
        group: the column whose values have distributions of their own.
        num_rows: all of them.
        images: of each status, counting rows that follow each other and are of one image as one.
        values: of some columns, how many rows have each value.
        distributions: by metric and value of the group.
        reasons: why rows failed, how many, and the first few image_ids of each.
    """

    metric: str
    group: str
    num_rows: int = 0
    images: Counter[str] = field(default_factory=Counter)
    values: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    distributions: dict[tuple[str, str], Distribution] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _last_id: str | None = None

    def __post_init__(self) -> None:
        self.sample = Sample(self.metric)

    def total(self, metric: str) -> Distribution | None:
        """The distribution of a metric over all groups; None where no row has it."""
        own = [found for (name, _), found in self.distributions.items() if name == metric]
        if not own:
            return None
        fine, total = np.sum([each.fine for each in own], axis=0), sum(each.total for each in own)
        return Distribution(fine, total, max(each.highest for each in own))

    def groups(self, metric: str, number: int) -> list[tuple[str, Distribution]]:
        """The distributions of a metric in the groups with the most values, as many as asked for."""
        own = [(name, found) for (key, name), found in self.distributions.items() if key == metric]
        return sorted(sorted(own, key=lambda pair: -pair[1].count)[:number], key=lambda pair: pair[0])

    def add(self, table: pa.Table) -> None:
        """Look at more rows."""
        self.num_rows += len(table)
        self._count_images(table)
        for name in ("status", "dataset", "system", "split", "prompt", "model"):
            counter = self.values[name]
            for item in pc.value_counts(table[name].drop_null()).to_pylist():
                known = item["values"] in counter or len(counter) < _MAX_VALUES
                counter[item["values"] if known else _OTHERS] += item["counts"]
        self._measure(table)
        self._count_failures(table.filter(pc.equal(table["status"], "failed")))
        self.sample.add(table)

    def _count_images(self, table: pa.Table) -> None:
        ids = table["image_id"].combine_chunks()
        is_first = np.ones(len(ids), bool)
        is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
        is_first[0] = ids[0].as_py() != self._last_id
        self._last_id = ids[-1].as_py()
        for item in pc.value_counts(table["status"].filter(pa.array(is_first))).to_pylist():
            self.images[item["values"]] += item["counts"]

    def _measure(self, table: pa.Table) -> None:
        table = table.filter(pc.equal(table["status"], "ok"))
        groups = pc.fill_null(table[self.group], "")
        for metric in METRICS:
            is_there = pc.is_valid(table[metric])
            values, names = table[metric].filter(is_there), groups.filter(is_there)
            for name in pc.unique(names).to_pylist():
                known = (metric, name) in self.distributions or len(self.distributions) < 4 * _MAX_STRATA
                place = self.distributions.setdefault((metric, name if known else _OTHERS), Distribution())
                place.add(values.filter(pc.equal(names, name)).to_numpy())

    def _count_failures(self, failed: pa.Table) -> None:
        for row in failed.select(["image_id", "image_uri", "error"]).to_pylist():
            reason = (row["error"] or "no reason given").partition(":")[0][:60]
            reason = reason if reason in self.reasons or len(self.reasons) < 50 else _OTHERS
            self.reasons[reason] += 1
            if len(examples := self.examples.setdefault(reason, [])) < 5:
                examples.append(row)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others of its run."""
    return tuple(row.get(name) for name in KEY)
