"""COCO run lengths of masks, checked before pycocotools sees them.

pycocotools reads behind the end of damaged run lengths, and writes behind the end of a mask. Both can end the process.
Run lengths come from files that anybody may have written: part files, lists, COCO files.
"""

import numpy as np
from pycocotools import mask as coco

_MAX_CHARACTERS = 10  # of one number: 50 bits


def unpack_run_lengths(text: str) -> np.ndarray:
    """Return the run lengths of compressed counts, (N,) int64, the first of background.

    Each character holds 5 bits, the lowest first, and whether more follow. The number has the sign of its last bit.
    From the fourth run on, a number is the difference to the run before the last one.

    Raises:
        ValueError: the text is damaged.

    Source: rleFrString in maskApi.c of pycocotools, which checks nothing.
    """
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    is_last = (codes & 32) == 0
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if ((codes < 0) | (codes > 63)).any() or not is_last[-1] or (ends - starts).max() >= _MAX_CHARACTERS:
        raise ValueError(f"the run lengths are damaged: {text[:40]!r}")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (shifts[ends] + 5), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def check_run_lengths(text: str, size: tuple[int, int]) -> None:
    """Raise a ValueError if compressed counts are damaged, or are no mask of this (height, width)."""
    runs = unpack_run_lengths(text)
    num_pixels = size[0] * size[1]
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
