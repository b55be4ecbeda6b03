"""Reads a labelled dataset: finds out how a folder or list is laid out, and returns its records."""

from collections.abc import Iterable, Iterator

from vlsm import storage
from vlsm.archive.tables import MANIFEST_EXTENSIONS
from vlsm.datasets.coco import find_coco, read_coco
from vlsm.datasets.lists import read_list
from vlsm.datasets.medvlsm import find_annotations, read_annotations
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.volumes import expand_volumes, may_be_dicom_pair
from vlsm.errors import ConfigError, ManifestError

_SHOWN = 10  # problems that one error message lists


def read_dataset(name: str, uri: str, settings: DatasetSettings | None = None) -> list[Record]:
    """Return all records of a dataset, in the order of its annotation files.

    Args:
        name: name of the dataset.
        uri: a folder or prefix with `anns/{train,val,test}.json`, `images/`, `masks/`, or a manifest (.parquet, .csv,
            .tsv, .jsonl) with `image_uri`, `mask_uri`, `split`, and optionally `prompt` or `prompts` and `dataset`.
            Relative locations start at the manifest's folder. Or a COCO file, or a folder with such files; see
            `vlsm.datasets.coco`.
        settings: how to read it; None for the defaults.

    Raises:
        ConfigError: there is no dataset at the location.
        ManifestError: an annotation file cannot be read, a record lacks a required value, or a record names a file
            outside the dataset's folder.
    """
    settings = settings or DatasetSettings()
    return _all_or_problems(name, _expand(_read_layout(name, uri, settings), settings))


def _expand(records: list[Record], settings: DatasetSettings) -> Iterator[Record | ManifestError]:
    """Yield the records of the slices and frames of files with several images, and all other records."""
    items: Iterable[Record | ManifestError] = records
    if any(map(may_be_dicom_pair, records)):
        from vlsm.datasets.dicom_labels import expand_dicom  # needs pydicom, which takes long to import

        items = expand_dicom(records, settings)
    yield from expand_volumes(items, settings)


def _read_layout(name: str, uri: str, settings: DatasetSettings) -> list[Record]:
    """Return the records, one for each volume that is not yet cut into slices."""
    uri = storage.absolute(uri)
    if uri.lower().endswith(MANIFEST_EXTENSIONS):
        if not storage.exists(uri):
            raise ConfigError(f"dataset {name}: there is no manifest at {uri!r}")
        return _all_or_problems(name, read_list(name, uri))
    splits = find_annotations(uri)
    if not splits and (files := find_coco(uri)):
        return _all_or_problems(name, read_coco(name, files, settings))
    if not splits:
        problem = "has no anns/train.json, anns/val.json or anns/test.json" if storage.exists(uri) else "does not exist"
        raise ConfigError(f"dataset {name}: {uri!r} {problem}")
    return _all_or_problems(name, read_annotations(name, uri, splits))


def _all_or_problems(name: str, items: Iterable[Record | ManifestError]) -> list[Record]:
    records: list[Record] = []
    problems: list[str] = []
    for item in items:
        if isinstance(item, Record):
            records.append(item)
        else:
            problems.append(str(item))
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ManifestError(f"dataset {name}: {'; '.join(problems[:_SHOWN])}{more}")
    return records
