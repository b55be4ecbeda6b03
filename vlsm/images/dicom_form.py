"""How the pixels of a DICOM object are stored, by its header, and the numbers in a header."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

PIXEL_KEYWORDS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64, "PixelData": None}  # and their bits allocated
_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "XYB")


class HeaderError(ValueError):
    """A header element is missing or damaged. The message names the element and quotes no value."""


@dataclass(frozen=True)
class PixelForm:
    """How the pixels of an object are stored (DICOM PS3.3, C.7.6.3.1).

    Attributes:
        size: (height, width) of a frame in pixels.
        samples: values per pixel, 1 or 3.
        photometric: PhotometricInterpretation.
        is_planar: whether a frame holds all values of one colour first.
        allocated: bits that a value takes.
        stored: bits of a value.
        high_bit: position of the highest bit of a value, from 0.
        is_signed: whether values are in two's complement.
        num_frames: number of frames.
        keyword: the element that holds the pixels.
        syntax: the transfer syntax.
    """

    size: tuple[int, int]
    samples: int
    photometric: str
    is_planar: bool
    allocated: int
    stored: int
    high_bit: int
    is_signed: bool
    num_frames: int
    keyword: str
    syntax: uid.UID


def read_form(dataset: Dataset) -> PixelForm:
    """Return how the pixels of an object are stored.

    Missing elements have the value that nearly all objects have: one sample (three for the name of a colour space),
    MONOCHROME2 (RGB for three samples, PALETTE COLOR with a palette), unsigned, all allocated bits stored, the highest
    bit above the others, colours pixel by pixel. An impossible BitsStored, and a HighBit at which the stored
    bits do not fit, count as missing.

    Raises:
        HeaderError: a size or BitsAllocated is missing, or the PhotometricInterpretation is none of the standard's.
    """
    keyword = next((keyword for keyword in PIXEL_KEYWORDS if keyword in dataset), "PixelData")
    samples, photometric = _read_colour(dataset)
    allocated = PIXEL_KEYWORDS[keyword] or _needed(dataset, "BitsAllocated")
    stored = _integer(dataset, "BitsStored", allocated)
    stored = stored if 1 <= stored <= allocated else allocated
    high_bit = _integer(dataset, "HighBit", stored - 1)
    return PixelForm(
        size=(_needed(dataset, "Rows"), _needed(dataset, "Columns")),
        samples=samples,
        photometric=photometric,
        is_planar=samples > 1 and _integer(dataset, "PlanarConfiguration", 0) == 1,
        allocated=allocated,
        stored=stored,
        high_bit=high_bit if stored - 1 <= high_bit < allocated else stored - 1,
        is_signed=_integer(dataset, "PixelRepresentation", 0) == 1,
        num_frames=_integer(dataset, "NumberOfFrames", 1) or 1,
        keyword=keyword,
        syntax=dataset.file_meta.TransferSyntaxUID,
    )


def is_encapsulated(syntax: uid.UID) -> bool:
    """Return whether frames are compressed one by one, also for syntaxes that pydicom does not know."""
    return syntax == uid.RLELossless or syntax.startswith("1.2.840.10008.1.2.4.")


def _read_colour(dataset: Dataset) -> tuple[int, str]:
    """Return the samples of a pixel, and the photometric interpretation."""
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
    samples = _integer(dataset, "SamplesPerPixel", 3 if photometric.startswith(("RGB", "YBR")) else 1)
    if not photometric:
        has_palette = "RedPaletteColorLookupTableDescriptor" in dataset and "PixelPresentation" not in dataset
        photometric = "RGB" if samples == 3 else "PALETTE COLOR" if has_palette else "MONOCHROME2"
    if photometric not in (*_GREY, *_COLOURS) or samples not in (1, 3):
        raise HeaderError("SamplesPerPixel and PhotometricInterpretation describe no colours that are supported")
    return samples, photometric


def _needed(dataset: Dataset, keyword: str) -> int:
    if (number := read_number(dataset, keyword)) is None:
        raise HeaderError(f"its header has no {keyword}")
    return int(number)


def _integer(dataset: Dataset, keyword: str, default: int) -> int:
    number = read_number(dataset, keyword)
    return default if number is None else int(number)


def read_number(item: Dataset, keyword: str) -> float | None:
    """Return the first number of an element, or None if there is none, or it is empty or not finite.

    Raises:
        HeaderError: as for `read_numbers`.
    """
    numbers = read_numbers(item, keyword)
    return numbers[0] if numbers else None


def read_numbers(item: Dataset, keyword: str) -> list[float | None]:
    """Return the numbers of an element, with None for those that are empty or not finite.

    pydicom refuses a comma as decimal separator, which some devices write. There is no thousands separator in DICOM.
    It also refuses "US or SS" without a PixelRepresentation; then the numbers are unsigned.

    Raises:
        HeaderError: the element is not a number.
    """
    if keyword not in item:
        return []
    element: Any = item.get_item(keyword)
    try:
        return [number if np.isfinite(number) else None for number in _convert(element, item, keyword)]
    except (ValueError, TypeError, OverflowError, struct.error):
        raise HeaderError(f"its {keyword} is not a number") from None


def _convert(element: Any, item: Dataset, keyword: str) -> list[float]:
    if isinstance(element, RawDataElement):
        content: bytes = element.value or b""
        vr = dictionary_VR(keyword) if element.VR in (None, "UN") else element.VR
        if vr in ("DS", "IS"):
            words = content.decode("ascii").replace(",", ".").split("\\")
            return [float(word.strip(" \0") or "nan") for word in words]
        if vr.startswith(("US", "SS")):
            order, code = "><"[element.is_little_endian], "h" if vr == "SS" else "H"
            return list(struct.unpack(f"{order}{len(content) // 2}{code}", content))
    value = item[keyword].value
    several = [] if value is None else [value] if isinstance(value, (str, int, float)) else list(value)
    return [np.nan if number in (None, "") else float(number) for number in several]
