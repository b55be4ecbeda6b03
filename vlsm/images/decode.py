"""Decode common image files to RGB arrays, and mask files to masks."""

import io
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vlsm.config import SegmentSettings
from vlsm.images.grey_levels import Decoded, Window
from vlsm.images.stored import Stored, check_pixels, decoder_errors, full_range

try:
    import simplejpeg
except ImportError:  # machines with only torch and the model libraries lack it: Pillow returns the same pixels
    simplejpeg = None

if TYPE_CHECKING:
    from vlsm.images.formats import Look

# `vlsm.images.tiff` reads TIFF
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".j2k", ".avif"),
)
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF")

_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF 6.0, and BigTIFF
_PNG_HEAD, _JPEG_HEAD, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
_PNG_END = bytes(4) + b"IEND\xaeB`\x82"
_PNG_KEPT = (b"tRNS", b"eXIf")  # ancillary chunks that can change the picture


def decode_image(data: bytes, name: str, max_pixels: int = 100_000_000, window: Window | None = None) -> np.ndarray:
    """Return an image as a person sees it: RGB, upright, 8 bits per channel; see `decode_picture`.

    Returns:
        (H, W, 3) uint8.
    """
    return decode_picture(data, name, max_pixels, window).pixels


def decode_picture(data: bytes, name: str, max_pixels: int = 100_000_000, window: Window | None = None) -> Decoded:
    """Return an image as a person sees it: RGB, upright, 8 bits per channel.

    EXIF orientation is applied and alpha is dropped. Palette, grey and CMYK images are converted. Deeper values become
    8 bits by the rule of `vlsm.images.grey_levels`. Of an animation, and of a TIFF with several pages, only the first
    image is used. Damage beside the pixels does not matter: a PNG's ancillary chunks, a JPEG without its end marker.

    Args:
        data: the content of a JPEG, PNG, TIFF, BMP, WebP, GIF, JPEG 2000 or AVIF file. Its bytes determine the format.
        name: the name of the file in error messages.
        max_pixels: images with more pixels are refused before they are decoded.
        window: the (center, width) of the grey values to show, for more than 8 bits; None for the rule.

    Raises:
        ImageError: "too_large", or "corrupt" with the decoder's reason.
    """
    return read_stored(data, name, max_pixels).show(window)


def decode_mask_file(data: bytes, name: str, threshold: int, max_pixels: int = 100_000_000) -> np.ndarray:
    """Return the mask of a mask file: 1 where the stored value is above the threshold, else 0.

    Labels are never scaled: of 16- and 32-bit files the integer itself is compared. Of colours and palettes, the
    brightest channel counts. Black-and-white files (1 bit) have the values 0 and 255. The threshold removes noise of a
    lossy encoding.

    Args:
        data: the content of the file, as for `decode_picture`.
        name: the name of the file in error messages.
        threshold: 0 to 254.
        max_pixels: masks with more pixels are refused before they are decoded.

    Returns:
        (H, W) uint8 of 0 and 1.

    Raises:
        ImageError: as for `decode_picture`.
    """
    values = read_stored(data, name, max_pixels).values
    return ((values if values.ndim == 2 else values.max(axis=2)) > threshold).astype(np.uint8)


def read_stored(data: bytes, name: str, max_pixels: int) -> Stored:
    """Return the values of an image file; arguments and errors as for `decode_picture`."""
    if is_tiff(data):
        from vlsm.images.tiff import TiffPages  # imports more than the other formats need

        return TiffPages(data, name, max_pixels).read(None)
    with decoder_errors(name), _open(io.BytesIO(data)) as image:
        check_pixels((image.height, image.width), name, max_pixels)
        return (_read_deep(image, data) or Stored(_read_levels(image, data))).upright(_orientation(image))


def is_tiff(head: bytes) -> bool:
    """Return whether the bytes of a file begin as a TIFF does."""
    return head[:4] in _TIFF_HEADS


def _open(file: BinaryIO) -> Image.Image:
    """Return an opened file. If damage of a PNG stops Pillow, open it again without its ancillary chunks."""
    try:
        return Image.open(file, formats=_FORMATS)
    except Exception:  # the decoder can raise any error
        file.seek(0)
        if not (data := file.read()).startswith(_PNG_HEAD):
            raise
        return Image.open(io.BytesIO(_without_ancillary_chunks(data)), formats=_FORMATS)


def _read_deep(image: Image.Image, data: bytes) -> Stored | None:
    """Return the values of an image with more than 8 bits, or None. Pillow would round colours to 8 bits."""
    if image.format == "PNG" and data[24] == 16:  # bit depth, in the header chunk
        import imagecodecs

        values = _decode(image, data, imagecodecs.png_decode)
        return Stored(_without_alpha(values), full_range(values.dtype, 16))
    if image.format == "JPEG2000" and image.mode.startswith("I"):
        import imagecodecs

        values = imagecodecs.jpeg2k_decode(data)
        return Stored(_without_alpha(values), full_range(values.dtype, _jpeg2000_bits(data)))
    return None


def _decode(image: Image.Image, data: bytes, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    try:
        return decode(data)
    except RuntimeError:
        return decode(_without_ancillary_chunks(data))


def _without_alpha(values: np.ndarray) -> np.ndarray:
    """Return (H, W) or (H, W, 3) values of an image that may have an alpha channel."""
    if values.ndim == 2 or values.shape[2] == 3:
        return values
    return values[..., 0] if values.shape[2] < 3 else values[..., :3]


def _jpeg2000_bits(data: bytes) -> int:
    """Return the bits of the first component (ISO/IEC 15444-1, A.5.1, Ssiz)."""
    return (data[data.index(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1


def _read_levels(image: Image.Image, data: bytes) -> np.ndarray:
    """Return an image of 8 bits, (H, W) or (H, W, 3) uint8."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        if (pixels := _decode_jpeg(data, (image.height, image.width))) is not None:
            return pixels
    try:
        image.load()
    except Exception:  # the decoder can raise any error
        if (
            image.format == "JPEG"
            and (pixels := _decode_jpeg(data + _JPEG_END, (image.height, image.width))) is not None
        ):
            return pixels
        if image.format != "PNG" or (kept := _without_ancillary_chunks(data)) == data:
            raise
        image = Image.open(io.BytesIO(kept), formats=("PNG",))
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Return the same pixels as Pillow in half of its time, or None if the file is damaged or only Pillow can read it.

    The decoder is strict: pixels that are missing are an error.
    """
    if simplejpeg is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if pixels.shape == (*size, 3) else None


def _without_ancillary_chunks(data: bytes) -> bytes:
    """Return a PNG with only the chunks that its pixels need. Damage elsewhere, as in texts and profiles, is gone.

    Source: PNG (W3C, 3rd edition), 5.4: the first letter of an ancillary chunk is in lower case.
    """
    chunks = (chunk for kind, chunk in _png_chunks(data) if not kind[:1].islower() or kind in _PNG_KEPT)
    return _PNG_HEAD + b"".join(chunks) + _PNG_END


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type of each chunk before the last, IEND, and all of its bytes."""
    position = len(_PNG_HEAD)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        yield kind, data[position : position + 12 + length]
        position += 12 + length


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) by default.

    Pillow's exif_transpose is no alternative: it also rewrites the other EXIF tags, and fails if they are damaged.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF can raise any type of error; viewers also show such an image as it is stored
        return 1
    return orientation if isinstance(orientation, int) else 1


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[list[str | None], tuple[int, int]]:
    """Return one image and its size; see `vlsm.images.formats.FormatModule`."""
    head = file.read(4)
    file.seek(0)
    if is_tiff(head):
        from vlsm.images import tiff

        return [None], tiff.list_images(file, name, size_bytes, look)[1]
    with decoder_errors(name), _open(file) as image:
        return [None], (image.height, image.width)


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Decoded]:
    """Return the decoder of the one image of the file; see `vlsm.images.formats.FormatModule`."""
    return lambda selector: decode_picture(data, name, settings.max_pixels, settings.window)
