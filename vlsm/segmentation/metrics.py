"""Agreement of masks, from counts of pixels."""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BAD_DICE = 0.7  # below it a mask is one that somebody should look at

ArrayT = TypeVar("ArrayT", np.ndarray, "Tensor")


def dice_scores(masks: ArrayT, target_masks: ArrayT) -> ArrayT:
    """Twice the overlap over the sum of both areas, 0 to 1, of each pair of masks.

    Two empty masks agree fully (1.0); an empty one and one that is not disagree fully (0.0).

    Args:
        masks: (B, ...) of 0 and 1, of numpy or torch, integers or booleans.
        target_masks: the same shape.

    Returns:
        (B,) float.

    Raises:
        ValueError: the shapes differ.
    """
    if masks.shape != target_masks.shape:
        raise ValueError(f"mask is {masks.shape}, target_mask {target_masks.shape}; they must be of one size")
    axes = tuple(range(1, masks.ndim))
    overlap, total = (masks & target_masks).sum(axes), masks.sum(axes) + target_masks.sum(axes)
    empty = total == 0
    return (2 * overlap + empty) / (total + empty)


def dice_score(mask: np.ndarray, target_mask: np.ndarray) -> float:
    """`dice_scores` of one pair, (H, W) each."""
    return float(dice_scores(mask[None].astype(bool), target_mask[None].astype(bool))[0])
