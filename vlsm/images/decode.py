"""The bytes of common image files to RGB arrays, and mask files to masks."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vlsm.config import SegmentSettings
from vlsm.errors import ImageError

try:
    import simplejpeg
except ImportError:  # a machine with torch and the networks' libraries alone: Pillow gives the same pixels
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
    """An image as a person sees it: RGB, upright, 8 bits a channel.

    EXIF orientation is applied and alpha dropped; palette, grey and CMYK are converted. 16-bit grey is scaled by its
    full range (65,535 is white); 32-bit integer and float images, whose range no header tells, from their minimum to
    their maximum. Of an animation the first frame counts.

    Args:
        data: the file's content: JPEG, PNG, TIFF, BMP or WebP.
        name: what error messages call it.
        max_pixels: images of more pixels are refused before they are decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: "too_large", or "corrupt" with the decoder's reason.
    """
    with decoder_errors(name), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return decode_opened(image, name, max_pixels, data)


def decode_opened(image: Image.Image, name: str, max_pixels: int, data: bytes = b"") -> np.ndarray:
    """The page of an opened file that is selected, as `decode_image` gives an image; data is that of a whole JPEG."""
    width, height = image.size
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{name} is {width} x {height} = {height * width:,} pixels; max_pixels is {max_pixels:,}"
        )
    pixels = _decode_jpeg(data, (height, width)) if image.format == "JPEG" and image.mode in ("L", "RGB") else None
    if pixels is None:
        image.load()
        pixels = np.asarray(_to_rgb(image))
    turn = _UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """The pixels that Pillow gives, in half of its time; None where something is odd, of which Pillow is to judge."""
    if simplejpeg is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if pixels.shape == (*size, 3) else None


@contextlib.contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Whatever a decoder raises, as an ImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError("corrupt", f"{name} is not a {', '.join(_FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{name}: {error}") from error
    except ImageError:
        raise
    except Exception as error:  # decoders meet damage with every error that there is
        raise ImageError("corrupt", f"{name}: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """As EXIF says. Pillow's own exif_transpose also writes the rest of EXIF anew, and fails where that is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever damage can cause; like any viewer, show such an image as it is stored
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
    """A mask file as a mask: 1 where the brightest channel is above the threshold, whatever noise its coding left.

    Args:
        data: the file's content, as for `decode_image`.
        name: what error messages call it.
        threshold: 0 to 254, of 8 bits.
        max_pixels: masks of more pixels are refused before they are decoded.

    Returns:
        (H, W) uint8 of 0 and 1.

    Raises:
        ImageError: as `decode_image` raises it.
    """
    return (decode_image(data, name, max_pixels).max(axis=2) > threshold).astype(np.uint8)


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[list[str | None], tuple[int, int]]:
    """One image and its size; see `vlsm.images.formats.FormatModule`."""
    with decoder_errors(name), Image.open(file, formats=_FORMATS) as image:
        return [None], (image.height, image.width)


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], np.ndarray]:
    """The one image of the file; see `vlsm.images.formats.FormatModule`."""
    return lambda selector: decode_image(data, name, settings.max_pixels)
