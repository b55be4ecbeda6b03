"""Clean masks: fill holes, and remove small and surplus regions."""

import numpy as np

from vlsm.config import CleanSettings


def clean_mask(mask: np.ndarray, settings: CleanSettings) -> np.ndarray:
    """Return a mask with filled holes, without small regions, and with only the largest regions.

    The three steps run in this order. The pixels of a region share sides, not only corners. Of regions of equal area
    the leftmost are kept.

    Args:
        mask: (H, W) bool, column-major in memory.
        settings: the steps to do, and their limits.

    Returns:
        (H, W) bool, column-major in memory.
    """
    if settings == CleanSettings():
        return mask
    from scipy import ndimage  # here: loading it takes as long as the rest of a task

    if settings.fill_holes:
        mask = ndimage.binary_fill_holes(mask.T).T
    if settings.min_area_px > 1 or settings.keep_largest is not None:
        labels, count = ndimage.label(mask.T)  # transposed: a column-major array needs no copy
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        areas[0] = 0
        kept = areas >= max(1, settings.min_area_px)
        if settings.keep_largest is not None:
            order = np.argsort(-areas, kind="stable")
            kept[order[settings.keep_largest :]] = False
        mask = kept[labels].T
    return mask
