"""Lists with masks: a Parquet, CSV, TSV or JSON Lines file with `image_uri`, `mask_uri` and `split`.

`selector` and `mask_selector` name an image and a mask inside of a file, as the selectors in the rows of a run.
"""

from collections.abc import Iterator
from typing import Any

from vlsm import storage
from vlsm.archive.tables import read_manifest_rows
from vlsm.datasets.records import SPLITS, Record, check_texts
from vlsm.errors import ManifestError


def read_list(name: str, uri: str) -> Iterator[Record | ManifestError]:
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
    prompts = {} if texts is None else {"p1": check_texts(texts, f"{where}, prompts")}
    image_selector, mask_selector = (
        str(row[column]) if row.get(column) else None for column in ("selector", "mask_selector")
    )
    dataset = str(row.get("dataset") or name)
    return Record(
        dataset,
        str(split),
        where,
        image_uri,
        mask_uri,
        prompts,
        image_selector=image_selector,
        mask_selector=mask_selector,
    )
