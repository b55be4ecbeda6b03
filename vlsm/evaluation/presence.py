"""Whether an image shows the finding at all: scores of images, and of marks on images without the finding.

**Negative** is a record whose label is empty: the dataset says `none`, or its mask has no foreground. All others are
positive. **Present**: a system says that the image shows the finding. That is so if the presence reaches the presence
threshold, or the highest probability of the pixels if the model computes no presence; without a threshold, if the mask
has any foreground pixel. The place of the mask does not matter: that is what Dice is for.

**Dice and negatives.** The Dice of a negative record is 1 if the mask is empty, else 0. So the mean Dice of a dataset
with many negatives says how often the system marks nothing. The mean over all records stays in the table, as in earlier
versions; beside it are the number of negatives, and the mean over positive records alone.

A figure without the records that it needs is None, never NaN.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlsm.segmentation.presence import judge_presence


@dataclass(frozen=True)
class PresenceTotals:
    """Scores of images, of several records together.

    Attributes:
        negatives_n: number of negative records.
        positive_dice_mean: mean Dice over the positive records.
        sensitivity: share of the positive records that the system says are present.
        specificity: share of the negative records that it does not say are present.
        presence_auroc: area under the ROC curve of the presence if all records have one, else of the highest
            probability; 0.5 is chance. None if a record has none.
        false_area_mean: mean share of the image that is foreground, over the negative records.
        presence_threshold: the threshold, or None if any foreground counts.
    """

    negatives_n: int
    positive_dice_mean: float | None
    sensitivity: float | None
    specificity: float | None
    presence_auroc: float | None
    false_area_mean: float | None
    presence_threshold: float | None


def add_presence(rows: Iterable[Mapping[str, Any]]) -> PresenceTotals:
    """Return the scores of images. Of rows of earlier versions, any foreground counts as present."""
    known = [row for row in rows if row.get("target_fraction") is not None]
    groups = positive, negative = [
        [row for row in known if (row["target_fraction"] == 0) is kind] for kind in (False, True)
    ]
    has_presence = all(row.get("presence") is not None for row in known)
    values = [[row.get("presence" if has_presence else "max_probability") for row in group] for group in groups]
    thresholds = {row.get("presence_threshold") for row in known}
    return PresenceTotals(
        negatives_n=len(negative),
        positive_dice_mean=_mean([row["dice"] for row in positive]),
        sensitivity=_mean(list(map(_is_present, positive))),
        specificity=_mean([None if (found := _is_present(row)) is None else not found for row in negative]),
        presence_auroc=None if None in [*values[0], *values[1]] else _auroc(*values),
        false_area_mean=_mean([row.get("area_fraction") for row in negative]),
        presence_threshold=thresholds.pop() if len(thresholds) == 1 else None,
    )


def _is_present(row: Mapping[str, Any]) -> bool | None:
    if "is_present" in row:
        found: bool | None = row["is_present"]
        return found
    return judge_presence(row, None) if "area_fraction" in row else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there are no values or one is unknown: a mean of some would be of other records."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept and len(kept) == len(values) else None


def _auroc(positive: list[Any], negative: list[Any]) -> float | None:
    """Return the probability that a positive has a higher value than a negative; equal values count half."""
    if not positive or not negative:
        return None
    from scipy import stats  # imported here because planning an evaluation does not need it

    ranks = stats.rankdata(np.array([*positive, *negative], float))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))
