"""Grey values of any range to the 8 bits that a model sees."""

import numpy as np

Window = tuple[float, float]


def window_edges(window: Window) -> tuple[float, float]:
    """The values (black, white) of a window (center, width)."""
    center, width = window
    return center - width / 2, center + width / 2


def scale_to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as 8 bits, linear from low (0) to high (255); what lies outside is cut off.

    Args:
        values: any shape, float; overwritten. What is not finite counts as low.
        low: becomes 0.
        high: becomes 255. Where it is not above low, all above low are 255.

    Returns:
        uint8 of the same shape.
    """
    values[~np.isfinite(values)] = low
    if not high > low:
        return np.where(values > low, np.uint8(255), np.uint8(0))
    with np.errstate(over="ignore", invalid="ignore"):  # of edges as far apart as floats go
        values -= low
        values /= high - low
        values *= 255
        np.clip(values, 0, 255, out=values)
        values += 0.5
    return np.nan_to_num(values, copy=False).astype(np.uint8)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The (minimum, maximum) of what is finite; (0, 0) where nothing is."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    """A grey image (H, W) as (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)
