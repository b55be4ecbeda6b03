"""COCO run lengths of masks, checked before pycocotools sees them.

pycocotools reads behind the end of damaged run lengths, and writes behind the end of a mask. Both can end the process.
Run lengths come from files that anybody may have written: part files, lists, COCO files.
"""

import numpy as np
from pycocotools import mask as coco

_MAX_CHARACTERS = 10  # of one number: 50 bits
MAX_PIXELS = 1_000_000_000  # of one mask; pycocotools kills the process if it gets no memory
_BLOCK = 1 << 20  # characters that are unpacked at once: a long text needs little more memory than its numbers


def unpack_run_lengths(text: str) -> np.ndarray:
    """Return the run lengths of compressed counts, (N,) int64, the first of background.

    Each character holds 5 bits, the lowest first, and whether more follow. The number has the sign of its last bit.
    From the fourth run on, a number is the difference to the run before the last one.

    Raises:
        ValueError: the text is damaged.

    Source: rleFrString in maskApi.c of pycocotools, which checks nothing.
    """
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8) - np.uint8(48)  # below "0": above 63
    blocks, start = [np.zeros(0, np.int64)], 0
    while start < len(codes):
        block = codes[start : start + _BLOCK]
        is_last = (block & 32) == 0
        num_whole = int(np.flatnonzero(is_last)[-1]) + 1 if is_last.any() else 0  # characters of whole numbers
        if not num_whole or (block > 63).any():
            raise ValueError(f"the run lengths are damaged: {text[:40]!r}")
        blocks.append(_unpack_numbers(block[:num_whole].astype(np.int64), np.flatnonzero(is_last), text))
        start += num_whole
    numbers = np.concatenate(blocks)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def _unpack_numbers(codes: np.ndarray, ends: np.ndarray, text: str) -> np.ndarray:
    """Return the numbers of some characters; `ends` are the positions of their last ones."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= _MAX_CHARACTERS:
        raise ValueError(f"the run lengths are damaged: {text[:40]!r}")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    numbers: np.ndarray = np.add.reduceat((codes & 31) << shifts, starts)
    return numbers - np.where(codes[ends] & 16, np.int64(1) << (shifts[ends] + 5), 0)


def check_run_lengths(text: str, size: tuple[int, int]) -> None:
    """Raise a ValueError if compressed counts are damaged, or are no mask of this (height, width).

    A size comes from a file too: it must be two numbers above 0, and small enough for the memory.
    """
    if not all(isinstance(side, int | np.integer) and side > 0 for side in size):
        raise ValueError(f"no mask has {size[0]!r} x {size[1]!r} pixels")
    num_pixels = int(size[0]) * int(size[1])
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"a mask of {size[0]:,} x {size[1]:,} pixels does not fit into memory")
    if len(text) > _MAX_CHARACTERS * (num_pixels + 2):  # every run has a pixel, but for the first one
        raise ValueError(f"the run lengths do not fit {size[0]} x {size[1]} pixels: {text[:40]!r}")
    runs = unpack_run_lengths(text)
    if (runs < 0).any() or (runs > num_pixels).any() or int(runs.sum()) != num_pixels:
        raise ValueError(f"the run lengths do not fit {size[0]} x {size[1]} pixels: {text[:40]!r}")


def decode_run_lengths(text: str, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of compressed counts: (H, W) uint8 of 0 and 1.

    Args:
        text: COCO's compressed counts.
        size: (height, width) in pixels.

    Raises:
        ValueError: they are damaged, or do not fit the size.
    """
    check_run_lengths(text, size)
    return np.asarray(coco.decode({"size": list(size), "counts": text.encode("ascii")}))


def measure_run_lengths(text: str, size: tuple[int, int]) -> tuple[int, list[int] | None]:
    """Return the area in pixels of compressed counts, and their box as [x, y, width, height], None for an empty mask.

    The mask is not decoded. Arguments and errors are as for `decode_run_lengths`.
    """
    check_run_lengths(text, size)
    encoded = {"size": list(size), "counts": text.encode("ascii")}
    area = int(coco.area(encoded))
    return area, [int(edge) for edge in coco.toBbox(encoded)] if area else None
