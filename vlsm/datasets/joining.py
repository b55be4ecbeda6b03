"""Several masks of one image and one prompt: each alone would teach that the others are background."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pycocotools import mask as coco

from vlsm.datasets.records import Record
from vlsm.errors import ManifestError
from vlsm.images.run_lengths import check_run_lengths


def find_several_masks(records: Sequence[Record]) -> Iterator[tuple[str, int, str]]:
    """Yield ("several masks", index, message) for each record whose image and prompt an earlier record has too.

    Two records have the same prompt if p1 is equal, or all prompts where there is no p1. Records of one mask are no
    such case.
    """
    for same in _group(records).values():
        first = records[same[0]]
        for index in same[1:]:
            if _mask_of(records[index]) != _mask_of(first):
                message = f"{first.where} has the same image and prompt, but another mask; --set data.join_masks=true"
                yield "several masks", index, f"{message} joins them"


def join_masks(records: Sequence[Record]) -> list[Record]:
    """Return the records, one for each image and prompt: a pixel is foreground if it is so in any of their masks.

    The joined record keeps the prompts that are equal in all of its records. The others describe only one mask.

    Raises:
        ManifestError: masks of one image are of different kinds.
    """
    return [_join([records[index] for index in same]) for same in _group(records).values()]


def _group(records: Sequence[Record]) -> dict[Any, list[int]]:
    groups = defaultdict[Any, list[int]](list)
    for index, record in enumerate(records):
        prompt = record.prompts.get("p1") or repr(sorted(record.prompts.items()))
        groups[record.dataset, record.split, record.image_uri, record.image_selector, prompt].append(index)
    return groups


def _mask_of(record: Record) -> tuple[Any, ...]:
    return record.mask_uri, record.more_masks, record.mask_selector, record.labels, record.mask_rle


def find_contradictions(records: Sequence[Record]) -> Iterator[str]:
    """Yield a sentence for each negative record whose image and prompt have a mask in another record."""
    for same in _group(records).values():
        negatives, others = ([records[i] for i in same if records[i].is_negative is kind] for kind in (True, False))
        if negatives and others:
            yield (
                f"{negatives[0].where} says that {negatives[0].image_uri} does not show the finding, and "
                f"{others[0].where} has a mask of it with the same prompt; correct one of them"
            )


def _join(records: list[Record]) -> Record:
    first = records[0]
    if len(records) == 1:
        return first
    prompts = {
        kind: texts for kind, texts in first.prompts.items() if all(one.prompts.get(kind) == texts for one in records)
    }
    joined = replace(first, prompts=prompts)
    places = {(one.mask_uri, one.more_masks, one.mask_selector) for one in records}
    if all(one.mask_rle is not None for one in records) and len({one.mask_size for one in records}) == 1:
        try:
            for one in records:
                check_run_lengths(str(one.mask_rle), one.mask_size or (0, 0))
        except ValueError as error:
            raise ManifestError(f"{first.where}: {error}") from None
        masks = [{"size": list(one.mask_size or ()), "counts": str(one.mask_rle).encode()} for one in records]
        return replace(joined, mask_rle=coco.merge(masks)["counts"].decode())
    if any(one.mask_rle is not None for one in records):
        raise ManifestError(
            f"{first.where}: the masks of {first.image_uri} cannot be joined: not all are shapes of one size"
        )
    if len(places) == 1 and all(one.labels for one in records):
        return replace(joined, labels=tuple(dict.fromkeys(label for one in records for label in one.labels)))
    if len({(one.mask_selector, one.labels) for one in records}) > 1:
        raise ManifestError(
            f"{first.where}: the masks of {first.image_uri} cannot be joined: they have different labels or slices"
        )
    uris = dict.fromkeys(uri for one in records for uri in (one.mask_uri, *one.more_masks))
    return replace(joined, more_masks=tuple(uris)[1:])
