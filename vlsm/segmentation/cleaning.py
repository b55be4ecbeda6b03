"""Masks without what no lesion looks like: crumbs, holes, more regions than asked for."""

import numpy as np

from vlsm.config import CleanSettings


def clean_mask(mask: np.ndarray, settings: CleanSettings) -> np.ndarray:
    """A mask (H, W) bool, column-major, with its holes filled, then without small regions, then the largest of them.

    Regions hang together by pixels that share a side; of equally large ones those further left are kept.
    """
    if settings == CleanSettings():
        return mask
    from scipy import ndimage  # which takes as long to load as all the rest of a task

    if settings.fill_holes:
        mask = ndimage.binary_fill_holes(mask.T).T
    if settings.min_area_px > 1 or settings.keep_largest is not None:
        labels, count = ndimage.label(mask.T)  # transposed: what is column-major needs no copy
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        areas[0] = 0
        kept = areas >= max(1, settings.min_area_px)
        if settings.keep_largest is not None:
            order = np.argsort(-areas, kind="stable")
            kept[order[settings.keep_largest :]] = False
        mask = kept[labels].T
    return mask
