"""Every DICOM file in pydicom's wheel, compared with pydicom's own pipeline."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.pixels import pixel_array
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

from vlsm.errors import ImageError
from vlsm.images.dicom import DicomImages, count_frames, is_dicom
from vlsm.images.formats import HEAD_BYTES

FOLDER = Path(pydicom.data.__file__).parent

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def scale(values, low, high):
    return np.floor(np.clip((values.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1) * 255 + 0.5)


def expected_image(dataset, frame):
    """The image by pydicom. Without a window it returns grey values, not levels: the rule for these is ours."""
    stored = pixel_array(dataset, index=frame)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        painted = apply_color_lut(stored, dataset)[..., :3]
        return painted >> 8 if painted.dtype.itemsize == 2 else painted
    if stored.ndim == 3:
        return stored >> (8 * stored.dtype.itemsize - 8)
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        table = apply_voi_lut(values.astype(np.int32), dataset)
        grey = scale(table, 0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif dataset.get("WindowWidth"):
        shown = apply_voi_lut(values, dataset)
        low, high = (
            0 if dataset.PixelRepresentation == 0 else -(2 ** (dataset.BitsStored - 1)),
            2**dataset.BitsStored - 1,
        )
        low, high = (low, high) if dataset.PixelRepresentation == 0 else (low, -low - 1)
        slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
        grey = scale(shown, low * slope + intercept, high * slope + intercept)
    elif stored.dtype == np.uint8:
        grey = stored
    else:
        return values
    return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[..., None], 3, axis=2)


def compare(path):
    """How our first frame differs from pydicom's: "same", or what differs."""
    data = path.read_bytes()
    try:
        num_frames = count_frames(io.BytesIO(data), path.name)
    except ImageError as error:
        return f"listing: {error}"
    if not num_frames:
        return "passed over"
    try:
        ours = DicomImages(data, path.name, 10**9, None).decode(0).pixels
    except ImageError as error:
        ours = f"{error}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = expected_image(pydicom.dcmread(path, force=True), 0)
    except Exception as error:
        theirs = f"{type(error).__name__}: {error}"
    if isinstance(ours, str) or isinstance(theirs, str):
        return "; ".join(found if isinstance(found, str) else "read" for found in (ours, theirs))
    if theirs.ndim == 2:
        order = np.argsort(theirs.ravel(), kind="stable")
        return "same" if (np.diff(ours[..., 0].ravel()[order].astype(int)) >= 0).all() else "another order"
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    return "same" if difference.max() <= 1 else f"differs by {difference.mean():.1f}, at most {difference.max()}"


def files():
    """All files of the wheel that are DICOM by their beginning, or by their name."""
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.is_file()]
    return [path for path in paths if path.suffix == ".dcm" or is_dicom(path.read_bytes()[:HEAD_BYTES])]


# all that differs, with the reason
DIFFERENCES = {
    # pydicom has no decoder with a free licence for 12-bit JPEG; libjpeg-turbo has
    "JPEG-lossy.dcm": "read; RuntimeError",
    "JPGExtended.dcm": "read; RuntimeError",
    # the delimiter stands in the size of its codestream: no decoder reads it
    "JPEG2000-embedded-sequence-delimiter.dcm": "corrupt: .* the size of frame 0 .*; RuntimeError",
    "MR_truncated.dcm": "corrupt: .* frame 0 cannot be decoded: .* fewer bytes .*; ValueError",  # some rows are missing
    # made to test parsers: pixels without a description
    "meta_missing_tsyntax.dcm": "listing: corrupt: .* its header has no BitsAllocated",
    "nested_priv_SQ.dcm": "listing: corrupt: .* its header has no BitsAllocated",
    # the declared window, from -20 to 80, lies below all values: pydicom shows a white image
    "17166": "differs by 40",
    "17196": "differs by 143",
}


def test_every_file_has_the_pixels_that_pydicom_finds():
    found = {path.name: compare(path) for path in files()}
    num_pictures = sum(result != "passed over" for result in found.values())
    assert num_pictures > 70
    different = {name: result for name, result in found.items() if result not in ("same", "passed over")}
    assert different.keys() == DIFFERENCES.keys()
    for name, result in different.items():
        assert re.match(DIFFERENCES[name], result), f"{name}: {result}"
