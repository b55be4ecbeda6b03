"""Lists with masks: Parquet, CSV, TSV or JSON Lines with the columns `image_uri` and `mask_uri`.

A `mask_uri` of `none` says that the image does not show the finding: its mask is empty. An empty cell is an error,
since nobody knows whether a mask was forgotten.

Further columns are optional. `split`: train, val or test, or another usual name for it, such as Training or valid; a
row without one gets "", not yet assigned. `group`: the patient or video. `prompt` or `prompts`, and `dataset`.
`selector` and `mask_selector` name an image and a mask inside of a file, as the selectors in the rows of a run. Columns
of other names are not read, unless `data.columns` or `data.carry` names them: --set data.columns.group=patient_id.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.carried import Carry, find_carried
from vlsm.archive.tables import ending_of, read_manifest_rows, read_partition
from vlsm.datasets.inspection import EXAMPLES_SCHEMA, good_records
from vlsm.datasets.pairing import split_of
from vlsm.datasets.records import NO_MASK, SPLITS, Record, check_texts
from vlsm.errors import ManifestError

_SETTING = "data.columns"


def read_list(
    name: str,
    uri: str,
    files: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    allow: tuple[str, ...] = (),
    further: tuple[str, ...] = (),
) -> Iterator[Record | ManifestError]:
    """Yield the record of each valid row, and the error of each invalid row.

    examples.parquet of a training, and the lists of a sweep, hold every field of a record. If such a table holds a
    dataset of this name, only the records of that dataset are read; else all, with the names of their own datasets.

    Args:
        name: name of the dataset.
        uri: the list, or the folder of its files. Relative locations start at the folder of the list, or at this one.
        files: the files of the list; empty if it is one.
        columns: the setting data.columns.
        allow: the setting run.allow: redirects of HTTP may lead there.
        further: more columns that the records keep, if the list has them.

    Raises:
        ManifestError: the list cannot be read, or has no column with the images or the masks.
    """
    if (examples := _read_examples(uri, allow)) is not None:
        yield from [record for record in examples if record.dataset == name] or examples
        return
    is_folder = bool(files) and list(files) != [uri]
    folder = uri if is_folder else storage.parent(uri)
    has_masks = False
    files, columns = list(files) or [uri], columns or {}
    carried = None
    if further:
        partition = [name for file in files for name in read_partition(file, folder)] if is_folder else []
        carried = find_carried(uri, files, columns, partition, Carry(further, may_lack=True), allow)
    rows = read_manifest_rows(files, columns, folder if is_folder else None, _SETTING, allow, carried)
    for where, row in rows:
        if not (has_masks := has_masks or "mask_uri" in row):
            raise ManifestError(
                f"{where} has no mask_uri; --set {_SETTING}.mask_uri=NAME names the column of the masks"
            )
        try:
            values = {} if carried is None else carried.collect(row, where)
            texts = tuple((key, text) for key, value in values.items() if (text := group_name(value)))
            yield replace(_manifest_record(name, folder, row, where), further=texts)
        except ManifestError as error:
            yield error


def _read_examples(uri: str, allow: tuple[str, ...]) -> list[Record] | None:
    """Return the records of a table that `examples_table` has made, or None for another list."""
    if ending_of(uri) != ".parquet":
        return None
    fs, path = storage.open_uri(uri, allow)
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            if not {"where", "prompts", "image_sha256", "error"} <= set(parquet.schema_arrow.names):
                return None
            table = parquet.read()
    except (pa.ArrowInvalid, OSError):  # also a folder of this name
        return None  # whoever reads it as a list says why that fails
    return [_check_example(record, uri) for record in _typed_records(table, uri)]


def _typed_records(table: pa.Table, uri: str) -> list[Record]:
    """Return the records of a table after a check of its types: somebody else may have written it."""
    names = [name for name in EXAMPLES_SCHEMA.names if name in table.column_names]
    try:
        return good_records(table.select(names).cast(pa.schema([EXAMPLES_SCHEMA.field(name) for name in names])))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ManifestError(f"{uri} is no list of a training: {' '.join(str(error).split())}") from error


def _check_example(record: Record, uri: str) -> Record:
    size = record.mask_size
    if record.split and record.split not in SPLITS:
        raise ManifestError(f"{uri}, {record.where}: split is {record.split!r}; it must be one of {', '.join(SPLITS)}")
    if record.mask_rle is not None and not (size and len(size) == 2 and all(side and side > 0 for side in size)):
        raise ManifestError(f"{uri}, {record.where}: mask_size is {size}; it must be a height and a width")
    return record


def _manifest_record(name: str, folder: str, row: dict[str, Any], where: str) -> Record:
    locations = [row.get(key) for key in ("image_uri", "mask_uri")]
    if not all(isinstance(location, str) and location for location in locations):
        raise ManifestError(
            f"{where}: image_uri and mask_uri are {locations}; both must name a file; the mask_uri {NO_MASK} "
            "says that the image does not show the finding"
        )
    image_uri, mask_uri = (
        location
        if "://" in location or location.startswith("/") or (location == NO_MASK and key == "mask_uri")
        else storage.join(folder, location)
        for key, location in zip(("image_uri", "mask_uri"), map(str, locations), strict=True)
    )
    texts = row.get("prompts") if row.get("prompts") is not None else row.get("prompt")
    prompts = {} if texts is None else {"p1": check_texts(texts, f"{where}, prompts")}
    group = group_name(row.get("group"))
    dataset = str(row.get("dataset") or name)
    selector, mask_selector = (str(row[name]) if row.get(name) else None for name in ("selector", "mask_selector"))
    split = _read_split(row.get("split"), where)
    record = Record(dataset, split, where, image_uri, mask_uri, prompts, group=group)
    return replace(record, image_selector=selector, mask_selector=mask_selector)


def group_name(value: Any) -> str:
    """Return the name of a group. The number 7 is one group, also where pandas has made it 7.0 beside missing cells."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _read_split(value: Any, where: str) -> str:
    """Return one of SPLITS, or "" for a missing value."""
    if value is None or not str(value).strip():
        return ""
    split = split_of(str(value))
    if split is None:
        raise ManifestError(
            f"{where}: split is {value!r}; it must be one of {', '.join(SPLITS)}, or of their usual names"
        )
    return split
