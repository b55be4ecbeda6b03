"""The one rule that turns stored values of any type into 8-bit levels, for all formats.

The first row that applies is the rule of an image:

window      the setting `window` states the values that become black and white, in DICOM and volumes, and in every
            image with more than 8 bits.
declared    the file states them: a DICOM window or table, the display range of a NIfTI header. A range that holds none
            of the image's values, or of which they span less than one level, is ignored.
stored      unsigned values of at most 8 bits stay unchanged, but for volumes and rescaled DICOM: these are
            measurements.
full range  the values are brightnesses (PNG, TIFF, colour) and span at least half of the range that their bits can
            hold: this whole range is shown.
contrast    otherwise from the lowest to the highest value: 12 bits in 16 and float values are of this kind.

A few extreme values, such as hot pixels, do not count for the last two: if the range without 0.5 % of the values at
each end is less than half as wide, the values span this narrower range.

Only finite values count, without the values that a file declares as padding or "no data".
"""

import math
from typing import NamedTuple

import numpy as np

Window = tuple[float, float]
Range = tuple[float, float]

STORED, WINDOW, DECLARED, FULL_RANGE, CONTRAST = RULES = "stored", "window", "declared", "full range", "contrast"

_TRIMMED = 0.005  # fraction of the values at each end that may be extreme
_FEWEST = 100  # values of an image in which some count as extreme
_NUM_SAMPLES = 1 << 20  # values of an image or volume that are looked at for extreme values
_LEAST_SHARE = 1 / 255  # of a declared range, that different values must span
_NO_VALUE = 3.4e38  # software writes the largest float32 where it has no value


class Levels(NamedTuple):
    """How the values of an image become grey levels.

    Attributes:
        rule: one of RULES.
        low: becomes 0.
        high: becomes 255.
    """

    rule: str
    low: float
    high: float


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: (H, W, 3) uint8, RGB.
        rule: the rule that gave its levels, one of RULES.
    """

    pixels: np.ndarray
    rule: str


def choose_levels(
    values: np.ndarray, window: Window | None = None, declared: Range | None = None, full: Range | None = None
) -> Levels:
    """Return the levels of an image or a volume by the rule of this module.

    Args:
        values: any shape, integer or float, without padding.
        window: the setting (center, width), or None.
        declared: the (black, white) that the file states, or None. If both are equal, higher values are white.
        full: the lowest and highest value that the stored bits can hold, if the values are brightnesses, or None.
    """
    if window is not None:
        return Levels(WINDOW, *window_edges(window))
    if declared is not None and np.isfinite(declared).all() and _covers(declared, values):
        return Levels(DECLARED, *declared)
    low, high = _without_extremes(values, *value_range(values))
    if full is not None and high - low >= (full[1] - full[0]) / 2:
        return Levels(FULL_RANGE, *full)
    return Levels(CONTRAST, low, high)


def show(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Return values of any type as 8-bit grey levels, uint8 of the same shape."""
    exact = np.float32 if values.dtype.itemsize <= 2 else np.float64
    return scale_to_bytes(values.astype(exact), levels.low, levels.high)


def window_edges(window: Window) -> Range:
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
    values[~_is_value(values)] = low
    if not high > low:
        return np.where(values > low, np.uint8(255), np.uint8(0))
    with np.errstate(over="ignore", invalid="ignore"):  # high - low may overflow
        values -= low
        values /= high - low
        values *= 255
        np.clip(values, 0, 255, out=values)
        values += 0.5
    return np.nan_to_num(values, copy=False).astype(np.uint8)


def value_range(values: np.ndarray) -> Range:
    """Return the (minimum, maximum) of the finite values, or (0, 0) if there are none."""
    finite = _finite(values)
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    """Return a grey image (H, W) as (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def _is_value(values: np.ndarray) -> np.ndarray:
    if values.dtype.itemsize < 4:
        return np.isfinite(values)
    with np.errstate(invalid="ignore"):
        is_value: np.ndarray = np.abs(values) < _NO_VALUE
    return is_value


def _finite(values: np.ndarray) -> np.ndarray:
    """Return the finite values, a flat array; integers as they are."""
    return values if values.dtype.kind in "iub" else values[_is_value(values)]


def _covers(declared: Range, values: np.ndarray) -> bool:
    """Return whether a declared range shows anything: some values lie inside, or some below and some above.

    The edges do not count. They are black and white, and often the background has one of these values. Different values
    that span less than one level of 255 show nothing either.
    """
    sample = _finite(sample_values(values))
    if not sample.size:
        return True
    ends = np.array([sample.min(), sample.max()], np.float64)
    if ends[0] == ends[1]:
        return bool(declared[0] <= ends[0] <= declared[1])
    if np.ptp(np.clip(ends, *declared)) < _LEAST_SHARE * (declared[1] - declared[0]):
        return False
    is_below, is_above = sample < declared[0], sample > declared[1]
    is_inside = (sample > declared[0]) & (sample < declared[1])
    return bool(is_inside.any() or (is_below.any() and is_above.any()))


def _without_extremes(values: np.ndarray, low: float, high: float) -> Range:
    """Return (low, high), or the ends of the middle 99 % of the values if these are less than half as far apart."""
    sample = _finite(sample_values(values)).ravel()
    if sample.size < _FEWEST:
        return low, high
    num_trimmed = math.ceil(_TRIMMED * sample.size)
    ends = num_trimmed, sample.size - 1 - num_trimmed
    inner_low, inner_high = (float(value) for value in np.partition(sample, ends)[list(ends)])
    return (inner_low, inner_high) if 0 < inner_high - inner_low < (high - low) / 2 else (low, high)


def sample_values(values: np.ndarray) -> np.ndarray:
    """Return at most about a million evenly spaced values, flat."""
    flat = values.ravel(order="K")
    step = -(-flat.size // _NUM_SAMPLES)
    while step > 1 and np.gcd(step, flat.size) > 1:  # a common divisor would sample the same few columns
        step += 1
    return flat[:: step or 1]
