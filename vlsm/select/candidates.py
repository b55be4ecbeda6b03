"""The rows of a run among which images are chosen, with the scores that speak for them.

One pass reads small columns and keeps some 40 bytes per row: 80 MB for two million rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlsm.errors import ConfigError
from vlsm.runs.tables import Tables
from vlsm.select.labelled import Labelled
from vlsm.shown import show

_NUMBERS = ("confidence", "max_probability", "agreement", "area_fraction")
_TEXTS = ("image_id", "image_uri", "selector", "content_sha256", "prompt", "kind", "status")
_MOST_PROMPTS = 20  # that a message names

Place = tuple[int, int]  # number of a part file, and of a row in it


@dataclass(frozen=True)
class Candidates:
    """The rows that may be chosen, in the order of the run: N rows, one per image and prompt.

    Attributes:
        part, row: (N,) int32, where each row stands.
        first: (N,) int32, the row where the rows of its image begin: its embedding stands there.
        image: (N,) int32, number of its image, from 0.
        group: (N,) int64, equal for images of one group; 0 for an image without a value.
        scores: (N,) float64 by name, NaN where a row has none. `uncertainty`: 1 minus the confidence or the agreement,
            the larger one. `odd_area`: 0 for the median area of all masks of the prompt, 1 for the smallest or largest.
        labelled: where the images stand that are labelled already.
        images: number of images by status, and of those that are labelled already.
    """

    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    first: npt.NDArray[np.int32]
    image: npt.NDArray[np.int32]
    group: npt.NDArray[np.int64]
    scores: dict[str, npt.NDArray[np.float64]]
    labelled: list[Place]
    images: Counter[str]

    @property
    def num_images(self) -> int:
        """Number of images that may be chosen."""
        return int(self.image[-1]) + 1 if len(self.image) else 0

    def place_of_image(self, index: int) -> Place:
        """Return where the rows of a candidate's image begin."""
        return int(self.part[index]), int(self.first[index])


@dataclass
class _Pass:
    """What one pass over the rows collects."""

    arrays: dict[str, list[Any]] = field(default_factory=dict)
    labelled: list[Place] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, None] = field(default_factory=dict)
    last: tuple[str, str, int, int] = ("", "", 0, 0)  # file, image_id, its first row, number of rows of the file so far

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        self.arrays.setdefault(name, []).append(values)

    def join(self, name: str, dtype: Any) -> npt.NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *self.arrays.get(name, [])]).astype(dtype)


def read_candidates(
    tables: Tables, prompt: str | None = None, group: str | None = None, labelled: Labelled | None = None
) -> Candidates:
    """Return the rows of a run that may be chosen: masks of images that were segmented and are not labelled yet.

    Args:
        tables: part files of the run.
        prompt: only rows with this prompt; None for all.
        group: column whose values are groups; None for none.
        labelled: images that are labelled already; None for none.

    Raises:
        ConfigError: no row has the prompt.
    """
    found, parts = _Pass(), {uri: number for number, uri in enumerate(tables.uris)}
    names = [*_TEXTS, *_NUMBERS, *([group] if group and group not in _TEXTS else [])]
    for uri, table in tables.pieces(names):
        if len(table):
            _add(found, table, uri, parts[uri], prompt, group, labelled)
    if prompt is not None and prompt not in found.prompts:
        known = ", ".join(repr(show(each)) for each in list(found.prompts)[:_MOST_PROMPTS])
        raise ConfigError(f"no row of OUTPUT has the prompt {prompt!r}; its prompts are {known}")
    part, first = found.join("part", np.int32), found.join("first", np.int32)
    begins = np.ones(len(part), bool)
    begins[1:] = (part[1:] != part[:-1]) | (first[1:] != first[:-1])
    scores = {
        "uncertainty": found.join("uncertainty", np.float64),
        "odd_area": _odd_areas(found.join("area_fraction", np.float64), found.join("prompt", np.int64)),
    }
    return Candidates(
        part,
        found.join("row", np.int32),
        first,
        (np.cumsum(begins) - 1).astype(np.int32),
        found.join("group", np.int64),
        scores,
        found.labelled,
        found.images,
    )


def _add(  # noqa: PLR0913 - a piece, where it stands, and what is asked
    found: _Pass,
    table: pa.Table,
    uri: str,
    part: int,
    prompt: str | None,
    group: str | None,
    labelled: Labelled | None,
) -> None:
    """Add a piece of a part file."""
    before = found.last if found.last[0] == uri else (uri, None, 0, 0)
    number = before[3]
    ids = table["image_id"].combine_chunks()
    begins = np.ones(len(ids), bool)
    begins[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    begins[0] = ids[0].as_py() != before[1]
    rows = np.arange(number, number + len(ids), dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, rows, before[2])).astype(np.int32)
    found.last = uri, ids[-1].as_py(), int(first[-1]), number + len(ids)
    is_known = np.zeros(len(ids), bool) if labelled is None else labelled.find(table)
    found.labelled += [(part, int(row)) for row in rows[begins & is_known]]
    found.images["labelled"] += int(np.count_nonzero(begins & is_known))
    for item in pc.value_counts(table["status"].filter(pa.array(begins & ~is_known))).to_pylist():
        found.images[item["values"]] += item["counts"]
    if prompt not in found.prompts and len(found.prompts) < _MOST_PROMPTS:
        found.prompts |= dict.fromkeys(pc.unique(table["prompt"]).to_pylist())
    chosen = ~is_known & _equals(table, "status", "ok") & _equals(table, "kind", "mask")
    if prompt is not None:
        chosen &= (fits := _equals(table, "prompt", prompt))
        found.prompts |= {prompt: None} if fits.any() else {}
    found.add("row", rows[chosen])
    found.add("first", first[chosen])
    found.add("part", np.full(int(np.count_nonzero(chosen)), part, np.int32))
    found.add("prompt", _digest(table["prompt"])[chosen])
    found.add("group", _digest(table[group])[chosen] if group else np.zeros(int(np.count_nonzero(chosen)), np.int64))
    found.add("area_fraction", _numbers(table, "area_fraction")[chosen])
    found.add("uncertainty", _uncertainty(table)[chosen])


def _equals(table: pa.Table, name: str, text: str) -> npt.NDArray[np.bool_]:
    return pc.fill_null(pc.equal(table[name], text), False).to_numpy()


def _numbers(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """Return a column of shares, NaN where a row has no number from 0 to 1."""
    values = table[name].cast(pa.float64()).to_numpy()
    return np.where((values >= 0) & (values <= 1), values, np.nan)


def _uncertainty(table: pa.Table) -> npt.NDArray[np.float64]:
    """Return how uncertain each row is.

    An empty mask has no confidence. The model is sure of it if even the highest probability is low.
    """
    confidence, highest = _numbers(table, "confidence"), _numbers(table, "max_probability")
    confidence = np.where(np.isnan(confidence), 1 - highest, confidence)
    return np.fmax(1 - confidence, 1 - _numbers(table, "agreement"))


def _digest(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a number for each value of a column, equal for equal values of this process; 0 for no value."""
    encoded = column.combine_chunks().dictionary_encode()
    numbers = [0 if value in (None, "") else hash(value) or 1 for value in encoded.dictionary.to_pylist()]
    places = pc.fill_null(encoded.indices, len(numbers)).to_numpy()
    return np.array([*numbers, 0], np.int64)[places]


def _odd_areas(areas: npt.NDArray[np.float64], prompts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return how far each area is from the median of its prompt, by rank: 0 at the median, 1 at both ends."""
    odd = np.full(len(areas), np.nan)
    order = np.argsort(prompts, kind="stable")
    ends = np.flatnonzero(np.diff(prompts[order])) + 1
    for rows in np.split(order, ends):
        values = areas[rows]
        known = np.sort(values[~np.isnan(values)])
        if len(known):
            # twice the mean rank; whole numbers, so that both ends have the same score
            ranks = np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")
            odd[rows] = np.where(np.isnan(values), np.nan, np.abs(ranks - len(known)) / len(known))
    return odd
