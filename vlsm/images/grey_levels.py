"""Conversion of grey values of any range to 8 bits."""

import numpy as np

Window = tuple[float, float]


def window_edges(window: Window) -> tuple[float, float]:
    """Return the grey values (black, white) of a window (center, width)."""
    center, width = window
    return center - width / 2, center + width / 2


def scale_to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values linearly to 8 bits, from low (0) to high (255). Values outside are clipped.

    Args:
        values: any shape, float; overwritten. Values that are not finite count as low.
        low: becomes 0.
        high: becomes 255. If it is not above low, all values above low become 255.

    Returns:
        uint8 of the same shape.
    """
    values[~np.isfinite(values)] = low
    if not high > low:
        return np.where(values > low, np.uint8(255), np.uint8(0))
    with np.errstate(over="ignore", invalid="ignore"):  # high - low may overflow
        values -= low
        values /= high - low
        values *= 255
        np.clip(values, 0, 255, out=values)
        values += 0.5
    return np.nan_to_num(values, copy=False).astype(np.uint8)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the (minimum, maximum) of the finite values, or (0, 0) if there are none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    """Return a grey image (H, W) as (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)
