"""Folders in MedVLSM's layout: `anns/{train,val,test}.json`, `images/` and `masks/`.

A `mask_name` of "none" says that the image does not show the finding: its mask is empty.

Source: MedVLSM, MIDL 2024, arXiv 2308.07706.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from vlsm import storage
from vlsm.datasets.records import NO_MASK, SPLITS, Record, check_texts
from vlsm.documents import read_json
from vlsm.errors import ManifestError


def find_annotations(uri: str) -> list[str]:
    """Return the splits that have an annotation file."""
    return [split for split in SPLITS if storage.exists(storage.join(uri, "anns", f"{split}.json"))]


def read_annotations(name: str, uri: str, splits: list[str]) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row.

    Raises:
        ManifestError: an annotation file is not a list in JSON.
    """
    for split in splits:
        yield from _layout_records(name, uri, split)


def _layout_records(name: str, uri: str, split: str) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row."""
    location = storage.join(uri, "anns", f"{split}.json")
    rows = read_json(location, f"dataset {name}: {location}", ManifestError)
    if not isinstance(rows, list):
        raise ManifestError(f"dataset {name}: {location} holds a {type(rows).__name__}; it must be a list of records")
    for number, row in enumerate(rows, start=1):
        where = f"{location}, record {number}"
        try:
            yield _layout_record(name, uri, split, row, where)
        except ManifestError as error:
            yield error


def _layout_record(name: str, uri: str, split: str, row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise ManifestError(f"{where} is {row!r:.100}; it must be an object")
    image, mask = (_file_name(row, key, where) for key in ("img_name", "mask_name"))
    prompts = row.get("prompts")
    if not isinstance(prompts, dict):
        raise ManifestError(f"{where}: prompts are {prompts!r:.100}; they must be named, as in {{'p1': 'polyp'}}")
    return Record(
        name,
        split,
        where,
        storage.join(uri, "images", image),
        NO_MASK if mask == NO_MASK else storage.join(uri, "masks", mask),
        {kind: check_texts(texts, f"{where}, prompt {kind}") for kind, texts in prompts.items()},
    )


def _file_name(row: dict[str, Any], key: str, where: str) -> str:
    """Return a file name below the dataset's folder. Sub-folders are allowed; a path that leaves the folder is not."""
    name = row.get(key)
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{where}: {key} is {name!r:.100}; it must name a file")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "://" in name:
        raise ManifestError(f"{where}: {key} is {name!r:.300}; it must lie below the dataset's folder")
    return name
