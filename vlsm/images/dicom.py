"""Decodes the frames of DICOM objects to 8-bit images, as a viewer shows them.

Only the header elements that the pixels need are parsed. Messages never contain a header value, because headers hold
patient data.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from vlsm.errors import ImageError
from vlsm.images.dicom_header import quiet, read_header
from vlsm.images.dicom_pixels import paint_palette, read_frame
from vlsm.images.grey_levels import (
    CONTRAST,
    DECLARED,
    STORED,
    Decoded,
    Range,
    Window,
    as_rgb,
    choose_levels,
    scale_to_bytes,
    show,
)

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

PIXEL_DATA_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_HEADER_TAGS = [0x00080016, 0x00280002, 0x00280008, 0x00280010, 0x00280011, 0x00280100]
_IMAGE_TAGS = [
    *range(0x00280002, 0x00280012),  # size and type of the pixels
    *range(0x00280100, 0x00280104),  # bits of a pixel
    *(0x00280120, 0x00280121),  # padding
    *(0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00281056),  # window, rescale
    *range(0x00281101, 0x00281104),  # palettes
    *range(0x00281201, 0x00281204),
    *range(0x00281221, 0x00281224),
    *(0x00283000, 0x00283010),  # lookup tables
    *(0x52009229, 0x52009230),  # shared and per-frame functional groups
    *(0x7FE00001, 0x7FE00002, *PIXEL_DATA_TAGS),
]
_MAX_FRAMES = 1_000_000
_MAX_HEADER_BYTES = 4 << 20  # unpacked from a deflated object to count its frames


def is_dicom(head: bytes) -> bool:
    """Return whether a file with these first 132 bytes is a DICOM file, with a preamble or (old software) without."""
    if head[128:132] == b"DICM":
        return True
    # Without a preamble: the first element is of group 2 or 8, explicit or implicit VR, little endian.
    is_short = head[4:6].isalpha() and head[4:6].isupper() or head[5:8] == b"\0\0\0"
    return len(head) >= 132 and head[0] in (2, 8) and head[1] == head[3] == 0 and head[2] <= 0x18 and is_short


def read_shape(file: BinaryIO, name: str = "the file", size_bytes: int | None = None) -> tuple[int, int, int]:
    """Return the number of images in a DICOM file, and their height and width in pixels, from its header.

    Args:
        file: at its start. It is read up to the end of the pixel description; long elements are skipped.
        name: the file's name in error messages.
        size_bytes: size of the file, or None to seek its end.

    Returns:
        (number of images, height, width). The number is 0 if the object has no pixels (a report, a presentation state,
        a DICOMDIR) or is a segmentation.

    Raises:
        ImageError: "corrupt".
    """
    with _damage(name):
        header, is_whole = _read_pixel_header(file, name)
        num_bytes = file.seek(0, io.SEEK_END) if size_bytes is None else size_bytes
        return _count(header, is_whole, num_bytes, name), int(header.get("Rows") or 0), int(header.get("Columns") or 0)


def count_frames(file: BinaryIO, name: str = "the file") -> int:
    """Return the number of images in a DICOM file; arguments and errors as for `read_shape`."""
    return read_shape(file, name)[0]


def _read_pixel_header(file: BinaryIO, name: str) -> tuple[Dataset, bool]:
    """Return the pixel description, and whether it is complete. Otherwise the file ends before its end."""
    seen: list[int] = []

    def is_past(tag: int, vr: str | None, length: int) -> bool:
        if tag > 0x00280103:
            seen.append(tag)
        return bool(seen)

    return read_header(file, is_past, _HEADER_TAGS, _MAX_HEADER_BYTES, name), bool(seen)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn every error that a damaged header causes into an ImageError that quotes no header value."""
    try:
        with quiet():
            yield
    except ImageError:
        raise
    except Exception as error:  # damage causes errors of any type; their texts quote header values
        raise ImageError("corrupt", f"{name}: its DICOM header is damaged ({type(error).__name__})") from None


def _count(header: Dataset, is_whole: bool, num_bytes: int, name: str) -> int:
    """Return the number of images that a header describes; `num_bytes` is the size of the file."""
    kinds = (header.get("SOPClassUID"), header.file_meta.get("MediaStorageSOPClassUID"))
    if uid.MediaStorageDirectoryStorage in kinds or uid.SegmentationStorage in kinds:
        return 0
    if not {"Rows", "Columns", "BitsAllocated"} <= set(header.dir()):
        if not is_whole:
            raise ImageError("corrupt", f"{name} ends inside of its DICOM header")
        return 0
    num_frames = int(header.get("NumberOfFrames") or 1)
    if not (0 < int(header.Rows) < 1 << 16 and 0 < int(header.Columns) < 1 << 16 and num_frames <= _MAX_FRAMES):
        raise ImageError("corrupt", f"{name} has frames of no size, or more of them than any file has")
    frame_bits = header.Rows * header.Columns * header.BitsAllocated * int(header.get("SamplesPerPixel") or 1)
    syntax = header.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if syntax.is_private or not (syntax.is_encapsulated or syntax.is_deflated):
        least = num_frames * frame_bits // 8
    else:  # an encapsulated frame has an item header of 8 bytes; deflate compresses 1,032-fold at most
        least = num_frames * 8 if syntax.is_encapsulated else num_frames * frame_bits // 8 // 1032
    if num_frames < 1 or (num_frames > 1 and least > num_bytes):
        raise ImageError("corrupt", f"{name} has fewer bytes than its {num_frames:,} frames need")
    return num_frames


class DicomImages:
    """The frames of one DICOM object, each as a viewer shows it: RGB, 8 bits per channel.

    Grey values first go through the modality lookup table or the rescale slope. Then they go through the given window,
    or else through the object's lookup table or first window; a table or window of the frame has priority. Without any
    window, `vlsm.images.grey_levels` states the rule; padding does not count. MONOCHROME1 is inverted.

    Args:
        data: the file's content.
        name: the file's name in error messages.
        max_pixels: frames with more pixels are refused before decoding.
        window: (center, width) in the modality's units, such as Hounsfield units; None for the object's own window.
        max_bytes: deflated objects with more bytes after unpacking are refused.

    Raises:
        ImageError: "too_large" or "corrupt".
    """

    def __init__(
        self, data: bytes, name: str, max_pixels: int, window: Window | None, max_bytes: int = 1 << 31
    ) -> None:
        self._name, self._window = name, window
        with _damage(name):
            self._dataset = read_header(io.BytesIO(data), None, _IMAGE_TAGS, max_bytes, name)
            height, width = int(self._dataset.get("Rows") or 0), int(self._dataset.get("Columns") or 0)
            self.num_frames = int(self._dataset.get("NumberOfFrames") or 1)
        if not any(tag in self._dataset for tag in PIXEL_DATA_TAGS):
            raise ImageError("corrupt", f"{name} is a DICOM object without pixels, or ends before them")
        if height * width > max_pixels:
            raise ImageError(
                "too_large",
                f"{name} is {width} x {height} = {height * width:,} pixels; max_pixels is {max_pixels:,}",
            )
        self._size = height, width

    def size(self) -> tuple[int, int]:
        """Return the (height, width) of every frame in pixels."""
        return self._size

    def decode(self, frame: int) -> Decoded:
        """Return one frame.

        Args:
            frame: its number, from 0.

        Raises:
            ImageError: "corrupt": there is no such frame, or it cannot be decoded.
        """
        if not 0 <= frame < self.num_frames:
            raise ImageError("corrupt", f"{self._name} has {self.num_frames:,} frames and no frame {frame}")
        try:
            with quiet():
                image = self._show(read_frame(self._dataset, frame, self._name), frame)
        except ImageError:
            raise
        except Exception as error:  # decoders raise errors of any type for damage; their texts quote values
            kind = type(error).__name__
            raise ImageError("corrupt", f"{self._name}: frame {frame} cannot be decoded ({kind})") from None
        if image.pixels.shape != (*self._size, 3):
            raise ImageError("corrupt", f"{self._name}: the size of frame {frame} is not that of its header")
        return image

    def _show(self, stored: np.ndarray, frame: int) -> Decoded:
        """Return the image of stored values, (H, W) or (H, W, 3)."""
        kind = self._dataset.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            return Decoded(paint_palette(stored, self._dataset), STORED)
        if stored.ndim == 3:
            return Decoded((stored >> max(self._dataset.BitsStored - 8, 0)).astype(np.uint8)[..., :3], STORED)
        grey, rule = self._show_grey(stored, frame)
        return Decoded(as_rgb(255 - grey if kind == "MONOCHROME1" else grey), rule)

    def _show_grey(self, stored: np.ndarray, frame: int) -> tuple[np.ndarray, str]:
        """Return stored grey values (H, W) as uint8, before the inversion of MONOCHROME1, and the rule."""
        voi = self._macro("FrameVOILUTSequence", frame)
        values, is_rescaled = self._rescale(stored, frame)
        is_padding = self._is_padding(stored)
        levels = choose_levels(values[~is_padding], self._window, _declared_range(voi))
        if self._window is None and (voi.get("VOILUTSequence") or levels.rule == DECLARED):
            return _apply_voi(values, voi), DECLARED
        if levels.rule == CONTRAST and stored.dtype == np.uint8 and self._dataset.BitsStored == 8 and not is_rescaled:
            return stored, STORED
        return show(values, levels), levels.rule

    def _rescale(self, stored: np.ndarray, frame: int) -> tuple[np.ndarray, bool]:
        """Return the values in the modality's units, (H, W) float, and whether they differ from the stored values."""
        exact = np.float32 if stored.dtype.itemsize <= 2 else np.float64
        if tables := self._dataset.get("ModalityLUTSequence"):
            return _look_up(stored, tables[0])[0].astype(exact), True
        macro = self._macro("PixelValueTransformationSequence", frame)
        slope, intercept = _number(macro, "RescaleSlope"), _number(macro, "RescaleIntercept")
        slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
        values: np.ndarray = stored.astype(exact)
        values *= slope
        values += intercept
        return values, (slope, intercept) != (1.0, 0.0)

    def _is_padding(self, stored: np.ndarray) -> np.ndarray:
        """Return where a frame has padding, (H, W) bool. A frame of padding alone counts as a frame without padding."""
        first = _number(self._dataset, "PixelPaddingValue")
        if first is None:
            return np.zeros(stored.shape, bool)
        last = _number(self._dataset, "PixelPaddingRangeLimit")
        low, high = sorted((first, first if last is None else last))
        is_padding = (stored >= low) & (stored <= high)
        return is_padding if not is_padding.all() else ~is_padding

    def _macro(self, keyword: str, frame: int) -> Dataset:
        """Return the item of a functional group for this frame, or the shared item, or the object itself."""
        for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
            sequence = self._dataset.get(groups) or ()
            if index < len(sequence) and (macro := sequence[index].get(keyword)):
                return macro[0]
        return self._dataset


def _declared_range(voi: Dataset) -> Range | None:
    """Return the values (black, white) of an object's window, or None if it has none."""
    center, width = _number(voi, "WindowCenter") or 0.0, _number(voi, "WindowWidth") or 0.0
    return (center - width / 2, center + width / 2) if width > 0 else None


def _apply_voi(values: np.ndarray, voi: Dataset) -> np.ndarray:
    """Return the values after the object's VOI lookup table or window, (H, W) uint8.

    Args:
        values: in the modality's units, (H, W) float; overwritten.
        voi: the item with the table or window.

    Source: DICOM PS3.3, C.11.2.
    """
    if tables := voi.get("VOILUTSequence"):
        shown, depth = _look_up(np.rint(values), tables[0])
        return scale_to_bytes(shown.astype(np.float32), 0, 2**depth - 1)
    center, width = _number(voi, "WindowCenter") or 0.0, _number(voi, "WindowWidth") or 0.0
    function = voi.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return scale_to_bytes(1 / (1 + np.exp(-4 * (values - center) / width)), 0, 1)
    if function == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
    return scale_to_bytes(values, center - width / 2, center + width / 2)


def _look_up(values: np.ndarray, item: Dataset) -> tuple[np.ndarray, int]:
    """Return the values' entries in a lookup table, and the depth of an entry in bits."""
    num_entries, first, depth = (int(number) for number in item.LUTDescriptor)
    num_entries = num_entries or 1 << 16
    content: Any = item.LUTData
    if isinstance(content, bytes):
        content = np.frombuffer(content, np.uint8 if len(content) < 2 * num_entries else np.dtype("<u2"))
    table = np.asarray(content)[:num_entries]
    if len(table) < num_entries or not 1 <= depth <= 16:
        raise ValueError("the lookup table does not match its descriptor")
    return table[np.clip(values.astype(np.float64) - first, 0, num_entries - 1).astype(np.intp)], depth


def _number(item: Dataset, keyword: str) -> float | None:
    """Return an element's number (the first of several), or None if there is none or it is not finite."""
    value = item.get(keyword)
    if value is not None and not isinstance(value, (str, bytes, int, float)):
        value = value[0] if len(value) else None
    number = None if value in (None, "") else float(value)
    return number if number is not None and np.isfinite(number) else None


def sniff(head: bytes) -> bool:
    """Whether a file whose name tells nothing is a DICOM file; see `vlsm.images.formats.Format`."""
    return is_dicom(head)


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[list[str | None], tuple[int, int]]:
    """The frames of an object, and their size; see `vlsm.images.formats.FormatModule`."""
    count, height, width = read_shape(file, name, size_bytes)
    return [f"frame={frame}" for frame in range(count)] if count > 1 else [None] * count, (height, width)


def open_images(data: bytes, name: str, settings: "SegmentSettings") -> Callable[[str | None], Decoded]:
    """The frames of an object; see `vlsm.images.formats.FormatModule`."""
    images = DicomImages(data, name, settings.max_pixels, settings.window, settings.max_image_bytes)
    return lambda selector: images.decode(int(selector.partition("=")[2]) if selector else 0)
