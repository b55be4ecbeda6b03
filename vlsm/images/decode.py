"""Decode common image files to RGB arrays, and mask files to masks."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.grey_levels import STORED, Decoded

try:
    import simplejpeg
except ImportError:  # machines with only torch and the model libraries lack it: Pillow returns the same pixels
    simplejpeg = None

if TYPE_CHECKING:
    from vlsm.images.formats import Look

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}  # EXIF 2.3, tag Orientation


def decode_image(data: bytes, name: str, max_pixels: int = 100_000_000) -> np.ndarray:
    """Return an image as a person sees it: RGB, upright, 8 bits per channel.

    EXIF orientation is applied and alpha is dropped. Palette, grey and CMYK images are converted. 16-bit grey is scaled
    by its full range (65,535 is white). 32-bit integer and float images are scaled from their minimum to their maximum,
    because no header states their range. Of an animation only the first frame is used.

    Args:
        data: the content of a JPEG, PNG, TIFF, BMP or WebP file.
        name: the name of the file in error messages.
        max_pixels: images with more pixels are refused before they are decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: "too_large", or "corrupt" with the decoder's reason.
    """
    with decoder_errors(name), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return decode_opened(image, name, max_pixels, data)


def decode_opened(image: Image.Image, name: str, max_pixels: int, data: bytes = b"") -> np.ndarray:
    """Return the selected page of an opened file, as `decode_image` does.

    Args:
        image: the file, opened by Pillow, at the page to decode.
        name: the name of the file in error messages.
        max_pixels: images with more pixels are refused before they are decoded.
        data: the content of a JPEG file, for its faster decoder.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: "too_large".
    """
    width, height = image.size
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{name} has {width} x {height} = {height * width:,} pixels; max_pixels is {max_pixels:,}"
        )
    pixels = _decode_jpeg(data, (height, width)) if image.format == "JPEG" and image.mode in ("L", "RGB") else None
    if pixels is None:
        image.load()
        pixels = np.asarray(_to_rgb(image))
    turn = _UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Return the same pixels as Pillow in half of its time, or None if only Pillow can handle the file."""
    if simplejpeg is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if pixels.shape == (*size, 3) else None


@contextlib.contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Translate every error of a decoder to an ImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError("corrupt", f"{name} is not a {', '.join(_FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{name}: {error}") from error
    except ImageError:
        raise
    except Exception as error:  # a damaged file can raise any type of error
        raise ImageError("corrupt", f"{name}: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) by default.

    Pillow's exif_transpose is no alternative: it also rewrites the other EXIF tags, and fails if they are damaged.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF can raise any type of error; viewers also show such an image as it is stored
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def decode_mask_file(data: bytes, name: str, threshold: int, max_pixels: int = 100_000_000) -> np.ndarray:
    """Return the mask of a mask file: 1 if the brightest channel of a pixel is above the threshold, else 0.

    The threshold removes noise of a lossy encoding.

    Args:
        data: the content of the file, as for `decode_image`.
        name: the name of the file in error messages.
        threshold: 0 to 254, compared with 8-bit levels.
        max_pixels: masks with more pixels are refused before they are decoded.

    Returns:
        (H, W) uint8 of 0 and 1.

    Raises:
        ImageError: as for `decode_image`.
    """
    return (decode_image(data, name, max_pixels).max(axis=2) > threshold).astype(np.uint8)


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[list[str | None], tuple[int, int]]:
    """Return one image and its size; see `vlsm.images.formats.FormatModule`."""
    with decoder_errors(name), Image.open(file, formats=_FORMATS) as image:
        return [None], (image.height, image.width)


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Decoded]:
    """Return the decoder of the one image of the file; see `vlsm.images.formats.FormatModule`."""
    return lambda selector: Decoded(decode_image(data, name, settings.max_pixels), STORED)
