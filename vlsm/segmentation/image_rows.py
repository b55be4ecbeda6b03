"""What a run says of one image: a row per prompt, and on demand per member of an ensemble, and a label map."""

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from vlsm.config import ReviewSettings, SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.images.windows import plan_windows
from vlsm.segmentation.cleaning import clean_mask
from vlsm.segmentation.masks import MaskRecord, describe_mask, logit, probabilities
from vlsm.segmentation.tiles import probability_map

Logits = np.ndarray  # (texts, windows, S, S) of one prompt and one member


def describe_image(
    prompts: Sequence[Sequence[Logits]], size: tuple[int, int], settings: SegmentSettings, squares: Sequence[Square]
) -> Iterator[MaskRecord]:
    """The rows of an image, in the order in which they are planned.

    Args:
        prompts: of each prompt, each member's logits, (K, T, S, S) float: K texts, whose mean probability counts, T
            windows, S the member's own.
        size: (height, width) of the image in pixels.
        settings: of the run: threshold, weights, how members are combined and masks cleaned, which rows.
        squares: the input of each member.

    Yields:
        Of each prompt the mask on which the members agree, then, where asked for, each member's own; at last the label
        map. `confidence` is the mean probability inside of a mask, `agreement` the mean Dice of the members' masks,
        pair by pair (1 for two empty ones), None for a single member.
    """
    best = labels = None
    if settings.label_maps:
        dtype = np.uint8 if len(prompts) < 256 else np.uint16
        best, labels = np.zeros(size, np.float32, order="F"), np.zeros(size, dtype, order="F")
    for number, members in enumerate(prompts, start=1):
        if labels is None and len(members) == members[0].shape[0] == members[0].shape[1] == 1:
            record = _describe_alone(members[0][0, 0], size, settings, squares[0])
            yield replace(record, review=review_reasons(record, settings.review))
            continue
        mean, mask, records = _describe_members(members, size, settings, squares)
        yield from records
        if best is not None and labels is not None:
            wins = mask & (mean > best)
            best[wins], labels[wins] = mean[wins], number
    if best is not None and labels is not None:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(labels)).save(file, "PNG")
        yield replace(describe_mask(labels > 0, best), label_map=file.getvalue())


def _describe_alone(logits: np.ndarray, size: tuple[int, int], settings: SegmentSettings, square: Square) -> MaskRecord:
    """One model, one text, one window: probabilities are needed only inside of the mask."""
    enlarged = square.enlarge_logits(logits, size)
    mask = clean_mask(enlarged >= logit(settings.threshold or 0.5), settings.clean)
    return describe_mask(mask, probabilities(enlarged[mask]))


def _describe_members(
    members: Sequence[Logits], size: tuple[int, int], settings: SegmentSettings, squares: Sequence[Square]
) -> tuple[np.ndarray, np.ndarray, list[MaskRecord]]:
    """Mean probability and mask, (H, W) each, of one prompt, and its rows."""
    threshold, windows = settings.threshold or 0.5, plan_windows(size, settings.tile)
    weights = [member.weight for member in settings.members]
    mean, votes = np.zeros(size, np.float32, order="F"), np.zeros(size, np.float32, order="F")
    masks, records = [], []
    for logits, weight, square in zip(members, weights, squares, strict=True):
        share = weight / sum(weights)
        probability = probability_map(logits[0], windows, size, square)
        for text_logits in logits[1:]:
            probability += probability_map(text_logits, windows, size, square)
        probability /= len(logits)
        votes += share * (probability >= threshold)
        mean += share * probability
        masks.append(clean_mask(probability >= threshold, settings.clean))
        if settings.has_member_rows:
            records.append(describe_mask(masks[-1], probability))
    # shares of equal weights do not add up to a half exactly
    mask = clean_mask(votes > 0.5 + 1e-6 if settings.combine == "vote" else mean >= threshold, settings.clean)
    dices = [_dice(one, other) for one, other in itertools.combinations(masks, 2)]
    combined = replace(describe_mask(mask, mean), agreement=float(np.mean(dices)) if dices else None)
    return mean, mask, [replace(combined, review=review_reasons(combined, settings.review)), *records]


def review_reasons(record: MaskRecord, settings: ReviewSettings) -> str | None:
    """Why somebody should look at a mask, if so: "low confidence", "low agreement", "odd area", or several of them."""
    low, high = settings.area_fraction or (0, 1)
    least = {"confidence": settings.min_confidence, "agreement": settings.min_agreement}
    reasons = [
        f"low {name}"
        for name, limit in least.items()
        if limit is not None and (value := getattr(record, name)) is not None and value < limit
    ]
    return ", ".join([*reasons, *([] if low <= record.area_fraction <= high else ["odd area"])]) or None


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / total if total else 1.0
