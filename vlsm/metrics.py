"""Agreement of masks, from counts of pixels."""

import numpy as np


def dice_score(mask: np.ndarray, target_mask: np.ndarray) -> float:
    """Twice the overlap over the sum of both areas, 0 to 1.

    Two empty masks agree fully (1.0); an empty one and one that is not disagree fully (0.0).

    Args:
        mask: (H, W) of 0 and 1.
        target_mask: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if mask.shape != target_mask.shape:
        raise ValueError(f"mask is {mask.shape}, target_mask {target_mask.shape}; they must be of one size")
    overlap, total = int(np.sum(mask & target_mask)), int(mask.sum()) + int(target_mask.sum())
    return 2 * overlap / total if total else 1.0
