"""Reads a labelled dataset: finds out how a folder or list is laid out, and returns its records."""

import itertools
from collections.abc import Iterable, Iterator

from vlsm import storage
from vlsm.archive.places import check_place
from vlsm.archive.tables import MANIFEST_EXTENSIONS, find_lists
from vlsm.datasets.coco import find_coco, read_coco
from vlsm.datasets.completing import complete_records, split_classes
from vlsm.datasets.folders import describe_unknown, list_dataset, pair_folder, read_folder
from vlsm.datasets.lists import read_list
from vlsm.datasets.medvlsm import find_annotations, read_annotations
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.volumes import expand_volumes, may_be_dicom_pair
from vlsm.errors import ConfigError, ManifestError
from vlsm.images.formats import file_name
from vlsm.stores import check_input

_SHOWN = 10  # problems that one error message lists


def read_dataset(name: str, uri: str, settings: DatasetSettings | None = None) -> list[Record]:
    """Return all records of a dataset, in the order of its annotation files, its list, or its images' names.

    Args:
        name: name of the dataset.
        uri: a folder or prefix with `anns/{train,val,test}.json`, `images/`, `masks/`; or one with images and masks
            whose names agree (see `vlsm.datasets.pairing`); or a list: a .parquet, .csv, .tsv or .jsonl, or a folder of
            such files (see `vlsm.datasets.lists`); or a COCO file, or a folder with such files (see
            `vlsm.datasets.coco`). Relative locations start at the list's folder.
        settings: how to read it; None for the defaults.

    Raises:
        ConfigError: there is no dataset at the location.
        ManifestError: an annotation file cannot be read, a record lacks a required value, a record names a file that it
            may not name (see `vlsm.archive.places`), or an image has no mask.
    """
    uri, settings = storage.absolute(uri), settings or DatasetSettings()
    records = _all_or_problems(name, _check_places(_read_layout(name, uri, settings), name, uri, settings))
    records = split_classes(name, records, settings)
    records = _all_or_problems(name, _expand(records, settings))
    return complete_records(name, records, settings)


def _read_layout(name: str, uri: str, settings: DatasetSettings) -> Iterable[Record | ManifestError]:
    """Return the records as the dataset states them, by the first layout that it has."""
    check_input(f"dataset {name}:", uri)
    if not storage.exists(uri, settings.allow):
        raise ConfigError(f"dataset {name}: {uri!r} does not exist")
    fs, path = storage.open_uri(uri, settings.allow)
    is_file = fs.isfile(path)
    if not is_file and (splits := find_annotations(uri)):
        return read_annotations(name, uri, splits)
    if (not is_file or file_name(uri).endswith(".json")) and (files := find_coco(uri)):
        return read_coco(name, files, settings)
    lists, is_mixed = find_lists(uri, is_file, None)
    if lists and not is_mixed:
        return read_list(name, uri, lists, settings.columns, settings.allow, settings.further)
    if is_file:
        raise ConfigError(
            f"dataset {name}: {uri!r} is no folder, no list ({', '.join(MANIFEST_EXTENSIONS)}) and no COCO file (.json)"
        )
    paths = list_dataset(uri)
    pairing = pair_folder(paths)
    if not pairing.pairs:
        raise ConfigError(describe_unknown(name, uri, paths, pairing))
    return read_folder(name, uri, paths, pairing, settings)


def _check_places(
    items: Iterable[Record | ManifestError], name: str, uri: str, settings: DatasetSettings
) -> Iterator[Record | ManifestError]:
    """Yield the records, and an error instead of a record with a location that it may not name."""
    allow = (*settings.allow, *(settings.image_folders[name] for name in {name} & settings.image_folders.keys()))
    for item in items:
        try:
            if isinstance(item, Record):
                check_place(item.image_uri, uri, allow, item.where)
                for mask_uri in item.mask_uris:
                    check_place(mask_uri, uri, allow, item.where, "mask_uri")
            yield item
        except ManifestError as error:
            yield error


def _expand(records: list[Record], settings: DatasetSettings) -> Iterator[Record | ManifestError]:
    """Yield the records of the slices and frames of files with several images, and all other records."""
    items: Iterable[Record | ManifestError] = records
    if any(map(may_be_dicom_pair, records)):
        from vlsm.datasets.dicom_labels import expand_dicom  # needs pydicom, which takes long to import

        items = expand_dicom(records, settings)
    yield from expand_volumes(items, settings)


def _all_or_problems(name: str, items: Iterable[Record | ManifestError]) -> list[Record]:
    records: list[Record] = []
    problems: list[str] = []
    for item in items:
        if isinstance(item, ManifestError):
            problems.append(str(item))
        elif (text := _not_unicode(item)) is not None:
            problems.append(f"{item.where}: {text!r} is no Unicode text; save the list as UTF-8")
        else:
            records.append(item)
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ManifestError(f"dataset {name}: {'; '.join(problems[:_SHOWN])}{more}")
    return records


def _not_unicode(record: Record) -> str | None:
    """Return a text of a record that no table can hold, such as one from a list in Latin-1, or None."""
    texts = [value for value in vars(record).values() if isinstance(value, str)]
    for text in (*texts, *record.more_masks, *itertools.chain(*record.prompts.values()), *record.prompts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return text.encode("utf-8", "backslashreplace").decode()[:80]
    return None
