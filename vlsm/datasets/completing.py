"""What the settings add to the records of a dataset: classes, prompts, and masks that are joined."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from vlsm.datasets.classes import labels_of, split_by_class
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.joining import find_contradictions, find_several_masks, join_masks
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError, ManifestError
from vlsm.images.stored import COLOURS
from vlsm.words import count

logger = logging.getLogger("vlsm")

_SHOWN = 10  # values of a mask that a message names
_THREADS = 16  # that read masks: most of the time they wait for a store


def split_classes(name: str, records: list[Record], settings: DatasetSettings) -> list[Record]:
    """Return a record for each class of each mask file. Records that have labels or run lengths stay as they are.

    Args:
        name: name of the dataset. Settings for a name in a list's column `dataset` are stronger.
        records: as the dataset states them.
        settings: how to read the dataset.
    """
    result: list[Record] = []
    num_split = 0
    for record in records:
        labels = labels_of(settings.classes, record.dataset, name)
        if labels and not record.labels and record.mask_rle is None:
            result += split_by_class(record, labels)
            num_split += 1
        else:
            result.append(record)
    if records and not num_split and labels_of(settings.classes, name):
        logger.warning("dataset %s: data.classes is not used: its masks have classes already", name)
    return result


def complete_records(name: str, records: list[Record], settings: DatasetSettings) -> list[Record]:
    """Return the records of a dataset with the prompts and joined masks that the settings ask for.

    Args:
        name: name of the dataset, as for `split_classes`.
        records: as `split_classes` returns them.
        settings: how to read the dataset.

    Raises:
        ConfigError: data.absent_classes leaves no record.
        ManifestError: masks cannot be joined, or a record says that an image does not show what another one marks.
    """
    if settings.absent_classes == "skip":
        records = _leave_out_absent(name, records, settings)
    records = _give_prompts(name, records, settings)
    if contradictions := list(find_contradictions(records)):
        raise ManifestError(f"dataset {name}: {'; '.join(contradictions[:_SHOWN])}")
    if settings.join_masks:
        joined = join_masks(records)
        logger.info("dataset %s: %s joined to %d (data.join_masks)", name, count(len(records), "record"), len(joined))
        return joined
    if several := list(find_several_masks(records)):
        _, index, message = several[0]
        where = records[index].where
        logger.warning(
            "dataset %s: several masks in %s, such as %s: %s", name, count(len(several), "record"), where, message
        )
    return records


def _leave_out_absent(name: str, records: list[Record], settings: DatasetSettings) -> list[Record]:
    """Return the records without those whose class is not in their image. Those of broken masks stay for the checks.

    Negative records stay too: the dataset names them as examples.

    Raises:
        ConfigError: no record remains.
    """
    reader = ExampleReader(settings)
    by_mask = defaultdict[Any, list[Record]](list)
    for record in records:
        if (
            record.labels and record.mask_selector is None and not record.is_negative
        ):  # slices were chosen when their volume was read
            by_mask[record.mask_uri, record.more_masks].append(record)

    def find_absent(same: Sequence[Record]) -> list[Record]:
        try:
            stored = reader.read_mask(same[0]).stored  # the same for all of these classes
        except ImageError:
            return []
        return [record for record in same if not any(np.isin(values, record.labels).any() for values in stored)]

    with ThreadPoolExecutor(_THREADS) as pool:
        absent = {record.where for record in itertools.chain.from_iterable(pool.map(find_absent, by_mask.values()))}
    logger.info(
        "dataset %s: %d of %d records left out: their class is absent (absent_classes)", name, len(absent), len(records)
    )
    kept = [record for record in records if record.where not in absent]
    if records and not kept:
        values = np.unique(reader.read_mask(records[0]).stored[0])[:_SHOWN]
        held = ", ".join(str(value) if value < COLOURS else f"#{value - COLOURS:06x}" for value in values)
        raise ConfigError(
            f"dataset {name}: no mask has a class; {records[0].mask_uri} holds {held}; correct data.classes, or "
            "--set data.absent_classes=empty"
        )
    return kept


def _give_prompts(name: str, records: list[Record], settings: DatasetSettings) -> list[Record]:
    """Return the records; those without any words get the prompt of their dataset."""
    result, used = [], set[str]()
    for record in records:
        key = next((key for key in (record.dataset, name) if key in settings.prompts), None)
        if key is not None and not record.has_words:
            used.add(key)
            record = replace(record, prompts=record.prompts | {"p1": settings.prompts[key]})
        result.append(record)
    if records and name in settings.prompts and name not in used:
        logger.warning(
            "data.prompts.%s is not used: all records have a prompt of their own; data.prompt=text:WORDS replaces them",
            name,
        )
    return result
