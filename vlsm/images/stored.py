"""An image as its file stores it, and the picture that is shown of it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlsm.errors import ImageError
from vlsm.images.grey_levels import STORED, Decoded, Range, Window, as_rgb, choose_levels, show

KNOWN = "JPEG, PNG, TIFF, BMP, WebP, GIF, JPEG 2000 or AVIF"

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}  # EXIF 2.3 and TIFF 6.0, tag Orientation

COLOURS = 1 << 32  # a label from here on stands for a colour, below it for a stored value of at most 32 bits


@dataclass(frozen=True, eq=False)
class Stored:
    """The values of an image, upright.

    Attributes:
        values: (H, W) grey values or labels, or (H, W, 3) RGB, of any integer or float type. Only uint8 values are
            levels already.
        full: the lowest and highest value that the bits of a deep image can hold; None if no one knows, as for floats.
        is_white_zero: whether the lowest grey value is white.
        no_data: the value of pixels without data; None if there is none.
        alpha: (H, W) opacity of any type; None if there is none. A picture does not show it.
        indices: (H, W) entries of the palette whose colours the values are; None if the file has no palette.
    """

    values: np.ndarray
    full: Range | None = None
    is_white_zero: bool = False
    no_data: float | None = None
    alpha: np.ndarray | None = None
    indices: np.ndarray | None = None

    def upright(self, orientation: int | None) -> "Stored":
        """Return the image turned as its tag Orientation says. An unknown number turns nothing."""
        if _UPRIGHT.get(orientation or 1) is None:
            return self
        alpha, indices = (None if one is None else upright(one, orientation) for one in (self.alpha, self.indices))
        return replace(self, values=upright(self.values, orientation), alpha=alpha, indices=indices)

    def labels(self) -> np.ndarray:
        """Return the labels of a mask, (H, W) of the stored type: grey values, or the brightest channel of colours.

        If these are the same everywhere, but the opacity is not, the opacity is the mask.
        """
        labels: np.ndarray = self.values if self.values.ndim == 2 else self.values.max(axis=2)
        if self.alpha is not None and labels.min() == labels.max() and self.alpha.min() < self.alpha.max():
            return self.alpha
        return labels

    def codes(self) -> np.ndarray:
        """Return the numbers of classes in a mask, (H, W): entries of the palette, or labels where there is none."""
        return self.labels() if self.indices is None else self.indices

    def colours(self) -> np.ndarray:
        """Return COLOURS + 0xRRGGBB for each pixel of a mask, (H, W) int64.

        Raises:
            ImageError: "unreadable": the values have more than 8 bits.
        """
        if self.values.dtype != np.uint8:
            raise ImageError("unreadable", f"classes by colour need 8 bits per channel, not {self.values.dtype}")
        red, green, blue = np.moveaxis(as_rgb(self.values) if self.values.ndim == 2 else self.values, 2, 0)
        return COLOURS + (red.astype(np.int64) << 16 | green.astype(np.int64) << 8 | blue)

    def show(self, window: Window | None = None) -> Decoded:
        """Return the picture, by the rule of `vlsm.images.grey_levels`.

        Args:
            window: the setting (center, width), for grey values of more than 8 bits.
        """
        pixels, rule = self._show_deep(window) if self.values.dtype != np.uint8 else (self.values, STORED)
        if self.is_white_zero:
            pixels = 255 - pixels
        return Decoded(pixels if pixels.ndim == 3 else as_rgb(pixels), rule)

    def _show_deep(self, window: Window | None) -> tuple[np.ndarray, str]:
        has_data = None if self.no_data is None else self.values != self.no_data
        valid = self.values if has_data is None else self.values[has_data]
        levels = choose_levels(valid, window if self.values.ndim == 2 else None, None, self.full)
        pixels = show(self.values, levels)
        return pixels if has_data is None else np.where(has_data, pixels, np.uint8(0)), levels.rule


def stored_levels(image: Image.Image) -> Stored:
    """Return an image of Pillow with at most 8 bits a channel, its values (H, W) or (H, W, 3) uint8."""
    alpha = np.asarray(image.getchannel("A")) if image.mode in ("LA", "RGBA") else None
    indices = np.asarray(image) if image.mode == "P" else None
    levels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
    return Stored(levels, alpha=alpha, indices=indices)


def upright(values: np.ndarray, orientation: int | None) -> np.ndarray:
    """Return (H, W, ...) values turned as the tag Orientation says. An unknown number turns nothing."""
    turn = _UPRIGHT.get(orientation or 1)
    return values if turn is None else np.ascontiguousarray(turn(values))


def full_range(dtype: np.dtype[Any], num_bits: int) -> Range | None:
    """Return the lowest and highest value of an integer type of which only some bits are used; None for floats."""
    if dtype.kind == "u":
        return 0.0, float(2**num_bits - 1)
    return (float(-(2 ** (num_bits - 1))), float(2 ** (num_bits - 1) - 1)) if dtype.kind == "i" else None


def check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise ImageError "too_large" if an image of this (height, width) has more than max_pixels."""
    height, width = size
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{name} has {width} x {height} = {height * width:,} pixels; max_pixels is {max_pixels:,}"
        )


@contextlib.contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Translate every error of a decoder to an ImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError("corrupt", f"{name} is not a {KNOWN} image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{name}: {error}") from error
    except ImageError:
        raise
    except Exception as error:  # a damaged file can raise any type of error
        raise ImageError("corrupt", f"{name}: {error or type(error).__name__}") from error
