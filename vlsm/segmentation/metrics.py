"""Agreement of two masks, from counts of pixels."""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BAD_DICE = 0.7  # a mask with a lower Dice is bad: a person should review it

ArrayT = TypeVar("ArrayT", np.ndarray, "Tensor")


def dice_scores(masks: ArrayT, target_masks: ArrayT) -> ArrayT:
    """Return the Dice of each pair of masks, 0 to 1: twice the overlap, divided by the sum of both areas.

    The Dice of two empty masks is 1.0. The Dice of an empty mask and a mask with foreground is 0.0.

    Args:
        masks: (B, ...) of 0 and 1, integer or bool, numpy or torch.
        target_masks: the same shape.

    Returns:
        (B,) float.

    Raises:
        ValueError: the shapes differ.
    """
    if masks.shape != target_masks.shape:
        raise ValueError(f"mask is {masks.shape}, target_mask is {target_masks.shape}; they must be of one size")
    axes = tuple(range(1, masks.ndim))
    overlap, total = (masks & target_masks).sum(axes), masks.sum(axes) + target_masks.sum(axes)
    empty = total == 0
    return (2 * overlap + empty) / (total + empty)


def dice_score(mask: np.ndarray, target_mask: np.ndarray) -> float:
    """Return the Dice of one pair of masks, (H, W) each, as `dice_scores` defines it."""
    return float(dice_scores(mask[None].astype(bool), target_mask[None].astype(bool))[0])
