"""Join the probabilities of overlapping windows to one map of the whole image."""

from collections.abc import Sequence

import numpy as np

from vlsm.images.preprocess import Square
from vlsm.images.windows import Window
from vlsm.segmentation.masks import probabilities

_SIGMA = 0.125  # times a window's side: the weights of nnU-Net and MONAI (Isensee et al. 2021)
_MIN_WEIGHT = 1e-3  # more than 0: some pixels of the image lie only near the edge of a window


def probability_map(logits: np.ndarray, windows: Sequence[Window], size: tuple[int, int], square: Square) -> np.ndarray:
    """Return probabilities at the original size of the image.

    Overlapping windows are averaged. The middle of a window has the largest weight.

    Args:
        logits: (T, S, S) float, one per window.
        windows: the T windows of the image.
        size: (height, width) of the image in pixels.
        square: the input square of the model.

    Returns:
        (height, width) float32, column-major in memory.
    """
    if len(windows) == 1:
        return probabilities(square.enlarge_logits(logits[0], size))
    total, weight = np.zeros(size, np.float32, order="F"), np.zeros(size, np.float32, order="F")
    share = window_weights(windows[0].height, windows[0].width)
    for window_logits, window in zip(logits, windows, strict=True):
        window.cut(total)[:] += share * probabilities(square.enlarge_logits(window_logits, share.shape))
        window.cut(weight)[:] += share
    total /= weight
    return total


def window_weights(height: int, width: int) -> np.ndarray:
    """Return the weight of each pixel of a window, (height, width) float32, column-major in memory."""
    return np.outer(_bell(height), _bell(width)).astype(np.float32, order="F")


def _bell(length: int) -> np.ndarray:
    """Return Gaussian weights along one side of a window, (length,) float."""
    distance = (np.arange(length) - (length - 1) / 2) / (_SIGMA * length)
    return np.asarray(np.maximum(np.exp(-0.5 * distance**2), _MIN_WEIGHT))
