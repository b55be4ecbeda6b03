"""One pass over all rows of a run: counts, distributions, a sample, and the extreme rows.

The pass does not read the mask columns, and it keeps only a bounded number of rows.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlsm.report.distribution import Distribution
from vlsm.runs.carried import CARRIED, carried_names, is_carried
from vlsm.runs.extremes import find_empty, find_whole
from vlsm.runs.tables import Tables

METRICS = {"dice": "Dice", "confidence": "Confidence", "agreement": "Agreement", "area_fraction": "Area fraction"}
# the values of these columns are unique in a run
KEY = ("dataset", "split", "system", "prompt_name", "prompt", "image_id", "mask_uri", "where", "record")
FILE = "__filename"  # a column that pyarrow adds: the file of the row
_MOST_CARRIED, _CARRIED_LETTERS = 12, 60  # columns of a list in a report, and letters of a value
_BETWEEN, _BEHIND_NAME = "\x1f", "\x1e"  # columns of a list in one text; neither stands in a name or a value there
_PLACES = ("image_id", "image_uri", "selector", "mask_uri", "where", "record")
_WORDS = ("dataset", "split", "system", "prompt", "prompt_name", "prompt_class", "model", "status", "error", "review")
ROW = pa.schema(
    [pa.field(name, pa.string()) for name in (*_PLACES, *_WORDS, FILE)]
    + [pa.field(name, pa.int64()) for name in ("height", "width")]
    + [pa.field(name, pa.float64()) for name in (*METRICS, "priority")]
    + [pa.field(CARRIED, pa.string())]
)
_BATCH_ROWS, _BATCH_BYTES = 1 << 14, 1 << 26
_MOST_LETTERS = 1 << 13  # of a text; lists have no longer ones
_MAX_VALUES = 1000  # distinct values that are counted separately; a run may have as many prompts as images
_MAX_STRATA, _SAMPLE_ROWS, _CANDIDATES = 200, 240, 512
_OTHERS = "others"


def scan(
    tables: Tables,
    condition: pc.Expression | None = None,
    compute: Callable[[pa.Table], pa.Table] | None = None,
) -> Iterator[pa.Table]:
    """Yield the rows of a run in their order, in tables of some thousand rows with the columns of ROW.

    Missing columns and numbers that are not finite become null. Longer texts than any run writes are cut. `priority` is
    random, but depends only on the position of the row, so that each scan gives the same samples.

    Args:
        tables: rows of a run.
        condition: filter of the rows, or None for all. It may use the columns of ROW and `kind`.
        compute: returns a table with the columns that the run lacks.

    Raises:
        ResultError: a file is damaged.
    """
    carried = carried_names(tables.schema)[:_MOST_CARRIED]
    ours = [field.name for field in tables.schema if not is_carried(field)]
    names = [name for name in ours if name in (*ROW.names, "kind", "image_selector")]
    waiting: list[pa.Table] = []
    generator = np.random.default_rng(0)
    for uri, table in tables.pieces([*names, *carried]):
        of_list = _join_carried(table, carried)
        table = table.select(names) if of_list is None else table.select(names).append_column(CARRIED, of_list)
        chosen = table if condition is None else table.filter(condition)
        chosen = chosen if compute is None else compute(chosen)
        waiting.append(chosen.append_column(FILE, pa.repeat(uri, len(chosen)).cast(pa.string())))
        if sum(map(len, waiting)) >= _BATCH_ROWS or sum(each.nbytes for each in waiting) >= _BATCH_BYTES:
            yield from _merge(waiting, generator)
            waiting = []
    yield from _merge(waiting, generator)


def _join_carried(table: pa.Table, names: list[str]) -> pa.ChunkedArray | None:
    """Return the columns of a list as one text per row, or None if there are none. Nulls are left out."""
    pairs = []
    for name in names:
        text = pc.utf8_slice_codeunits(pc.cast(table[name], pa.string()), 0, _CARRIED_LETTERS)
        for mark in (_BETWEEN, _BEHIND_NAME):
            text, name = pc.replace_substring(text, mark, " "), name.replace(mark, " ")
        pairs.append(pc.binary_join_element_wise(name, text, _BEHIND_NAME))
    return pc.binary_join_element_wise(*pairs, _BETWEEN, null_handling="skip") if pairs else None


def carried_values(row: dict[str, Any]) -> dict[str, str]:
    """Return the values that a row of ROW has from a list, by the names of their columns."""
    texts = (row.get(CARRIED) or "").split(_BETWEEN)
    return {name: value for name, mark, value in (text.partition(_BEHIND_NAME) for text in texts) if mark}


def _merge(tables: list[pa.Table], generator: np.random.Generator) -> Iterator[pa.Table]:
    """Yield some tables as one, unless they have no rows."""
    if any(map(len, tables)):
        yield _as_rows(pa.concat_tables(tables), generator)


def _as_rows(table: pa.Table, generator: np.random.Generator) -> pa.Table:
    columns = []
    for column in ROW:
        if column.name == "priority":
            values = pa.array(generator.random(len(table)))
        elif column.name not in table.column_names:
            values = pa.nulls(len(table), column.type)
        else:
            values = table[column.name].cast(column.type)
            if pa.types.is_string(column.type):
                values = pc.utf8_slice_codeunits(values, 0, _MOST_LETTERS)
            if pa.types.is_floating(column.type):
                values = pc.if_else(pc.is_finite(values), values, None)
        columns.append(values)
    # an evaluation's row has no image_id if no segment run has its image
    names = file_names(columns[ROW.get_field_index("image_uri")])
    columns[0] = pc.coalesce(columns[0], names)
    return pa.table(columns, schema=ROW)


def file_names(uris: Any) -> Any:
    """Return the last parts of locations, an array or an expression, without the query of a URL."""
    plain = pc.replace_substring_regex(uris, pattern=r"(?is)^(https?://[^?#]*)[?#].*$", replacement=r"\1")
    return pc.replace_substring_regex(plain, pattern=".*/", replacement="")


class Extremes:
    """The rows with the lowest or highest values of a column, or with the values nearest to a given one.

    Args:
        column: a column of ROW.
        is_highest: keep the highest values instead of the lowest.
        around: keep the values nearest to this one instead.
    """

    def __init__(self, column: str, is_highest: bool = False, around: float | None = None) -> None:
        self._column, self._is_highest, self._around = column, is_highest, around
        self._kept = ROW.append(pa.field("distance", pa.float64())).empty_table()

    def add(self, table: pa.Table) -> None:
        """Add rows. Rows without a value, or with a status other than ok, are ignored."""
        table = table.filter(pc.and_(pc.is_valid(table[self._column]), pc.equal(table["status"], "ok")))
        values = table[self._column]
        distance = values if self._around is None else pc.abs(pc.subtract(values, self._around))
        table = table.append_column("distance", pc.negate(distance) if self._is_highest else distance)
        merged = pa.concat_tables([self._kept, table])
        keys = [(name, "ascending") for name in ("distance", "image_id", "priority")]
        self._kept = merged.take(pc.select_k_unstable(merged, min(_CANDIDATES, len(merged)), keys)).combine_chunks()

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Return the first `number` rows, at most one per image."""
        first: dict[tuple[Any, Any], dict[str, Any]] = {}
        for row in self._kept.to_pylist():
            first.setdefault((row["dataset"], row["image_id"]), row)
        return list(first.values())[:number]


class Sample:
    """A random sample, stratified by dataset, split, system, prompt, status, review and range of a metric.

    Args:
        metric: a metric of ROW.
        most_rows: the most rows that `rows` is asked for.
    """

    def __init__(self, metric: str, most_rows: int = _SAMPLE_ROWS) -> None:
        self._metric, self._most_rows = metric, most_rows
        self._strata: dict[str, int] = {}
        self._kept = ROW.append(pa.field("stratum", pa.int64())).empty_table()

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        band = pc.cast(pc.floor(pc.multiply(pc.fill_null(table[self._metric], -1.0), 4.999)), pa.string())
        # evaluations have names of prompts; an archive may have as many prompts as images, which then share one stratum
        names = pc.coalesce(table["prompt_name"], table["prompt"])
        columns = (table["dataset"], table["split"], table["system"], table["review"], names)
        parts = [pc.fill_null(column, "") for column in columns]
        texts = pc.binary_join_element_wise(*parts, table["status"], band, "\0")
        for text in pc.unique(texts).to_pylist():
            if len(self._strata) < _MAX_STRATA:
                self._strata.setdefault(text, len(self._strata))
        strata = pc.fill_null(pc.index_in(texts, pa.array(list(self._strata), pa.string())), _MAX_STRATA)
        merged = pa.concat_tables([self._kept, table.append_column("stratum", strata.cast(pa.int64()))])
        # more rows only push others back: a row that is not among the first now is not among them later
        self._kept = self._first(merged, self._most_rows).combine_chunks()

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Return `number` rows, evenly from all strata: one of each stratum, then a second one of each, and so on."""
        return self._first(self._kept, number).drop_columns(["stratum"]).to_pylist()

    @staticmethod
    def _first(table: pa.Table, number: int) -> pa.Table:
        table = table.sort_by([("stratum", "ascending"), ("priority", "ascending")])
        numbers = table["stratum"].to_numpy()
        rank = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        return table.take(pa.array(np.lexsort((table["priority"].to_numpy(), rank))[:number]))


@dataclass
class Survey:
    """Counts and distributions of all rows.

    Attributes:
        metric: metric whose ranges stratify the sample.
        group: column whose values get separate distributions.
        num_rows: number of rows.
        images: number of images by status; consecutive rows of one image count once.
        values: number of rows by column and value, for some columns.
        distributions: distributions by metric and value of the group column.
        reviews: number of rows by reason for a review; a row may have several.
        num_marked: number of rows that have such a reason.
        num_empty, num_whole: number of good rows whose mask is empty, and whose mask covers the whole image.
        reasons: number of failures by reason.
        examples: the first failed rows of each reason.
        most_rows: the most rows of its sample.
        counts_images: count failures of images, as status and summary of a segment run do, and not of rows.
    """

    metric: str
    group: str
    counts_images: bool = False
    most_rows: int = _SAMPLE_ROWS
    num_rows: int = 0
    images: Counter[str] = field(default_factory=Counter)
    values: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    distributions: dict[tuple[str, str], Distribution] = field(default_factory=dict)
    reviews: Counter[str] = field(default_factory=Counter)
    num_marked: int = 0
    num_empty: int = 0
    num_whole: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _last_id: str | None = None

    def __post_init__(self) -> None:
        self.sample = Sample(self.metric, self.most_rows)

    def total(self, metric: str) -> Distribution | None:
        """Return the distribution of a metric over all groups, or None if no row has the metric."""
        by_group = [distribution for (name, _), distribution in self.distributions.items() if name == metric]
        if not by_group:
            return None
        fine, total = np.sum([each.fine for each in by_group], axis=0), sum(each.total for each in by_group)
        return Distribution(fine, total, max(each.highest for each in by_group))

    def groups(self, metric: str, number: int) -> list[tuple[str, Distribution]]:
        """Return the distributions of a metric in the `number` groups with the most values, by name."""
        named = [(name, distribution) for (key, name), distribution in self.distributions.items() if key == metric]
        return sorted(sorted(named, key=lambda pair: -pair[1].count)[:number], key=lambda pair: pair[0])

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        self.num_rows += len(table)
        is_first = self._count_images(table)
        for name in ("status", "dataset", "system", "split", "prompt", "model"):
            counter = self.values[name]
            for item in pc.value_counts(table[name].drop_null()).to_pylist():
                known = item["values"] in counter or len(counter) < _MAX_VALUES
                counter[item["values"] if known else _OTHERS] += item["counts"]
        self._measure(table)
        self._count_reviews(table)
        counted = table.filter(pa.array(is_first)) if self.counts_images else table
        self._count_failures(counted.filter(pc.equal(counted["status"], "failed")))
        self.sample.add(table)

    def _count_images(self, table: pa.Table) -> np.ndarray:
        """Count the images by the status of their first row. Return which rows are first, (rows,) bool."""
        ids = table["image_id"].combine_chunks()
        is_first = np.ones(len(ids), bool)
        is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
        is_first[0] = ids[0].as_py() != self._last_id
        self._last_id = ids[-1].as_py()
        for item in pc.value_counts(table["status"].filter(pa.array(is_first))).to_pylist():
            self.images[item["values"]] += item["counts"]
        return is_first

    def _count_reviews(self, table: pa.Table) -> None:
        self.num_marked += len(table) - table["review"].null_count
        self.num_empty += int(pc.sum(find_empty(table)).as_py() or 0)
        self.num_whole += int(pc.sum(find_whole(table)).as_py() or 0)
        for item in pc.value_counts(table["review"].drop_null()).to_pylist():
            for reason in review_reasons(item["values"]):
                reason = reason if reason in self.reviews or len(self.reviews) < 50 else _OTHERS
                self.reviews[reason] += item["counts"]

    def _measure(self, table: pa.Table) -> None:
        table = table.filter(pc.equal(table["status"], "ok"))
        groups = pc.fill_null(table[self.group], "")
        for metric in METRICS:
            has_value = pc.is_valid(table[metric])
            values, names = table[metric].filter(has_value), groups.filter(has_value)
            for name in pc.unique(names).to_pylist():
                known = (metric, name) in self.distributions or len(self.distributions) < 4 * _MAX_STRATA
                distribution = self.distributions.setdefault((metric, name if known else _OTHERS), Distribution())
                distribution.add(values.filter(pc.equal(names, name)).to_numpy())

    def _count_failures(self, failed: pa.Table) -> None:
        for row in failed.select(["image_id", "image_uri", "error"]).to_pylist():
            reason = (row["error"] or "no reason given").partition(":")[0][:60]
            reason = reason if reason in self.reasons or len(self.reasons) < 50 else _OTHERS
            self.reasons[reason] += 1
            if len(examples := self.examples.setdefault(reason, [])) < 5:
                examples.append(row)


def review_reasons(review: str | None) -> tuple[str, ...]:
    """Return the reasons in a cell of the column `review`."""
    return tuple(dict.fromkeys(reason[:60] for reason in (review or "").split(", ") if reason))[:5]


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of a row, which is unique in its run."""
    return tuple(row.get(name) for name in KEY)
