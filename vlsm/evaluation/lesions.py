"""Scores of single lesions: the connected components of a mask against those of its target mask.

**Components.** Pixels that touch at a side or a corner are of one component. A component of the target mask is a
lesion. Two lesions that touch are one. Even a component of one pixel counts; `clean.min_area_px` removes such specks.

**Matched.** A component and a lesion are a match if their IoU is above 0.5. Then neither can match another one, so that
no choice between matches is necessary (Kirillov et al. 2019, Panoptic Segmentation, arXiv:1801.00868).

**Touched.** A lesion is found if any pixel of it is marked. A component is right if any pixel of it lies in a lesion.
One component may find several lesions, and several components may lie in one lesion.

**Dice of a lesion.** The lesion against all components that touch it, together. A lesion that none touches has 0.

**Empty masks.** The numbers of lesions and components are 0 then. All figures of a table are computed from sums over
images, so an image without lesions and without components changes nothing, and each component on an image without
lesions is a false one. A figure whose denominator is 0 is None, never NaN: without any lesion there is no recall.

panoptica and MONAI have such scores. panoptica 2.1 needs a numpy below 2.3, pandas, plotly and scikit-image; MONAI
needs 1 GB of memory and many seconds to import. With scipy.ndimage.label, the rules above are a few lines of numpy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MATCH_IOU = 0.5


@dataclass(frozen=True)
class LesionScores:
    """Lesions of one image; the attributes are also column names of SCORES_SCHEMA.

    Attributes:
        num_lesions: components of the target mask.
        num_components: components of the mask.
        num_matched: pairs of a component and a lesion with an IoU above MATCH_IOU.
        num_found: lesions that any component touches.
        num_right: components that touch any lesion.
        matched_iou: mean IoU of the matched pairs, or None if there are none.
        lesion_dice: mean Dice of the lesions, or None if there are none.
    """

    num_lesions: int
    num_components: int
    num_matched: int = 0
    num_found: int = 0
    num_right: int = 0
    matched_iou: float | None = None
    lesion_dice: float | None = None


def score_lesions(mask: np.ndarray, target_mask: np.ndarray) -> LesionScores:
    """Return the scores of the lesions of one image, by the rules of this module.

    Memory and time grow with the number of pixels, not with that of pairs of components.

    Args:
        mask: (H, W) of 0 and 1, the prediction.
        target_mask: (H, W) of 0 and 1, the ground truth.
    """
    components, areas = _label(mask)
    lesions, lesion_areas = _label(target_mask)
    num_lesions, num_components = len(lesion_areas), len(areas)
    both = (components > 0) & (lesions > 0)
    if not both.any():
        return LesionScores(num_lesions, num_components, lesion_dice=0.0 if num_lesions else None)
    numbers, overlaps = np.unique(
        components[both].astype(np.int64) * (num_lesions + 1) + lesions[both], return_counts=True
    )
    touching, touched = (number - 1 for number in np.divmod(numbers, num_lesions + 1))  # one pair of indices each
    iou = overlaps / (areas[touching] + lesion_areas[touched] - overlaps)
    matched = iou[iou > MATCH_IOU]
    hits = np.bincount(touched, overlaps, num_lesions)
    dice = 2 * hits / (lesion_areas + np.bincount(touched, areas[touching], num_lesions))
    return LesionScores(
        num_lesions,
        num_components,
        num_matched=len(matched),
        num_found=len(np.unique(touched)),
        num_right=len(np.unique(touching)),
        matched_iou=float(matched.mean()) if len(matched) else None,
        lesion_dice=float(dice.mean()),
    )


def _label(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each pixel's component, (H, W) with 0 for background, and the areas in pixels by number."""
    from scipy import ndimage  # imported here because planning an evaluation does not need it

    labels, count = ndimage.label(mask, np.ones((3, 3), int))
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]


@dataclass(frozen=True)
class LesionTotals:
    """Scores of all lesions of several images together.

    Attributes:
        lesions_n, components_n: number of lesions, and of components of the masks.
        lesion_precision, lesion_recall, lesion_f1: of the matches at an IoU above MATCH_IOU.
        touch_precision, touch_recall, touch_f1: right components, found lesions, and their harmonic mean.
        panoptic_quality: sum of the IoU of matches, divided by the mean of both numbers (Kirillov et al. 2019).
        lesion_dice_mean: mean over all lesions.
    """

    lesions_n: int
    components_n: int
    lesion_precision: float | None
    lesion_recall: float | None
    lesion_f1: float | None
    touch_precision: float | None
    touch_recall: float | None
    touch_f1: float | None
    panoptic_quality: float | None
    lesion_dice_mean: float | None


def add_lesions(rows: Iterable[Mapping[str, Any]]) -> LesionTotals:
    """Return the scores of all lesions of some rows of scores. Rows of earlier versions have none and are left out."""
    known = [row for row in rows if row.get("num_lesions") is not None]
    lesions, components, matched, found, right = (
        sum(row[name] for row in known)
        for name in ("num_lesions", "num_components", "num_matched", "num_found", "num_right")
    )
    iou = sum((row["matched_iou"] or 0.0) * row["num_matched"] for row in known)
    dice = sum((row["lesion_dice"] or 0.0) * row["num_lesions"] for row in known)
    precision, recall = _ratio(right, components), _ratio(found, lesions)
    return LesionTotals(
        lesions_n=lesions,
        components_n=components,
        lesion_precision=_ratio(matched, components),
        lesion_recall=_ratio(matched, lesions),
        lesion_f1=_ratio(2 * matched, lesions + components),
        touch_precision=precision,
        touch_recall=recall,
        touch_f1=None if lesions + components == 0 else _harmonic_mean(precision or 0.0, recall or 0.0),
        panoptic_quality=_ratio(2 * iou, lesions + components),
        lesion_dice_mean=_ratio(dice, lesions),
    )


def _ratio(value: float, total: int) -> float | None:
    return value / total if total else None


def _harmonic_mean(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0
