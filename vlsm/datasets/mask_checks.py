"""Checks of masks: the values in their files, empty and full masks, orientation, and size at the model's input."""

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlsm.datasets.records import SPLITS, Record
from vlsm.images.stored import COLOURS

if TYPE_CHECKING:
    from vlsm.datasets.inspection import Facts

MOST_VALUES = 16
_SHOWN = 3  # classes that a proposal names
_NEARLY_ALL = 0.95
_MOST_THRESHOLD = 254  # of data.mask_threshold

Values = tuple[float, ...]
Problem = tuple[str, int, str]  # kind, index of the record, message


def list_values(stored: Sequence[np.ndarray]) -> tuple[Values, int]:
    """Return the distinct values of mask files in increasing order, and their number.

    Of more than 16 values, the lowest 15 and the highest are returned: 8-bit JPEG masks have up to 256.

    Args:
        stored: (H, W) arrays of any integer or float type, as in `Mask.stored`.
    """
    distinct = sorted({value for values in stored for value in _distinct(values)})
    kept = distinct if len(distinct) <= MOST_VALUES else [*distinct[: MOST_VALUES - 1], distinct[-1]]
    return tuple(kept), len(distinct)


def _distinct(stored: np.ndarray) -> list[float]:
    if stored.dtype.kind in "bu" and stored.dtype.itemsize <= 2:  # counting is much faster than sorting
        return [int(value) for value in np.flatnonzero(np.bincount(stored.ravel()))]
    return [int(value) if float(value).is_integer() else float(value) for value in np.unique(stored)]


def describe_values(values: Values, count: int) -> str:
    """Return the result of `list_values` as words, such as "0, 1 and 2" or "256 or more values from 0 to 255"."""
    if count > MOST_VALUES:
        return f"{count:,} or more values from {_describe_value(values[0])} to {_describe_value(values[-1])}"
    return join_words(list(map(_describe_value, values)))


def _describe_value(value: float) -> str:
    if isinstance(value, int) and COLOURS <= value < COLOURS + (1 << 24):
        return f"#{int(value) - COLOURS:06x}"
    return str(value) if isinstance(value, int) else f"{value:g}"


def join_words(words: Sequence[str]) -> str:
    """Return words as a person lists them: "0, 1 and 2"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def describe_foreground(records: Sequence[Record], facts: Sequence["Facts"], mask_threshold: int) -> list[str]:
    """Return one line per dataset with the values in its mask files, and those that are foreground."""
    return [
        f"dataset {dataset}: masks hold {describe_values(values, count)}; "
        + _describe_rule([records[index] for index in indices], values, count, mask_threshold)
        for dataset, indices in _group(records, facts).items()
        for values, count in [_join_values([facts[index] for index in indices])]
        if values
    ]


def _describe_rule(records: Sequence[Record], values: Values, count: int, mask_threshold: int) -> str:
    if any(record.labels for record in records):
        names = {
            label: text
            for record in records
            for label in record.labels
            for text in [next((text for texts in record.prompts.values() for text in texts if text), "")]
        }
        described = [_describe_value(label) + f" ({text})" * bool(text) for label, text in sorted(names.items())]
        absent = (
            [] if count > len(values) else [_describe_value(label) for label in sorted(names) if label not in values]
        )
        missing = f"; {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} in no mask" if absent else ""
        return f"the classes take {', '.join(described)} as foreground{missing}"
    rule = f"values above data.mask_threshold={mask_threshold} are foreground"
    if count > len(values):
        return rule
    above = tuple(value for value in values if value > mask_threshold)
    several = [value for value in values if value > 0]
    classes = ", ".join(f"{_describe_value(value)}: NAME" for value in several[:_SHOWN])
    more = ", ..." if len(several) > _SHOWN else ""
    advice = f"; if these are classes: --set 'data.classes={{{classes}{more}}}'" if len(several) > 1 else ""
    return f"{rule}: {describe_values(above, len(above)) if above else 'none of these'}{advice}"


def find_useless_masks(records: Sequence[Record], facts: Sequence["Facts"], mask_threshold: int) -> list[str]:
    """Return one sentence for each dataset with splits whose masks are all empty, or all full.

    A model learns nothing from them, and its Dice is 1 if it marks nothing. 95 % are as good as all if the threshold
    may be the reason: if empty mask files hold values above 0. Files that hold only 0 have no foreground on purpose,
    as those of normal images and of most slices of a volume.
    """
    sentences = []
    for dataset, indices in _group(records, facts).items():
        has_labels = any(records[index].labels for index in indices)
        for state, share in (("empty", 0), ("full", 1)):
            counts, useless = [], []
            for split in dict.fromkeys(records[index].split for index in indices):
                group = [facts[index] for index in indices if records[index].split == split]
                found = [fact for fact in group if fact.area_fraction == share]
                may_be_all = not has_labels and (share or any(max(fact.mask_values, default=0) > 0 for fact in found))
                if len(found) >= (_NEARLY_ALL if may_be_all else 1) * len(group):
                    counts.append(f"{len(found):,} of {len(group):,} {f'{split} ' if split else ''}masks")
                    useless += found
            if useless:
                reason = _explain_useless(useless, bool(share), has_labels, mask_threshold)
                sentences.append(f"dataset {dataset}: {join_words(counts)} are {state}{reason}")
    return sentences


def _explain_useless(facts: Sequence["Facts"], are_full: bool, has_labels: bool, mask_threshold: int) -> str:
    values, count = _join_values(facts)
    if not values:
        return ""
    held = f": the mask files hold {'only ' if count == 1 else ''}{describe_values(values, count)}"
    if has_labels:
        return f"{held}, and {'nothing but' if are_full else 'none of'} the values of the classes"
    rule = f"values above data.mask_threshold={mask_threshold} are foreground"
    if count == 1 or (not are_full and values[-1] <= 0):  # no threshold separates anything
        return f"{held}, and {rule}"
    threshold = values[0] if are_full else 0 if count <= MOST_VALUES else values[-1] // 2
    fits = 0 <= threshold <= _MOST_THRESHOLD and float(threshold).is_integer()
    return f"{held}, and {rule}" + (f"; --set data.mask_threshold={threshold:g}" if fits else "")


def _join_values(facts: Sequence["Facts"]) -> tuple[Values, int]:
    """Return the values of all masks, and their number: more than the values if those of a mask are incomplete."""
    distinct = sorted({value for fact in facts for value in fact.mask_values})
    counts = [fact.num_mask_values for fact in facts if fact.num_mask_values > len(fact.mask_values)]
    return tuple(distinct), max([len(distinct), *counts])


def _group(records: Sequence[Record], facts: Sequence["Facts"]) -> dict[str, list[int]]:
    """Return the indices of the readable records by dataset, without the negative ones: they have no mask files."""
    groups: dict[str, list[int]] = {}
    for index, (record, fact) in enumerate(zip(records, facts, strict=True)):
        if not fact.error and not record.is_negative:
            groups.setdefault(record.dataset, []).append(index)
    return groups


def find_all_negative(
    records: Sequence[Record], facts: Sequence["Facts"], among: Container[str] = (*SPLITS, "")
) -> list[str]:
    """Return a sentence for each split whose readable records are all negative, of all datasets together.

    A dataset of negative records alone is right beside another one with findings. Masks without foreground are the
    matter of `find_useless_masks`.

    Args:
        records: the records.
        facts: the facts of their files.
        among: the splits to look at.
    """
    splits: dict[str, list[bool]] = {}
    for record, fact in zip(records, facts, strict=True):
        if not fact.error and record.split in among:
            splits.setdefault(record.split, []).append(record.is_negative)
    return [
        f"all {len(are_negative):,} {f'{split} ' if split else ''}records say that their image does not show the "
        "finding (mask none); nothing can be learned or judged without images that show it"
        for split, are_negative in splits.items()
        if all(are_negative)
    ]


def check_masks(records: Sequence[Record], facts: Sequence["Facts"], good: Sequence[int]) -> Iterator[Problem]:
    """Yield the problems of single masks, and of masks of one image."""
    yield from _empty_or_full(records, facts, good)
    yield from _several_masks(records, facts, good)
    yield from _orientations(records, facts, good)
    yield from _vanishing(records, facts, good)


def _empty_or_full(records: Sequence[Record], facts: Sequence["Facts"], good: Sequence[int]) -> Iterator[Problem]:
    for index in good:
        fact, record = facts[index], records[index]
        if 0 < fact.area_fraction < 1 or record.is_negative:
            continue
        name = record.mask_uri or record.where
        values = describe_values(fact.mask_values, fact.num_mask_values) if fact.mask_values else ""
        held = f"; it holds {values}" if values else ""
        rule = "foreground" if not values else "of its class" if record.labels else "above data.mask_threshold"
        if not fact.area_fraction:
            yield "empty mask", index, f"no pixel of {name} is {rule}{held}"
        else:
            yield "full mask", index, f"every pixel of {name} is {rule}{held}"


def mask_key(record: Record, fact: "Facts") -> tuple[object, ...]:
    """Return what tells the mask of a record from other masks: one file can hold the masks of several classes."""
    return fact.mask_sha256, record.labels, record.mask_rle


def _several_masks(records: Sequence[Record], facts: Sequence["Facts"], good: Sequence[int]) -> Iterator[Problem]:
    """Yield each record whose image and prompt an earlier record has too, with another mask."""
    firsts: dict[tuple[object, ...], int] = {}
    for index in good:
        record, fact = records[index], facts[index]
        for kind, texts in _told_prompts(record):
            first = firsts.setdefault((record.split, fact.image_sha256, kind, texts), index)
            if mask_key(records[first], facts[first]) != mask_key(record, fact):
                prompt = f"the prompt {texts[0]!r} ({kind})" if texts else "no prompt"
                message = f"{record.image_uri} has {prompt} and another mask in {records[first].where}; the model can "
                yield "several masks", index, message + "answer with one mask only"
                break


def _told_prompts(record: Record) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return the prompts that have words. Without any, all records of an image have the same prompt: none."""
    return [(kind, texts) for kind, texts in record.prompts.items() if any(texts)] or [("", ())]


def _orientations(records: Sequence[Record], facts: Sequence["Facts"], good: Sequence[int]) -> Iterator[Problem]:
    for index in good:
        fact, record = facts[index], records[index]
        orientation, other = fact.image_orientation, fact.mask_orientation
        tags = f"{record.image_uri} has the EXIF orientation {orientation} and its mask has {other}"
        if fact.is_turned:
            yield "turned", index, f"{tags}; the mask has the size of the stored image, so it was turned like the image"
        elif orientation != other and _is_ambiguous(fact):
            done = "the mask was kept as it is" if other == 1 else "each was turned by its own tag"
            yield "kept", index, f"{tags}; their sizes do not show whether they fit, so {done}"


def _is_ambiguous(fact: "Facts") -> bool:
    """Return whether image and mask have equal sizes with and without their orientations; from 5, sides are swapped."""
    return fact.height == fact.width or (fact.image_orientation >= 5) == (fact.mask_orientation >= 5)


def _vanishing(records: Sequence[Record], facts: Sequence["Facts"], good: Sequence[int]) -> Iterator[Problem]:
    for index in good:
        fact = facts[index]
        if fact.area_fraction and fact.square_px == 0:
            area_px = round(fact.area_fraction * fact.height * fact.width)
            size = f"{fact.width} x {fact.height}"
            message = f"the mask of {records[index].image_uri} has {area_px:,} foreground pixels at {size}, and none"
            yield f"vanishes at {fact.square_side} pixels", index, f"{message} at the model's size"
