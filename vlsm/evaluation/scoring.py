"""One mask against one target mask, at the image's own size.

The rule for empty masks: where both are empty, the model is right, and every overlap is 1 and every distance 0; where
just one is, every overlap is 0 and there is no distance (None), which a mean of distances leaves out.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco

_PERCENTILE = 95.0


@dataclass(frozen=True)
class Scores:
    """How a mask agrees with its target; the column names of the scores.

    Attributes:
        dice, iou, precision, recall: of pixels, 0 to 1.
        hd95_px: the larger of the two 95th percentiles of distances from one outline to the other, in pixels.
        asd_px: the mean of all distances from either outline to the other, in pixels.
    """

    dice: float
    iou: float
    precision: float
    recall: float
    hd95_px: float | None
    asd_px: float | None


def score_mask(mask: np.ndarray, target_mask: np.ndarray) -> Scores:
    """The scores of a mask.

    Args:
        mask: (H, W) of 0 and 1.
        target_mask: the same.

    Raises:
        ValueError: they are of different sizes.
    """
    if mask.shape != target_mask.shape:
        raise ValueError(f"mask is {mask.shape}, target_mask {target_mask.shape}; they must be of one size")
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
    """hd95_px and asd_px of two masks that are not empty.

    MONAI's functions find the same, but take a gigabyte and many seconds to load in each process.
    """
    from scipy import ndimage  # here, so that what only plans an evaluation does not wait for it

    rows, columns = (np.flatnonzero((mask | target_mask).any(axis=axis)) for axis in (1, 0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    outlines = [one[part] & ~ndimage.binary_erosion(one[part]) for one in (mask, target_mask)]
    to_target, to_mask = (ndimage.distance_transform_edt(~other)[one] for one, other in (outlines, outlines[::-1]))
    hd95 = max(np.percentile(to_target, _PERCENTILE), np.percentile(to_mask, _PERCENTILE))
    return float(hd95), float(np.concatenate([to_target, to_mask]).mean())


def encoded_dice(mask_rle: str, other_rle: str, size: tuple[int, int]) -> float:
    """Dice of two masks as COCO run lengths, none of them decoded; size is (height, width)."""
    one, other = ({"size": list(size), "counts": rle.encode("ascii")} for rle in (mask_rle, other_rle))
    total = int(coco.area(one)) + int(coco.area(other))
    return 2 * int(coco.area(coco.merge([one, other], intersect=True))) / total if total else 1.0
