"""The probabilities of overlapping windows, joined to those of the whole image."""

from collections.abc import Sequence

import numpy as np

from vlsm.images.preprocess import Square
from vlsm.images.windows import Window
from vlsm.segmentation.masks import probabilities

_SIGMA = 0.125  # of a window's side, as nnU-Net and MONAI weigh windows (Isensee et al. 2021)
_LEAST = 1e-3  # weight at the very corner: somewhere it is all that there is


def probability_map(logits: np.ndarray, windows: Sequence[Window], size: tuple[int, int], square: Square) -> np.ndarray:
    """Return probabilities at the image's own size; overlapping windows are averaged, their middles weigh most.

    Args:
        logits: (T, S, S) float, one per window.
        windows: T of them.
        size: (height, width) of the image in pixels.
        square: of the model's input.

    Returns:
        (height, width) float32, column-major in memory.
    """
    if len(windows) == 1:
        return probabilities(square.enlarge_logits(logits[0], size))
    total, weight = np.zeros(size, np.float32, order="F"), np.zeros(size, np.float32, order="F")
    share = np.outer(_bell(windows[0].height), _bell(windows[0].width)).astype(np.float32, order="F")
    for window_logits, window in zip(logits, windows, strict=True):
        window.cut(total)[:] += share * probabilities(square.enlarge_logits(window_logits, share.shape))
        window.cut(weight)[:] += share
    total /= weight
    return total


def _bell(length: int) -> np.ndarray:
    distance = (np.arange(length) - (length - 1) / 2) / (_SIGMA * length)
    return np.asarray(np.maximum(np.exp(-0.5 * distance**2), _LEAST))
