"""Records of labelled datasets. A dataset is a folder with MedVLSM's layout, or a manifest with masks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vlsm import storage
from vlsm.archive.tables import MANIFEST_EXTENSIONS, read_manifest_rows
from vlsm.errors import ConfigError, ManifestError

SPLITS = ("train", "val", "test")
_SHOWN = 10  # problems that one error message lists


@dataclass(frozen=True)
class Record:
    """An image, one of its masks, and the prompts for that mask. An image with several findings has several records.

    Attributes:
        dataset: name of the dataset.
        split: one of SPLITS.
        where: the annotation file and the position in it, for messages.
        image_uri: location of the image.
        mask_uri: location of the mask.
        prompts: kinds of prompts, such as p1, each with at least one alternative text.
    """

    dataset: str
    split: str
    where: str
    image_uri: str
    mask_uri: str
    prompts: dict[str, tuple[str, ...]]


def read_dataset(name: str, uri: str) -> list[Record]:
    """Return all records of a dataset, in the order of its annotation files.

    Args:
        name: name of the dataset.
        uri: a folder or prefix with `anns/{train,val,test}.json`, `images/`, `masks/`, or a manifest (.parquet, .csv,
            .tsv, .jsonl) with `image_uri`, `mask_uri`, `split`, and optionally `prompt` or `prompts` and `dataset`.
            Relative locations start at the manifest's folder.

    Raises:
        ConfigError: there is no dataset at the location.
        ManifestError: an annotation file cannot be read, a record lacks a required value, or a record names a file
            outside the dataset's folder.

    Source: the folder layout comes from MedVLSM, MIDL 2024, arXiv 2308.07706.
    """
    uri = storage.absolute(uri)
    if uri.lower().endswith(MANIFEST_EXTENSIONS):
        if not storage.exists(uri):
            raise ConfigError(f"dataset {name}: there is no manifest at {uri!r}")
        return _all_or_problems(name, list(_manifest_records(name, uri)))
    lists = [split for split in SPLITS if storage.exists(storage.join(uri, "anns", f"{split}.json"))]
    if not lists:
        problem = "has no anns/train.json, anns/val.json or anns/test.json" if storage.exists(uri) else "does not exist"
        raise ConfigError(f"dataset {name}: {uri!r} {problem}")
    return _all_or_problems(name, [item for split in lists for item in _layout_records(name, uri, split)])


def _all_or_problems(name: str, items: list[Record | ManifestError]) -> list[Record]:
    problems = [str(item) for item in items if isinstance(item, ManifestError)]
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ManifestError(f"dataset {name}: {'; '.join(problems[:_SHOWN])}{more}")
    return [item for item in items if isinstance(item, Record)]


def _layout_records(name: str, uri: str, split: str) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row."""
    location = storage.join(uri, "anns", f"{split}.json")
    try:
        rows = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise ManifestError(f"dataset {name}: {location} is not JSON: {error}") from error
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
        raise ManifestError(f"{where} is {row!r}; it must be an object")
    image, mask = (_file_name(row, key, where) for key in ("img_name", "mask_name"))
    prompts = row.get("prompts")
    if not isinstance(prompts, dict):
        raise ManifestError(f"{where}: prompts are {prompts!r}; they must be named, as in {{'p1': 'polyp'}}")
    return Record(
        name,
        split,
        where,
        storage.join(uri, "images", image),
        storage.join(uri, "masks", mask),
        {kind: _texts(texts, f"{where}, prompt {kind}") for kind, texts in prompts.items()},
    )


def _manifest_records(name: str, uri: str) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row."""
    for where, row in read_manifest_rows([uri]):
        try:
            yield _manifest_record(name, uri.rsplit("/", 1)[0], row, where)
        except ManifestError as error:
            yield error


def _manifest_record(name: str, folder: str, row: dict[str, Any], where: str) -> Record:
    locations = [row.get(key) for key in ("image_uri", "mask_uri")]
    if not all(isinstance(location, str) and location for location in locations):
        raise ManifestError(f"{where}: image_uri and mask_uri are {locations}; both must name a file")
    split = row.get("split")
    if split not in SPLITS:
        raise ManifestError(f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
    image_uri, mask_uri = (
        location if "://" in location or location.startswith("/") else storage.join(folder, location)
        for location in map(str, locations)
    )
    texts = row.get("prompts") if row.get("prompts") is not None else row.get("prompt")
    prompts = {} if texts is None else {"p1": _texts(texts, f"{where}, prompts")}
    return Record(str(row.get("dataset") or name), str(split), where, image_uri, mask_uri, prompts)


def _file_name(row: dict[str, Any], key: str, where: str) -> str:
    """Return a file name below the dataset's folder. Sub-folders are allowed; a path that leaves the folder is not."""
    name = row.get(key)
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{where}: {key} is {name!r}; it must name a file")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "://" in name:
        raise ManifestError(f"{where}: {key} is {name!r}; it must lie below the dataset's folder")
    return name


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ManifestError(f"{where} is {value!r}; it must be a text or a list of texts")
    return texts
