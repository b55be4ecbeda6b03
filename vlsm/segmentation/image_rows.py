"""The output rows of one image: one per prompt; on request also one per member of an ensemble, and a label map."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from vlsm.config import ReviewSettings, SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.images.windows import plan_windows
from vlsm.segmentation.cleaning import clean_mask
from vlsm.segmentation.finished import FinishedMask, count_masks, mean_dice
from vlsm.segmentation.masks import (
    MaskRecord,
    describe_finished,
    describe_mask,
    encode_png,
    encode_probability,
    logit,
    probabilities,
    values_inside,
)
from vlsm.segmentation.presence import join_presence
from vlsm.segmentation.shard import Entry, ShardBatch
from vlsm.segmentation.tiles import probability_map

Logits = np.ndarray  # (K texts, T windows, S, S) of one prompt and one member
Presences = Sequence[float | None]  # of one prompt: of the combined mask, then of each member


def describe_entry(
    batch: ShardBatch,
    entry: Entry,
    texts: Sequence[Sequence[str]],
    settings: SegmentSettings,
    squares: Sequence[Square],
) -> list[MaskRecord]:
    """Return the rows of an image of a segmented shard, in the order of the plan.

    Args:
        batch: the shard.
        entry: an image without an error.
        texts: for each of its prompts the texts for the models.
        settings: of the run.
        squares: the input square of each member.
    """
    size = entry.height, entry.width
    if entry.num_masks:
        masks = batch.masks[entry.first_mask : entry.first_mask + entry.num_masks]
        return describe_finished_image(masks, size, settings)
    weights = [member.weight for member in settings.members]
    presences = [join_presence(members, weights) for members in batch.presences_of(entry, texts)]
    return list(describe_image(batch.logits_of(entry, texts), size, settings, squares, presences))


def describe_finished_image(
    masks: Sequence[FinishedMask], size: tuple[int, int], settings: SegmentSettings
) -> list[MaskRecord]:
    """Return the rows of an image of this (height, width), whose masks the models' device has made."""
    records = [describe_finished(mask, size) for mask in masks]
    num_kinds = count_masks(settings, 1) - settings.label_maps  # of each prompt; the first is the combined mask
    return [
        record if number % num_kinds or record.label_map is not None else _with_review(record, settings)
        for number, record in enumerate(records)
    ]


def describe_image(
    prompts: Sequence[Sequence[Logits]],
    size: tuple[int, int],
    settings: SegmentSettings,
    squares: Sequence[Square],
    presences: Sequence[Presences] | None = None,
) -> Iterator[MaskRecord]:
    """Yield the rows of an image, in the order of the plan.

    Args:
        prompts: for each prompt the logits of each member, (K, T, S, S) float: K texts, whose probabilities are
            averaged, T windows, and the member's side S.
        size: (height, width) of the image in pixels.
        settings: of the run: threshold, weights, the combination of the members, cleaning of masks, and the rows to
            write.
        squares: the input square of each member.
        presences: for each prompt the presence, as `join_presence` returns it; None if no model computes it.

    Yields:
        For each prompt the combined mask of the members, then, if the settings ask for it, the mask of each member. The
        label map, if the settings ask for one, comes last. `confidence` is the mean probability inside the mask.
        `agreement` is the mean Dice over all pairs of members' masks (1 for two empty masks), or None for a single
        member.
    """
    best = labels = None
    if settings.label_maps:
        dtype = np.uint8 if len(prompts) < 256 else np.uint16
        best, labels = np.zeros(size, np.float32, order="F"), np.zeros(size, dtype, order="F")
    presences = presences or [[None] * (1 + len(members)) for members in prompts]
    for number, (members, presence) in enumerate(zip(prompts, presences, strict=True), start=1):
        if labels is None and len(members) == members[0].shape[0] == members[0].shape[1] == 1:
            yield _describe_single(members[0][0, 0], size, settings, squares[0], presence[0])
            continue
        mean, mask, records = _describe_members(members, size, settings, squares, presence)
        yield from records
        if best is not None and labels is not None:
            wins = mask & (mean > best)
            best[wins], labels[wins] = mean[wins], number
    if best is not None and labels is not None:
        yield replace(describe_mask(labels > 0, best), label_map=encode_png(labels))


def _describe_single(
    logits: np.ndarray, size: tuple[int, int], settings: SegmentSettings, square: Square, presence: float | None
) -> MaskRecord:
    """Return the row of one model, one text and one window: only pixels inside the mask need a probability."""
    enlarged = square.enlarge_logits(logits, size)
    mask = clean_mask(enlarged >= logit(settings.threshold or 0.5), settings.clean)
    highest = float(probabilities(enlarged.max().astype(np.float64)))  # float32 knows few values near 1
    record = describe_mask(mask, probabilities(values_inside(enlarged, mask)))
    record = _with_review(replace(record, max_probability=highest, presence=presence), settings)
    if not _keeps_map(record, settings):  # the probabilities of all pixels take time
        return record
    return _with_map(record, probabilities(enlarged), settings)


def _describe_members(
    members: Sequence[Logits],
    size: tuple[int, int],
    settings: SegmentSettings,
    squares: Sequence[Square],
    presences: Presences,
) -> tuple[np.ndarray, np.ndarray, list[MaskRecord]]:
    """Return the mean probability (H, W), the mask (H, W) and the rows of one prompt."""
    threshold, windows = settings.threshold or 0.5, plan_windows(size, settings.tile)
    weights = [member.weight for member in settings.members]
    mean, votes = np.zeros(size, np.float32, order="F"), np.zeros(size, np.float32, order="F")
    masks, records = [], []
    for logits, weight, square, presence in zip(members, weights, squares, presences[1:], strict=True):
        share = weight / sum(weights)
        probability = probability_map(logits[0], windows, size, square)
        for text_logits in logits[1:]:
            probability += probability_map(text_logits, windows, size, square)
        probability /= len(logits)
        votes += share * (probability >= threshold)
        mean += share * probability
        masks.append(clean_mask(probability >= threshold, settings.clean))
        if settings.has_member_rows:
            record = replace(_describe(masks[-1], probability), presence=presence)
            records.append(_with_map(record, probability, settings))
    # rounding: the shares of half of the members may add up to slightly more than 0.5
    mask = clean_mask(votes > 0.5 + 1e-6 if settings.combine == "vote" else mean >= threshold, settings.clean)
    overlaps = [int(np.count_nonzero(first & second)) for first, second in itertools.combinations(masks, 2)]
    agreement = mean_dice([int(np.count_nonzero(member)) for member in masks], overlaps)
    combined = replace(_describe(mask, mean), agreement=agreement, presence=presences[0])
    return mean, mask, [_with_map(_with_review(combined, settings), mean, settings), *records]


def _describe(mask: np.ndarray, probability: np.ndarray) -> MaskRecord:
    """Return the row of a mask, (H, W) bool, and of the probabilities of all pixels, (H, W) float."""
    return replace(describe_mask(mask, probability), max_probability=float(probability.max()))


def _with_review(record: MaskRecord, settings: SegmentSettings) -> MaskRecord:
    return replace(record, review=review_reasons(record, settings.review))


def _keeps_map(record: MaskRecord, settings: SegmentSettings) -> bool:
    return settings.probability_maps == "all" or (settings.probability_maps == "review" and record.review is not None)


def _with_map(record: MaskRecord, probability: np.ndarray, settings: SegmentSettings) -> MaskRecord:
    """Return the record with its probability map, (H, W) float, if the settings ask for it."""
    return replace(record, probability_map=encode_probability(probability)) if _keeps_map(record, settings) else record


def review_reasons(record: MaskRecord, settings: ReviewSettings) -> str | None:
    """Return why a person should review a mask, or None.

    Reasons are "low confidence", "low agreement", "low presence" and "odd area", joined by ", ". An empty mask agrees
    with a low presence.
    """
    low, high = settings.area_fraction or (0, 1)
    limits = {
        "confidence": (record.confidence, settings.min_confidence),
        "agreement": (record.agreement, settings.min_agreement),
        "presence": (record.presence if record.area_px else None, settings.min_presence),
    }
    reasons = [
        f"low {name}"
        for name, (value, minimum) in limits.items()
        if value is not None and minimum is not None and value < minimum
    ]
    return ", ".join([*reasons, *([] if low <= record.area_fraction <= high else ["odd area"])]) or None
