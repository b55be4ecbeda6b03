"""Masks that are empty, and masks that cover the whole image: of most images of a run they are no success."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

WHOLE = 0.98  # share of the image from which a mask covers "the whole image": a margin of some pixels may be missing
MASKS, EMPTY, WHOLE_IMAGE = "ok_masks", "empty_masks", "whole_image_masks"  # counts, also in summary.json
_MOST = 0.5  # share of a run's masks


def find_empty(table: pa.Table) -> pa.ChunkedArray:
    """Return which rows have a mask without foreground, as bool without nulls."""
    return _find(table, pc.equal(table["area_fraction"], 0.0))


def find_whole(table: pa.Table) -> pa.ChunkedArray:
    """Return which rows have a mask that covers the whole image, as bool without nulls."""
    return _find(table, pc.greater_equal(table["area_fraction"], WHOLE))


def _find(table: pa.Table, condition: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.and_(pc.equal(table["status"], "ok"), condition), False)


def count_extremes(kind: str, status: str, area_fraction: float | None) -> dict[str, int]:
    """Return the counts of one row: by MASKS, and EMPTY or WHOLE_IMAGE. Rows that are no mask of the run are none."""
    if kind != "mask" or status != "ok" or area_fraction is None:
        return {}
    return {MASKS: 1, EMPTY: int(area_fraction == 0), WHOLE_IMAGE: int(area_fraction >= WHOLE)}


def describe_extremes(counts: Mapping[str, int]) -> str | None:
    """Return a warning if most masks of a run are empty or cover the whole image, else None.

    Args:
        counts: numbers of masks by MASKS, EMPTY and WHOLE_IMAGE; a run of an earlier version has none.
    """
    total, empty, whole = (counts.get(key) or 0 for key in (MASKS, EMPTY, WHOLE_IMAGE))
    if empty + whole <= _MOST * total or not total:
        return None
    covering = "covers the whole image" if whole == 1 else "cover the whole image"
    parts = [f"{empty:,} {'is' if empty == 1 else 'are'} empty"] * bool(empty)
    parts += [f"{whole:,} {covering} ({100 * WHOLE:.0f} % of it or more)"] * bool(whole)
    reasons = ["the training was too short or went wrong (look at its Dice)", "it had other images than these"]
    reasons += ["the threshold does not fit the model", "or its labels or grey levels were read otherwise"]
    fine = "" if whole > empty else ", unless most images show nothing"
    return f"of {total:,} masks {' and '.join(parts)}: this model is hardly useful here{fine}; likely " + ", ".join(
        reasons
    )
