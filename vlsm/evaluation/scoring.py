"""Scores of one mask against one target mask, at the image's original size.

Empty masks: if both masks are empty, the prediction is correct: every overlap is 1 and every distance is 0. If exactly
one mask is empty, every overlap is 0 and every distance is None; tables leave out None. The normalised surface distance
counts as an overlap.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco

from vlsm.evaluation.settings import TOLERANCE_PX
from vlsm.images.run_lengths import check_run_lengths

_PERCENTILE = 95.0


@dataclass(frozen=True)
class Scores:
    """Scores of one mask; the attributes are also column names of SCORES_SCHEMA.

    Attributes:
        dice, iou, precision, recall: overlap of pixels, 0 to 1.
        hd95_px: 95 % Hausdorff distance in pixels: 95th percentile of the distances from one outline to the other,
            the larger of both directions.
        asd_px: average symmetric surface distance in pixels: mean of the distances between outlines in both directions.
        nsd: normalised surface distance, 0 to 1: share of the pixels of both outlines that are within the tolerance of
            the other outline (Nikolov et al. 2018, arXiv:1809.04430, with pixels as elements of the outlines).
        nsd_mm: the same with the tolerance in millimetres; None if it is not asked for, or the spacing is unknown.
    """

    dice: float
    iou: float
    precision: float
    recall: float
    hd95_px: float | None
    asd_px: float | None
    nsd: float
    nsd_mm: float | None = None


def score_mask(
    mask: np.ndarray,
    target_mask: np.ndarray,
    tolerance_px: float = TOLERANCE_PX,
    tolerance_mm: float | None = None,
    spacing_mm: tuple[float, float] | None = None,
) -> Scores:
    """Return the scores of a mask.

    Args:
        mask: (H, W) of 0 and 1, the prediction.
        target_mask: (H, W) of 0 and 1, the ground truth.
        tolerance_px: of nsd, in pixels.
        tolerance_mm: of nsd_mm, in millimetres; None for no nsd_mm.
        spacing_mm: distance between rows, and between columns, in millimetres; None if it is unknown.

    Raises:
        ValueError: the masks differ in size.
    """
    if mask.shape != target_mask.shape:
        raise ValueError(f"mask has shape {mask.shape}, target_mask {target_mask.shape}; both must have one size")
    mask, target_mask = mask.astype(bool), target_mask.astype(bool)
    area, target_area = np.count_nonzero(mask), np.count_nonzero(target_mask)
    has_mm = tolerance_mm is not None and spacing_mm is not None
    if not area or not target_area:
        value, distance = (0.0, None) if area or target_area else (1.0, 0.0)
        return Scores(value, value, value, value, distance, distance, value, value if has_mm else None)
    overlap = np.count_nonzero(mask & target_mask)
    outlines = _outlines(mask, target_mask)
    to_target, to_mask = _distances(outlines)
    both = np.concatenate([to_target, to_mask])
    nsd_mm = None
    if tolerance_mm is not None and spacing_mm is not None:
        nsd_mm = float((np.concatenate(_distances(outlines, spacing_mm)) <= tolerance_mm).mean())
    return Scores(
        2 * overlap / (area + target_area),
        overlap / (area + target_area - overlap),
        overlap / area,
        overlap / target_area,
        float(max(np.percentile(to_target, _PERCENTILE), np.percentile(to_mask, _PERCENTILE))),
        float(both.mean()),
        float((both <= tolerance_px).mean()),
        nsd_mm,
    )


def _outlines(mask: np.ndarray, target_mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines of two masks that are not empty, (H, W) bool in the bounding box of both."""
    from scipy import ndimage  # imported here because planning an evaluation does not need it

    rows, columns = (np.flatnonzero((mask | target_mask).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return [one[box] & ~ndimage.binary_erosion(one[box]) for one in (mask, target_mask)]


def _distances(outlines: list[np.ndarray], spacing: tuple[float, float] = (1.0, 1.0)) -> list[np.ndarray]:
    """Return the distance of each pixel of one outline to the other outline, for both outlines.

    MONAI's functions give the same values, but each process needs 1 GB of memory and many seconds to import MONAI.
    """
    from scipy import ndimage

    return [ndimage.distance_transform_edt(~other, sampling=spacing)[one] for one, other in (outlines, outlines[::-1])]


def encoded_dice(mask_rle: str, other_rle: str, size: tuple[int, int]) -> float:
    """Return the Dice of two masks, computed on their COCO run lengths without decoding them.

    Args:
        mask_rle: run lengths of one mask.
        other_rle: run lengths of the other mask.
        size: (height, width) of both masks in pixels.

    Raises:
        ValueError: run lengths are damaged, or do not fit the size.
    """
    for rle in (mask_rle, other_rle):
        check_run_lengths(rle, size)
    one, other = ({"size": list(size), "counts": rle.encode("ascii")} for rle in (mask_rle, other_rle))
    total = int(coco.area(one)) + int(coco.area(other))
    return 2 * int(coco.area(coco.merge([one, other], intersect=True))) / total if total else 1.0
