"""The geometry of sliding windows: a large image is cut into overlapping parts, each an input of the model."""

import itertools
from dataclasses import dataclass

import numpy as np

from vlsm.config import TileSettings
from vlsm.errors import ImageError


@dataclass(frozen=True)
class Window:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Return a view of this part of an array (H, W, ...)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def plan_windows(size: tuple[int, int], tile: TileSettings) -> list[Window]:
    """Return windows that cover an image, row by row.

    An image that fits in one window, or is not tiled, has one window.

    Args:
        size: (height, width) of the image in pixels.
        tile: the side of a window, and the smallest fraction of it that neighbours share.
    """
    if tile.size is None:
        return [Window(0, 0, *size)]
    tops, lefts = (_starts(length, tile.size, tile.overlap) for length in size)
    height, width = (min(length, tile.size) for length in size)
    return [Window(top, left, height, width) for top, left in itertools.product(tops, lefts)]


def check_windows(size: tuple[int, int], tile: TileSettings, name: str) -> None:
    """Raise an ImageError ("too_large") for an image with more windows than `tile.max_windows`."""
    if (count := count_windows(size, tile.size, tile.overlap)) > tile.max_windows:
        raise ImageError("too_large", f"{name} needs {count:,} windows; tile.max_windows is {tile.max_windows:,}")


def count_windows(size: tuple[int, int], side: int | None, overlap: float) -> int:
    """Return the number of windows that `plan_windows` returns.

    Args:
        size: (height, width) of the image in pixels.
        side: of a window in pixels; None if images are not tiled.
        overlap: the smallest fraction of a side that neighbours share.
    """
    return 1 if side is None else _count(size[0], side, overlap) * _count(size[1], side, overlap)


def _count(length: int, side: int, overlap: float) -> int:
    step = max(1, int(side * (1 - overlap)))
    return 1 if length <= side else -(-(length - side) // step) + 1


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Return evenly spaced starts of the fewest windows that cover the length."""
    starts = np.linspace(0, max(0, length - side), _count(length, side, overlap))
    return [round(start) for start in starts]
