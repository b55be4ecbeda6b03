"""Lists with masks: a Parquet, CSV, TSV or JSON Lines file with `image_uri`, `mask_uri` and `split`.

examples.parquet of a training, and the lists of a sweep, are such lists too: they hold every field of a record.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.tables import read_manifest_rows
from vlsm.datasets.inspection import good_records
from vlsm.datasets.records import SPLITS, Record, check_texts
from vlsm.errors import ManifestError


def read_list(name: str, uri: str) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row.

    Of examples.parquet, if it holds a dataset of this name, only the records of that dataset; else all, with the names
    of their own datasets.
    """
    if (examples := _read_examples(uri)) is not None:
        yield from [record for record in examples if record.dataset == name] or examples
        return
    for where, row in read_manifest_rows([uri]):
        try:
            yield _manifest_record(name, uri.rsplit("/", 1)[0], row, where)
        except ManifestError as error:
            yield error


def _read_examples(uri: str) -> list[Record] | None:
    """Return the records of a table that `examples_table` has made, or None for another list."""
    if not uri.lower().endswith(".parquet"):
        return None
    fs, path = storage.open_uri(uri)
    try:
        with fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            is_made = {"where", "prompts", "image_sha256", "error"} <= set(table.schema_arrow.names)
            return good_records(table.read()) if is_made else None
    except pa.ArrowInvalid:
        return None  # whoever reads it as a list says why that fails


def _manifest_record(name: str, folder: str, row: dict[str, Any], where: str) -> Record:
    locations = [row.get(key) for key in ("image_uri", "mask_uri")]
    if not all(isinstance(location, str) and location for location in locations):
        raise ManifestError(f"{where}: image_uri and mask_uri are {locations}; both must name a file")
    split = row.get("split") or ""
    if split and split not in SPLITS:
        raise ManifestError(f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
    image_uri, mask_uri = (
        location if "://" in location or location.startswith("/") else storage.join(folder, location)
        for location in map(str, locations)
    )
    texts = row.get("prompts") if row.get("prompts") is not None else row.get("prompt")
    prompts = {} if texts is None else {"p1": check_texts(texts, f"{where}, prompts")}
    return Record(str(row.get("dataset") or name), str(split), where, image_uri, mask_uri, prompts)
