"""Logits to masks at the image's own size, and masks to COCO run lengths and statistics."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from pycocotools import mask as coco


@dataclass(frozen=True)
class MaskRecord:
    """What an output row says of one mask; the column names of `vlsm.schema`."""

    mask_rle: str
    area_px: int
    area_fraction: float
    bbox: list[int] | None
    confidence: float | None
    agreement: float | None = None


def enlarge_logits(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits at the image's own size, bilinear (with antialias where the image is smaller than the model's square).

    Args:
        logits: (S, S) float.
        size: (height, width) in pixels.

    Returns:
        (height, width) float32, column-major in memory as COCO run lengths count, so that encoding needs no copy.
    """
    transposed = Image.fromarray(np.ascontiguousarray(logits.T, dtype=np.float32))
    return np.asarray(transposed.resize(size, Image.Resampling.BILINEAR)).T


def mask_from_logits(logits: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """The binary mask at the image's own size; logits are enlarged first, so edges follow the image, not the model.

    Args:
        logits: (S, S) float.
        size: (height, width) in pixels.
        threshold: probability in (0, 1); at or above it a pixel is foreground.

    Returns:
        (height, width) uint8, 0 or 1.
    """
    return (enlarge_logits(logits, size) >= _logit(threshold)).view(np.uint8)


def describe_logits(logits: np.ndarray, size: tuple[int, int], threshold: float) -> MaskRecord:
    """The mask of `mask_from_logits` as run lengths, with what can be said of it.

    Args:
        logits: (S, S) float.
        size: (height, width) in pixels.
        threshold: probability in (0, 1).

    Returns:
        Run lengths and statistics; bbox is [x, y, width, height] in pixels, confidence the mean probability inside the
        mask; both are None where the mask is empty.
    """
    enlarged = enlarge_logits(logits, size)
    is_foreground = enlarged >= _logit(threshold)
    return _describe(is_foreground, _probabilities(enlarged[is_foreground]))


def describe_members(
    members: Sequence[np.ndarray], weights: Sequence[float], size: tuple[int, int], threshold: float, vote: bool = False
) -> MaskRecord:
    """The mask on which several models agree, at the image's own size.

    Args:
        members: each member's logits, (K, S, S) float, S its own; of K texts the mean probability counts.
        weights: of the members, as many, each above 0.
        size: (height, width) in pixels.
        threshold: probability in (0, 1), of the mean or of each member's vote.
        vote: foreground is what more than half of the weights have in their masks, instead of where the weighted mean
            of the probabilities reaches the threshold.

    Returns:
        As for `describe_logits`, confidence the mean of the weighted mean probability inside the mask; agreement is the
        mean Dice of the members' masks, pair by pair (1 for two empty ones), None for a single member.
    """
    if len(members) == len(members[0]) == 1:
        return describe_logits(members[0][0], size, threshold)
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    mean, votes, masks = np.zeros(size, np.float64, order="F"), np.zeros(size, np.float64, order="F"), []
    for logits, share in zip(members, shares, strict=True):
        own = np.mean([_probabilities(enlarge_logits(one, size)).T for one in logits], axis=0).T  # column-major still
        masks.append(own >= threshold)
        mean += share * own
        votes += share * masks[-1]
    # shares of equal weights do not add up to a half exactly
    is_foreground = votes > 0.5 + 1e-9 if vote else mean >= threshold
    dices = [_dice(one, other) for one, other in itertools.combinations(masks, 2)]
    agreement = float(np.mean(dices)) if dices else None
    return replace(_describe(is_foreground, mean[is_foreground]), agreement=agreement)


def mirrored_mean(logits: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Logits of the mean probability of an image and of its mirror image.

    Args:
        logits: (..., S, S) float, of the image.
        mirrored: the same of the image with left and right exchanged.

    Returns:
        (..., S, S) float64.
    """
    mean = (_probabilities(logits) + _probabilities(mirrored[..., ::-1])) / 2
    return np.log(mean) - np.log1p(-np.minimum(mean, 1 - 1e-12))


def _describe(is_foreground: np.ndarray, inside: np.ndarray) -> MaskRecord:
    """A mask (H, W) bool, column-major, with the probabilities inside of it."""
    encoded = coco.encode(is_foreground.view(np.uint8))
    area_px = int(coco.area(encoded))
    return MaskRecord(
        mask_rle=encoded["counts"].decode("ascii"),
        area_px=area_px,
        area_fraction=area_px / is_foreground.size,
        bbox=[int(edge) for edge in coco.toBbox(encoded)] if area_px else None,
        confidence=float(np.mean(inside)) if area_px else None,
    )


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, None), dtype=np.float64)))


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / total if total else 1.0


def encode_mask(mask: np.ndarray) -> str:
    """COCO compressed run lengths of a mask, (H, W) of 0 and 1."""
    return str(coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii"))


def decode_mask(mask_rle: str, size: tuple[int, int]) -> np.ndarray:
    """The mask of COCO compressed run lengths: (H, W) uint8, 0 or 1; size is (height, width)."""
    return np.asarray(coco.decode({"size": list(size), "counts": mask_rle.encode("ascii")}))


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))
