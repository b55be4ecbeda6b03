"""Decodes the frames of DICOM objects to 8-bit images, as a viewer shows them.

Only the header elements that the pixels need are parsed. Messages never contain a header value, because headers hold
patient data.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from vlsm.errors import ImageError
from vlsm.images import video
from vlsm.images.dicom_form import HeaderError, PixelForm, is_encapsulated, read_form
from vlsm.images.dicom_grey import show_colours, show_grey
from vlsm.images.dicom_header import quiet, read_header
from vlsm.images.dicom_pixels import read_frame
from vlsm.images.dicom_tables import first_of_palette, has_supplemental_palette, paint_palette
from vlsm.images.dicom_video import choose_frames, open_stream
from vlsm.images.formats import NoImages
from vlsm.images.grey_levels import STORED, Decoded, Window, as_rgb
from vlsm.limits import MAX_IMAGES

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

T = TypeVar("T")

PIXEL_DATA_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_FLOAT_BITS = {0x7FE00008: 32, 0x7FE00009: 64}
_TIME_TAGS = [0x00082144, 0x00180040, 0x00181063, 0x00181065]  # frame rates and times
_HEADER_TAGS = [0x00080016, 0x00089205, *_TIME_TAGS, *range(0x00280002, 0x00280012), *range(0x00280100, 0x00280104)]
_LAST_OF_DESCRIPTION, _LAST_BEFORE_PIXELS = 0x00280103, 0x7FE00007
_NO_PICTURES = {
    uid.MediaStorageDirectoryStorage: "DICOMDIR",
    uid.SegmentationStorage: "Segmentation Storage",
    "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage",
    uid.RTDoseStorage: "RT Dose Storage",
}
_IMAGE_TAGS = [
    0x00089205,  # PixelPresentation
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
_ITEM = b"\xfe\xff\x00\xe0"
_SMALL_BYTES = 1 << 16  # so many bytes of a file are read at once anyway
_MAX_HEADER_BYTES = 4 << 20  # unpacked from a deflated object to count its frames


def is_dicom(head: bytes) -> bool:
    """Return whether a file with these first 132 bytes is a DICOM file, with a preamble or (old software) without."""
    if head[128:132] == b"DICM":
        return True
    # Without a preamble: the first element is of group 2 or 8, explicit or implicit VR, little endian.
    is_short = head[4:6].isalpha() and head[4:6].isupper() or head[5:8] == b"\0\0\0"
    return len(head) >= 132 and head[0] in (2, 8) and head[1] == head[3] == 0 and head[2] <= 0x18 and is_short


def read_description(
    file: BinaryIO, name: str = "the file", size_bytes: int | None = None
) -> tuple[PixelForm, Dataset]:
    """Return how the pixels of a DICOM file are stored, and the elements of its header that listing needs.

    Args:
        file: at its start. It is read up to the end of the pixel description; long elements are skipped.
        name: the file's name in error messages.
        size_bytes: size of the file, or None to seek its end.

    Raises:
        NoImages: the object has no pixels (a report, a presentation state, a DICOMDIR), or its pixels are no picture (a
            segmentation, a dose). A parametric map is a picture.
        ImageError: "corrupt".
    """
    with damage(name):
        header, num_bytes = _read_pixel_header(file, name, size_bytes)
        return _check_form(header, num_bytes, name), header


def count_frames(file: BinaryIO, name: str = "the file") -> int:
    """Return the number of images in a DICOM file, 0 if it is no picture. See `read_description`."""
    try:
        return read_description(file, name)[0].num_frames
    except NoImages:
        return 0


def _read_pixel_header(file: BinaryIO, name: str, size_bytes: int | None) -> tuple[Dataset, int]:
    """Return the pixel description of an object with pixels, and the size of the file in bytes.

    A small file, and one without a complete description, is read up to its pixels, to know that it has some.
    """
    num_bytes = file.seek(0, io.SEEK_END) if size_bytes is None else size_bytes
    seen: list[int] = []
    for last in (_LAST_OF_DESCRIPTION, _LAST_BEFORE_PIXELS)[num_bytes <= _SMALL_BYTES :]:
        file.seek(0)
        stop = functools.partial(_is_past, last, seen)
        header = read_header(file, stop, _HEADER_TAGS, _MAX_HEADER_BYTES, name)
        if _class_of(header) in _NO_PICTURES:
            raise NoImages(_describe(header))
        described = [keyword for keyword in ("Rows", "Columns", "BitsAllocated") if keyword in header]
        has_pixels = any(tag in PIXEL_DATA_TAGS for tag in seen)
        if seen and not described and not has_pixels:
            raise NoImages(_describe(header))
        if seen and last == _LAST_OF_DESCRIPTION and len(described) == 3:
            return header, num_bytes
    if not has_pixels:
        if header.is_cut:
            raise ImageError("corrupt", f"{name} ends inside of its DICOM header")
        raise NoImages(_describe(header))
    if "BitsAllocated" not in header and seen[-1] in _FLOAT_BITS:
        header.BitsAllocated = _FLOAT_BITS[seen[-1]]
    return header, num_bytes


def _is_past(last: int, seen: list[int], tag: int, vr: str | None, length: int) -> bool:
    if tag > _LAST_OF_DESCRIPTION:
        seen.append(tag)
    return tag > last


def _class_of(header: Dataset) -> str:
    return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")


def _describe(header: Dataset) -> str:
    """Return a label for counting: the name of the object's class in the standard. It quotes no value of the header."""
    kind = uid.UID(_class_of(header))
    known = _NO_PICTURES.get(kind) or (kind.name if kind.name != kind else "of an unknown class")
    return f"DICOM without a picture: {known}"


@contextlib.contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn every error that a damaged header causes into an ImageError that quotes no header value."""
    try:
        with quiet():
            yield
    except (ImageError, NoImages):
        raise
    except HeaderError as error:
        raise ImageError("corrupt", f"{name}: {error}") from None
    except Exception as error:  # damage causes errors of any type; their texts quote header values
        raise ImageError("corrupt", f"{name}: its DICOM header is damaged ({type(error).__name__})") from None


def _check_form(header: Dataset, num_bytes: int, name: str) -> PixelForm:
    """Return how pixels are stored, after a check of the number and size of the frames; `num_bytes` is of the file."""
    form = read_form(header)
    height, width = form.size
    if not (0 < height < 1 << 16 and 0 < width < 1 << 16 and form.num_frames <= MAX_IMAGES):
        raise ImageError("corrupt", f"{name} has frames of no size, or more of them than any file has")
    least = form.num_frames * height * width * form.allocated * form.samples // 8
    if form.photometric.endswith("_422"):
        least = least * 2 // 3  # two pixels share a colour
    if form.syntax in uid.MPEGTransferSyntaxes:
        least = 0  # frames have no bytes of their own
    elif is_encapsulated(form.syntax):
        least = form.num_frames * 8  # an encapsulated frame has an item header of 8 bytes
    elif form.syntax == uid.DeflatedExplicitVRLittleEndian:
        least //= 1032  # deflate compresses 1,032-fold at most
    if form.num_frames < 1 or (form.num_frames > 1 and least > num_bytes):
        raise ImageError("corrupt", f"{name} has fewer bytes than its {form.num_frames:,} frames need")
    return form


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
        if (num_items := data.count(_ITEM)) > 2 * MAX_IMAGES:  # each takes 8 bytes here, and a kilobyte in pydicom
            raise ImageError("too_large", f"{name} has {num_items:,} items; {2 * MAX_IMAGES:,} are the most")
        with damage(name):
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
        self.is_video = self._dataset.file_meta.TransferSyntaxUID in uid.MPEGTransferSyntaxes

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
        return self._read(frame, self._show)

    def labels(self, frame: int) -> np.ndarray:
        """Return the labels of one frame, (H, W): stored values without rescale and window; of colours the brightest.

        Arguments and errors as for `decode`.
        """
        return self._read(frame, lambda stored, *_: stored if stored.ndim == 2 else stored.max(axis=2))

    def _read(self, frame: int, use: Callable[[np.ndarray, PixelForm, int], T]) -> T:
        """Return the result of a function of stored values (H, W) or (H, W, 3), their form, and the frame."""
        if not 0 <= frame < self.num_frames:
            raise ImageError("corrupt", f"{self._name} has {self.num_frames:,} frames and no frame {frame}")
        try:
            with quiet():
                form = read_form(self._dataset)
                stored = read_frame(self._dataset, form, frame, self._name)
                if stored.shape[:2] == self._size:
                    return use(stored, form, frame)
        except ImageError:
            raise
        except HeaderError as error:
            raise ImageError("corrupt", f"{self._name}: frame {frame} cannot be decoded: {error}") from None
        except Exception as error:  # decoders raise errors of any type for damage; their texts quote values
            kind = type(error).__name__
            raise ImageError("corrupt", f"{self._name}: frame {frame} cannot be decoded ({kind})") from None
        raise ImageError("corrupt", f"{self._name}: the size of frame {frame} is not that of its header")

    def _show(self, stored: np.ndarray, form: PixelForm, frame: int) -> Decoded:
        """Return the image of stored values, (H, W) or (H, W, 3)."""
        if form.photometric == "PALETTE COLOR" and stored.ndim == 2:
            return Decoded(paint_palette(stored, self._dataset, form.syntax), STORED)
        if stored.ndim == 3:
            return show_colours(stored, form)
        grey, rule = show_grey(stored, self._dataset, form, frame, self._window)
        image = as_rgb(255 - grey if form.photometric == "MONOCHROME1" else grey)
        if has_supplemental_palette(self._dataset):
            is_coloured = stored >= first_of_palette(self._dataset)
            image[is_coloured] = paint_palette(stored, self._dataset, form.syntax)[is_coloured]
        return Decoded(image, rule)


def sniff(head: bytes) -> bool:
    """Whether a file whose name tells nothing is a DICOM file; see `vlsm.images.formats.Format`."""
    return is_dicom(head)


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[Sequence[str | None], tuple[int, int]]:
    """The frames of an object, and their size; see `vlsm.images.formats.FormatModule`."""
    form, header = read_description(file, name, size_bytes)
    if form.syntax in uid.MPEGTransferSyntaxes:
        video.import_av(f"{name} ({form.syntax.name})")
        described = f"{name} ({form.syntax.name})"
        return video.list_images(open_stream(file, name), described, None, look)
    if form.num_frames == 1:
        return [None], form.size
    return [f"frame={frame}" for frame in choose_frames(look.frames, form.num_frames, header)], form.size


def open_images(data: bytes, name: str, settings: "SegmentSettings") -> Callable[[str | None], Decoded]:
    """The frames of an object; see `vlsm.images.formats.FormatModule`."""
    images = DicomImages(data, name, settings.max_pixels, settings.window, settings.max_image_bytes)
    if images.is_video:
        return video.open_images(open_stream(io.BytesIO(data), name), name, settings)
    return lambda selector: images.decode(int(selector.partition("=")[2]) if selector else 0)


def open_labels(data: bytes, name: str, settings: "SegmentSettings") -> Callable[[str | None], np.ndarray]:
    """The labels of the frames of an object, also of a segmentation; see `vlsm.images.formats.LabelModule`."""
    images = DicomImages(data, name, settings.max_pixels, None, settings.max_image_bytes)
    return lambda selector: images.labels(int(selector.partition("=")[2]) if selector else 0)
