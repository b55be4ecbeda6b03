"""Scores of one mask against one target mask, at the image's original size.

Empty masks: if both masks are empty, the prediction is correct: every overlap is 1 and every distance is 0. If exactly
one mask is empty, every overlap is 0 and every distance is None; tables leave out None.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco

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
    """

    dice: float
    iou: float
    precision: float
    recall: float
    hd95_px: float | None
    asd_px: float | None


def score_mask(mask: np.ndarray, target_mask: np.ndarray) -> Scores:
    """Return the scores of a mask.

    Args:
        mask: (H, W) of 0 and 1, the prediction.
        target_mask: (H, W) of 0 and 1, the ground truth.

    Raises:
        ValueError: the masks differ in size.
    """
    if mask.shape != target_mask.shape:
        raise ValueError(f"mask has shape {mask.shape}, target_mask {target_mask.shape}; both must have one size")
    mask, target_mask = mask.astype(bool), target_mask.astype(bool)
    area, target_area = np.count_nonzero(mask), np.count_nonzero(target_mask)
    if not area or not target_area:
        value, distance = (0.0, None) if area or target_area else (1.0, 0.0)
        return Scores(value, value, value, value, distance, distance)
    overlap = np.count_nonzero(mask & target_mask)
    return Scores(
        2 * overlap / (area + target_area),
        overlap / (area + target_area - overlap),
        overlap / area,
        overlap / target_area,
        *_distances(mask, target_mask),
    )


def _distances(mask: np.ndarray, target_mask: np.ndarray) -> tuple[float, float]:
    """Return hd95_px and asd_px of two masks that are not empty.

    MONAI's functions give the same values, but each process needs 1 GB of memory and many seconds to import MONAI.
    """
    from scipy import ndimage  # imported here because planning an evaluation does not need it

    rows, columns = (np.flatnonzero((mask | target_mask).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # the bounding box of both masks
    outlines = [one[box] & ~ndimage.binary_erosion(one[box]) for one in (mask, target_mask)]
    to_target, to_mask = (ndimage.distance_transform_edt(~other)[one] for one, other in (outlines, outlines[::-1]))
    hd95 = max(np.percentile(to_target, _PERCENTILE), np.percentile(to_mask, _PERCENTILE))
    return float(hd95), float(np.concatenate([to_target, to_mask]).mean())


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
