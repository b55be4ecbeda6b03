"""Masks that the models' device has made: what travels instead of logits, and which runs make masks this way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vlsm.config import CleanSettings, SegmentSettings

MASK_TYPE = pa.struct(
    [
        pa.field("changes", pa.large_binary(), nullable=False),
        pa.field("probability_sum", pa.float64(), nullable=False),
        pa.field("max_probability", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("presence", pa.float64()),
        pa.field("label_map", pa.large_binary()),
        pa.field("label_shape", pa.list_(pa.int32())),
        pa.field("label_bytes", pa.int32()),  # of one pixel
    ]
)


@dataclass(frozen=True)
class FinishedMask:
    """One mask at the original size of its image: some kilobytes, where the logits are hundreds.

    Attributes:
        changes: (C,) uint32, in ascending order: the pixels whose value differs from the pixel before them. Pixels
            count from 0, column by column. Before the first pixel is background. Differences are COCO run lengths.
        probability_sum: sum of the probabilities of all pixels inside the mask.
        max_probability, agreement, presence: as in `MaskRecord`.
        label_map: (H, W) uint8 or uint16 for the row of a label map, else None.
    """

    changes: np.ndarray
    probability_sum: float
    max_probability: float | None = None
    agreement: float | None = None
    presence: float | None = None
    label_map: np.ndarray | None = None


def count_masks(settings: SegmentSettings, num_prompts: int) -> int:
    """Return the number of output rows of an image with this number of prompts."""
    members = len(settings.members) if settings.has_member_rows else 0
    return num_prompts * (1 + members) + settings.label_maps


def cpu_reason(settings: SegmentSettings, on_gpu: bool) -> str | None:
    """Return why the writing tasks of a run make the masks from logits, or None if the models' device makes them.

    Some settings need the probability of each pixel on a CPU, or the logits of members that no single actor has.

    Args:
        settings: of the run.
        on_gpu: whether the models run on a GPU; `run.finish=auto` uses only GPUs.
    """
    if settings.run.finish == "cpu":
        return "run.finish is cpu"
    if settings.run.finish == "auto" and not on_gpu:
        return "the models run on CPUs"
    if settings.clean != CleanSettings():
        return "masks are cleaned (settings clean.)"
    if settings.probability_maps != "none":
        return f"probability_maps is {settings.probability_maps}"
    if settings.run.placement == "apart" and len(settings.members) > 1:
        return "run.placement is apart"
    return None


def run_lengths(changes: np.ndarray, num_pixels: int) -> np.ndarray:
    """Return the run lengths of a mask, (R,) uint32, the first of background, from `FinishedMask.changes`."""
    return np.diff(changes.astype(np.int64), prepend=0, append=num_pixels).astype(np.uint32)


def mean_dice(areas: Sequence[int], intersections: Sequence[int]) -> float | None:
    """Return the mean Dice over all pairs of masks, 1 for two empty masks, or None for a single mask.

    Args:
        areas: of the masks, in pixels.
        intersections: of the pairs, in the order of `itertools.combinations`.
    """
    pairs = [(first, second) for number, first in enumerate(areas) for second in areas[number + 1 :]]
    dices = [
        2 * both / (first + second) if first + second else 1.0
        for (first, second), both in zip(pairs, intersections, strict=True)
    ]
    return float(np.mean(dices)) if dices else None


def pack_mask(mask: FinishedMask) -> dict[str, Any]:
    """Return a mask as a value of MASK_TYPE."""
    names = "probability_sum", "max_probability", "agreement", "presence"
    packed: dict[str, Any] = {"changes": mask.changes.tobytes()} | {name: getattr(mask, name) for name in names}
    if (labels := mask.label_map) is None:
        return packed
    return packed | {"label_map": labels.tobytes(), "label_shape": labels.shape, "label_bytes": labels.itemsize}


def unpack_mask(
    changes: bytes, label_map: bytes | None, label_shape: Sequence[int], label_bytes: int, **numbers: Any
) -> FinishedMask:
    """Return the mask of a value of MASK_TYPE."""
    labels = None if label_map is None else np.frombuffer(label_map, f"u{label_bytes}").reshape(label_shape)
    return FinishedMask(np.frombuffer(changes, np.uint32), label_map=labels, **numbers)
