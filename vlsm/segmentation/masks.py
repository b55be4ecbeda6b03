"""Convert logits to masks at the original size of the image, and masks to COCO run lengths and statistics."""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pycocotools import mask as coco

from vlsm.images.run_lengths import MAX_PIXELS, decode_run_lengths
from vlsm.segmentation.finished import FinishedMask, run_lengths


@dataclass(frozen=True)
class MaskRecord:
    """One mask and its statistics, as in an output row. The fields are columns of `vlsm.runs.schema`."""

    mask_rle: str
    area_px: int
    area_fraction: float
    bbox: list[int] | None
    confidence: float | None
    agreement: float | None = None
    review: str | None = None
    label_map: bytes | None = None
    probability_map: bytes | None = None
    max_probability: float | None = None
    presence: float | None = None


def describe_mask(mask: np.ndarray, probability: np.ndarray) -> MaskRecord:
    """Return a mask as run lengths, with its statistics.

    Args:
        mask: (H, W) bool, column-major in memory.
        probability: (H, W) float, or one-dimensional with only the values inside the mask.

    Returns:
        Run lengths and statistics. bbox is [x, y, width, height] in pixels. confidence is the mean probability inside
        the mask. Both are None if the mask is empty.
    """
    inside = values_inside(probability, mask) if probability.ndim == 2 else probability
    return _describe(coco.encode(mask.view(np.uint8)), float(np.sum(inside, dtype=np.float64)))


def describe_finished(mask: FinishedMask, size: tuple[int, int]) -> MaskRecord:
    """Return a mask of this (height, width) that the models' device has made, as `describe_mask` would."""
    counts = run_lengths(mask.changes, size[0] * size[1])
    encoded = coco.frPyObjects({"counts": counts, "size": list(size)}, *size)
    label_map = None if mask.label_map is None else encode_png(mask.label_map)
    copied = {name: getattr(mask, name) for name in ("max_probability", "agreement", "presence")}
    return replace(_describe(encoded, mask.probability_sum), label_map=label_map, **copied)


def _describe(encoded: dict[str, Any], probability_sum: float) -> MaskRecord:
    """Return the record of COCO run lengths, from the sum of the probabilities inside the mask."""
    area_px, (height, width) = int(coco.area(encoded)), encoded["size"]
    return MaskRecord(
        mask_rle=encoded["counts"].decode("ascii"),
        area_px=area_px,
        area_fraction=area_px / (height * width),
        bbox=[int(edge) for edge in coco.toBbox(encoded)] if area_px else None,
        confidence=probability_sum / area_px if area_px else None,
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits, in the same precision and memory layout."""
    values = np.asarray(np.clip(logits, -80, None))
    np.exp(np.negative(values, out=values), out=values)  # in place: new arrays of large images cost as much as exp
    values += 1
    return np.reciprocal(values, out=values)


def values_inside(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the values inside a mask, one-dimensional, column by column.

    Args:
        values: (H, W), column-major in memory: read in this order, they take a third of the time.
        mask: (H, W) bool, column-major in memory.
    """
    return values.T[mask.T]


def logit(probability: float) -> float:
    """Return the logit of a probability in (0, 1)."""
    return float(np.log(probability / (1 - probability)))


def encode_mask(mask: np.ndarray) -> str:
    """Return the COCO compressed run lengths of a mask, (H, W) of 0 and 1."""
    return str(coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii"))


def decode_mask(mask_rle: str, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of COCO compressed run lengths: (H, W) uint8, 0 or 1. size is (height, width).

    Raises:
        ValueError: the run lengths do not fit the size, or no mask has this size.
    """
    return decode_run_lengths(mask_rle, size)


def encode_probability(probability: np.ndarray) -> bytes:
    """Return a probability map, (H, W) float in 0..1, as a PNG of 8 bits. The values are rounded to 1/255."""
    return encode_png(np.rint(probability * 255).astype(np.uint8))


def decode_probability(png: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the probability map of a PNG from `encode_probability`, (H, W) float32 in 0..1; see `decode_png`."""
    return decode_png(png, size).astype(np.float32) / 255


def decode_png(png: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the array of a PNG from `encode_png`, (H, W) of its stored type.

    The images of a run may be larger than the limit in `Image.open`, which is a fixed number of pixels.

    Args:
        png: the bytes.
        size: (height, width) in pixels that its row states: the PNG must not have more pixels. None for a PNG that
            this process has made.

    Raises:
        ValueError: the PNG has more pixels, or several channels.
        OSError, SyntaxError: it is damaged.
    """
    most = MAX_PIXELS if size is None else min(MAX_PIXELS, (size[0] or 0) * (size[1] or 0))
    with PngImageFile(io.BytesIO(png)) as image:
        if image.width * image.height > most:
            raise ValueError(f"the PNG has {image.height} x {image.width} pixels, which are more than its row states")
        if image.mode not in ("L", "I;16", "I"):
            raise ValueError(f"the PNG is not grey: {image.mode}")
        return np.asarray(image)


def encode_png(values: np.ndarray) -> bytes:
    """Return an array, (H, W) uint8 or uint16 in any memory layout, as a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(file, "PNG")
    return file.getvalue()
