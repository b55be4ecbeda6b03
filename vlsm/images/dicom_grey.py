"""Turns the stored grey values of a DICOM frame into 8-bit levels.

The order is the standard's: the modality's table or rescale, then the VOI table or window (PS3.3, C.11.1 and C.11.2).

pydicom's `apply_rescale`, `apply_windowing` and `apply_voi_lut` are not used. They need one flat data set, so windows
of functional groups would be copied into it. They refuse a window without a partner, a width of 1 and a decimal comma.
They compute in float64 with four masks, and their result still needs scaling: 5 megapixels take twice as long.
"""

import numpy as np
from pydicom.dataset import Dataset

from vlsm.images.dicom_form import PixelForm, read_number, read_numbers
from vlsm.images.dicom_tables import read_table
from vlsm.images.grey_levels import (
    CONTRAST,
    DECLARED,
    STORED,
    Decoded,
    Range,
    Window,
    choose_levels,
    scale_to_bytes,
    show,
    window_edges,
)


def show_grey(
    stored: np.ndarray, dataset: Dataset, form: PixelForm, frame: int, window: Window | None
) -> tuple[np.ndarray, str]:
    """Return the levels of stored grey values (H, W) as uint8, before MONOCHROME1 is inverted, and the rule.

    Args:
        stored: (H, W), integer or float.
        dataset: the header.
        form: how the pixels are stored.
        frame: number of the frame, whose own window and rescale come first.
        window: the setting, in the modality's units.
    """
    voi = _macro(dataset, "FrameVOILUTSequence", frame)
    values, is_rescaled = _rescale(stored, dataset, form, frame)
    is_padding = _find_padding(stored, dataset, form)
    own = read_window(voi)
    counted = values[~is_padding] if is_padding.any() else values
    levels = choose_levels(counted, window, own and _edges(own, voi))
    if window is None and voi.get("VOILUTSequence"):
        table = read_table(voi.VOILUTSequence[0], form.syntax)
        shown = table.look_up(np.rint(values)).astype(np.float32)
        return scale_to_bytes(shown, 0, 2**table.depth - 1), DECLARED
    if own and levels.rule == DECLARED:
        return _apply_window(values, own, voi), DECLARED
    if levels.rule == CONTRAST and stored.dtype == np.uint8 and form.stored == 8 and not is_rescaled:
        return stored, STORED
    shown = show(values, levels)
    if levels.rule == CONTRAST:
        shown[is_padding] = 255 if form.photometric == "MONOCHROME1" else 0  # black also if it is above all values
    return shown, levels.rule


def show_colours(stored: np.ndarray, form: PixelForm) -> Decoded:
    """Return the image of stored colours (H, W, 3) of any depth."""
    if stored.dtype == np.uint8:
        return Decoded(stored, STORED)
    levels = choose_levels(stored, full=(0, 2**form.stored - 1))
    return Decoded(show(stored, levels), levels.rule)


def read_window(voi: Dataset) -> Window | None:
    """Return the first window (center, width) of an item that has both numbers and a width above 0, or None."""
    pairs = zip(read_numbers(voi, "WindowCenter"), read_numbers(voi, "WindowWidth"), strict=False)
    return next(((center, width) for center, width in pairs if center is not None and width and width > 0), None)


def _apply_window(values: np.ndarray, window: Window, voi: Dataset) -> np.ndarray:
    """Return the values after the object's window, (H, W) uint8; `values` is overwritten (PS3.3, C.11.2.1)."""
    if _function(voi) == "SIGMOID":
        center, width = window
        with np.errstate(over="ignore"):
            return scale_to_bytes(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    return scale_to_bytes(values, *_edges(window, voi))


def _edges(window: Window, voi: Dataset) -> Range:
    """Return the values (black, white) of the object's window. They are equal for a window of width 1."""
    center, width = window
    if _function(voi) == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
    return window_edges((center, width))


def _function(voi: Dataset) -> str:
    return str(voi.get("VOILUTFunction") or "LINEAR").strip().upper()


def _rescale(stored: np.ndarray, dataset: Dataset, form: PixelForm, frame: int) -> tuple[np.ndarray, bool]:
    """Return the values in the modality's units, (H, W) float, and whether they differ from the stored values."""
    exact = np.float32 if stored.dtype.itemsize <= 2 else np.float64
    if tables := dataset.get("ModalityLUTSequence"):
        return read_table(tables[0], form.syntax).look_up(stored).astype(exact), True
    macro = _macro(dataset, "PixelValueTransformationSequence", frame)
    slope, intercept = read_number(macro, "RescaleSlope"), read_number(macro, "RescaleIntercept")
    slope, intercept = slope or 1.0, intercept or 0.0  # a slope of 0 would make every image black
    values: np.ndarray = stored.astype(exact)
    values *= slope
    values += intercept
    return values, (slope, intercept) != (1.0, 0.0)


def _find_padding(stored: np.ndarray, dataset: Dataset, form: PixelForm) -> np.ndarray:
    """Return where a frame has padding, (H, W) bool. A frame of padding alone counts as a frame without padding.

    Padding that the type of the pixels cannot hold was written with the wrong sign or width: its lowest bits count.
    """
    low, high = read_number(dataset, "PixelPaddingValue"), read_number(dataset, "PixelPaddingRangeLimit")
    if low is None:
        return np.zeros(stored.shape, bool)
    if stored.dtype.kind != "f":
        low, high = _wrap(low, form), None if high is None else _wrap(high, form)
    low, high = sorted((low, low if high is None else high))
    is_padding = (stored >= low) & (stored <= high)
    return is_padding if not is_padding.all() else ~is_padding


def _wrap(value: float, form: PixelForm) -> float:
    """Return the value in the range of stored values that has the same lowest bits.

    The value stays if its lowest bits are all set: these are the highest value too, and not only padding has that.
    """
    lowest = -(2 ** (form.stored - 1)) if form.is_signed else 0
    for bits in (form.allocated, form.stored):
        if lowest <= value < lowest + 2**form.stored:
            return value
        wrapped = (int(value) - lowest) % 2**bits + lowest
        if wrapped == lowest + 2**form.stored - 1:
            return value
        value = wrapped
    return value


def _macro(dataset: Dataset, keyword: str, frame: int) -> Dataset:
    """Return the item of a functional group for this frame, or the shared item, or the object itself."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = dataset.get(groups) or ()
        if index < len(sequence) and (macro := sequence[index].get(keyword)):
            return macro[0]
    return dataset
