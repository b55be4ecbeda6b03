"""Decode common image files to RGB arrays, and mask files to masks."""

import io
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.codestreams import codestream_size, has_jpeg_end, is_jpeg_ls, rare_jpeg_bits
from vlsm.images.grey_levels import Decoded, Window
from vlsm.images.stored import Stored, check_pixels, decoder_errors, full_range, stored_levels
from vlsm.limits import MAX_LISTED_BYTES

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
    brightest channel counts. If a file has one colour everywhere and an alpha channel that varies, alpha counts.
    Black-and-white files (1 bit) have the values 0 and 255. The threshold removes noise of a lossy encoding.

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
    return (read_stored(data, name, max_pixels).labels() > threshold).astype(np.uint8)


def read_stored(data: bytes, name: str, max_pixels: int) -> Stored:
    """Return the values of an image file; arguments and errors as for `decode_picture`."""
    if is_tiff(data):
        from vlsm.images.tiff import TiffPages  # imports more than the other formats need

        return TiffPages(data, name, max_pixels).read(None)
    if (num_bits := rare_jpeg_bits(data)) is not None:
        return _read_rare_jpeg(data, name, max_pixels, num_bits)
    with decoder_errors(name), _open(io.BytesIO(data)) as image:
        check_pixels((image.height, image.width), name, max_pixels)
        return (_read_deep(image, data) or _read_levels(image, data)).upright(stated_orientation(image))


def _read_rare_jpeg(data: bytes, name: str, max_pixels: int, num_bits: int) -> Stored:
    """Return the values of a JPEG that Pillow cannot read."""
    import imagecodecs

    with decoder_errors(name):
        height, width, num_channels = codestream_size(data) or (0, 0, 0)
        check_pixels((height, width), name, max_pixels)
        if num_channels not in (1, 3):
            raise ImageError("unreadable", f"{name} is a JPEG with {num_channels} channels of {num_bits} bits")
        if is_jpeg_ls(data):
            return _split_alpha(imagecodecs.jpegls_decode(data), num_bits)
        if not is_whole_jpeg(data):
            raise ImageError("corrupt", f"{name}: the JPEG ends early")
        colours = "RGB" if num_channels == 3 else None
        return _split_alpha(imagecodecs.jpeg8_decode(data, outcolorspace=colours), num_bits)


def orientation_of(data: bytes) -> int:
    """Return the tag Orientation of an image file: 1 is upright, and stands for a file without the tag as well."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return stated_orientation(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no format of Pillow: it has no such tag
        return 1


def is_tiff(head: bytes) -> bool:
    """Return whether the bytes of a file begin as a TIFF does."""
    return head[:4] in _TIFF_HEADS


def _open(file: BinaryIO) -> Image.Image:
    """Return an opened file. If damage of a PNG stops Pillow, open it again without its ancillary chunks."""
    try:
        return Image.open(file, formats=_FORMATS)
    except Exception:  # the decoder can raise any error
        file.seek(0)
        if not (head := file.read(len(_PNG_HEAD))).startswith(_PNG_HEAD):  # of any other file no more is read
            raise
        data = head + file.read(MAX_LISTED_BYTES)
        return Image.open(io.BytesIO(_without_ancillary_chunks(data)), formats=_FORMATS)


def _read_deep(image: Image.Image, data: bytes) -> Stored | None:
    """Return the values of an image with more than 8 bits, or None. Pillow would round colours to 8 bits."""
    if image.format == "PNG" and data[24] == 16:  # bit depth, in the header chunk
        return _split_alpha(_decode_deep_png(image, data), 16)
    if image.format == "JPEG2000" and _jpeg2000_bits(data) > 8:
        import imagecodecs

        if (codestream_size(data) or (0, 0))[:2] != (image.height, image.width):
            raise ValueError("the size in its codestream is not that in its header")  # which max_pixels has passed
        return _split_alpha(imagecodecs.jpeg2k_decode(data), _jpeg2000_bits(data))
    return None


def _decode_deep_png(image: Image.Image, data: bytes) -> np.ndarray:
    kept = _without_ancillary_chunks(data)  # libpng writes a line to stderr for each chunk that it does not like
    if image.mode.startswith("I"):
        with Image.open(io.BytesIO(kept), formats=("PNG",)) as grey:
            return np.asarray(grey).astype(np.uint16)
    import imagecodecs

    return np.asarray(imagecodecs.png_decode(kept))


def _split_alpha(values: np.ndarray, num_bits: int) -> Stored:
    """Return the image of (H, W) or (H, W, channels) values of which the last channel may be alpha."""
    full = full_range(values.dtype, num_bits)
    if values.ndim == 2 or values.shape[2] == 3:
        return Stored(values, full)
    num_colours = 1 if values.shape[2] < 3 else 3
    alpha = values[..., num_colours] if values.shape[2] > num_colours else None
    return Stored(values[..., 0] if num_colours == 1 else values[..., :3], full, alpha=alpha)


def _jpeg2000_bits(data: bytes) -> int:
    """Return the bits of the first component (ISO/IEC 15444-1, A.5.1, Ssiz)."""
    return (data[data.index(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1


def _read_levels(image: Image.Image, data: bytes) -> Stored:
    """Return an image of 8 bits, its values (H, W) or (H, W, 3) uint8."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        if (pixels := _decode_jpeg(data, (image.height, image.width))) is not None:
            return Stored(pixels)
    try:
        image.load()
    except Exception:  # the decoder can raise any error
        if (
            image.format == "JPEG"
            and (pixels := _decode_jpeg(data + _JPEG_END, (image.height, image.width))) is not None
        ):
            return Stored(pixels)
        if image.format != "PNG" or (kept := _without_ancillary_chunks(data)) == data:
            raise
        image = Image.open(io.BytesIO(kept), formats=("PNG",))
    return stored_levels(image)


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


def is_whole_jpeg(encoded: bytes, tables: bytes = b"") -> bool:
    """Return whether a JPEG codestream has all of its pixels. One that lacks only its end marker has, if of 8 bits.

    imagecodecs fills pixels that are missing, without an error.

    Args:
        encoded: the codestream, not of JPEG-LS.
        tables: a codestream with tables for it, as TIFF keeps them.
    """
    if has_jpeg_end(encoded):
        return True
    if simplejpeg is None:
        return False
    try:
        simplejpeg.decode_jpeg(tables[:-2] + encoded[2 if tables else 0 :] + _JPEG_END)
    except ValueError:
        return False
    return True


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


def stated_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 (upright) by default.

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
    head = file.read(1 << 16)
    file.seek(0)
    if is_tiff(head):
        from vlsm.images import tiff

        return [None], tiff.list_images(file, name, size_bytes, look)[1]
    if rare_jpeg_bits(head) is not None and (shape := codestream_size(head)) is not None:
        return [None], shape[:2]
    with decoder_errors(name), _open(file) as image:
        return [None], (image.height, image.width)


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Decoded]:
    """Return the decoder of the one image of the file; see `vlsm.images.formats.FormatModule`."""
    return lambda selector: decode_picture(data, name, settings.max_pixels, settings.window)


def open_labels(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], np.ndarray]:
    """Return the reader of the labels of the one image of the file; see `vlsm.images.formats.LabelModule`."""
    return lambda selector: open_stored(data, name, settings)(selector).labels()


def open_stored(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Stored]:
    """Return the reader of the values of the one image of the file; see `vlsm.images.formats.ColourModule`."""
    return lambda selector: read_stored(data, name, settings.max_pixels)
