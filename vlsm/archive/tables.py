"""Reads the rows of a list: a Parquet, CSV, TSV or JSON Lines file, or a folder of such files, as Ray writes it."""

import csv
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.carried import CARRIED_ROWS, Carried
from vlsm.archive.columns import CARRIED, Cells, Columns, Row
from vlsm.archive.listing import list_files
from vlsm.archive.text_tables import open_text, read_csv, read_json
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import file_name, kind_of
from vlsm.images.parquet import PARQUET_ERRORS, find_image_column, list_image_columns, open_texts, read_texts

logger = logging.getLogger("vlsm")

_TEXTS = (".csv", ".tsv", ".jsonl")
MANIFEST_EXTENSIONS = (".parquet", *_TEXTS, *(f"{ending}.gz" for ending in _TEXTS))
_NOTES = ("readme", "license", "notice")  # names without an extension, as an image may have
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the folder of rows without a value


def find_lists(uri: str, is_file: bool, exclude: str | None) -> tuple[list[str], bool]:
    """Return the list files that INPUT is: one file, or a folder with list files of one kind and no image.

    If list files are of several kinds, those of Parquet are returned, and True: only images in them can be meant.

    Hidden files, and names that begin with "_", do not count: _SUCCESS, _metadata, .part-0.parquet.crc. Nor do other
    files that cannot be images, such as README.md.

    Args:
        uri: INPUT.
        is_file: whether it is a file, not a folder.
        exclude: path of a folder whose files do not count, with a slash at its end.

    Raises:
        ManifestError: the folder is a Delta table, whose log says which of its files are valid.
    """
    if is_file:
        return ([uri] if ending_of(uri) else []), False
    fs, path = storage.open_uri(uri)
    if storage.is_local(fs) and not fs.isdir(path):
        return [], False
    names: dict[str, list[str]] = {}  # by their ending
    is_delta = False
    for info in list_files(uri):
        name = info["name"]
        inner = name.removeprefix(path.rstrip("/") + "/")
        is_delta = is_delta or inner.startswith("_delta_log/")
        if _counts(inner) and not (exclude and name.startswith(exclude)):
            if (ending := ending_of(name)) is None:
                return [], False
            names.setdefault(ending, []).append(name if storage.is_local(fs) else fs.unstrip_protocol(name))
    if names and is_delta:
        raise ManifestError(f"{uri} is a Delta table; its log says which files count: write it as plain Parquet files")
    return (names.get(".parquet", []), True) if len(names) > 1 else (next(iter(names.values()), []), False)


def _counts(inner: str) -> bool:
    """Return whether a file may be a list or an image, by its path in the folder."""
    *_, base = parts = inner.split("/")
    is_hidden = any(part.startswith(("_", ".")) for part in parts)
    is_note = kind_of(base) is None or base.lower().startswith(_NOTES)
    return not is_hidden and (ending_of(base) is not None or not is_note)


def ending_of(name: str) -> str | None:
    """Return the ending of a list file, one of MANIFEST_EXTENSIONS, or None. A URL may have a query."""
    base = file_name(name)
    return next((ending for ending in MANIFEST_EXTENSIONS if base.endswith(ending)), None)


def holds_images(uri: str, columns: Mapping[str, str], allow: tuple[str, ...] = ()) -> bool | None:
    """Return whether a file is Parquet with images in it, not a list of images: it has no column with locations.

    None if it cannot be read. The setting `columns` decides where it names `image` or `image_uri`. `allow` is the
    setting `run.allow`.

    Raises:
        ManifestError: it has several columns that may be the images.
    """
    if ending_of(uri) != ".parquet":
        return False
    fs, path = storage.open_uri(uri, allow)
    try:
        with fs.open(path, "rb") as file:
            schema = pq.read_schema(file)
        has_locations = "image_uri" in columns or "image_uri" in Columns(columns).find(schema.names, uri)
        is_list = has_locations and "image" not in columns
        column = None if is_list else find_image_column(schema, columns.get("image"))
        others = [name for name in list_image_columns(schema) if name != column]
        if others and "image" not in columns and (is_list or column):
            read = f"as a list of {columns.get('image_uri', 'image_uri')}" if is_list else f"for the images in {column}"
            logger.warning("%s is read %s; --set columns.image=%s reads the images there", uri, read, others[0])
        return column is not None
    except ImageError as error:
        raise ManifestError(f"{uri}: {str(error).removeprefix(f'{error.reason}: ')}") from error
    except PARQUET_ERRORS:
        return None  # whoever reads it says why that fails


def read_manifest_rows(  # noqa: PLR0913 - every property of a list
    uris: Sequence[str],
    chosen: Mapping[str, str] | None = None,
    folder: str | None = None,
    setting: str = "columns",
    allow: tuple[str, ...] = (),
    carried: Carried | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield the name of each row in messages, and its values by the names of known columns, without further checks.

    Args:
        uris: the files of the list.
        chosen: the setting `columns`; None where it does not exist.
        folder: the folder of a list of several files. Below it, folders such as site=a are a column, as in Hive.
        setting: the name of the setting `columns` in messages.
        allow: the setting `run.allow`: redirects of HTTP may lead there.
        carried: further columns to read. Their names in the rows are marked, see `Carried`.

    Raises:
        ManifestError: a file cannot be read, has no column image_uri, or a row has more cells than the header.
    """
    columns = Columns(chosen, setting, carried)
    for uri in uris:
        partition = {} if folder is None else read_partition(uri, folder)
        fs, path = storage.open_uri(uri, allow)
        try:
            with fs.open(path, "rb") as file:
                yield from _read_file(file, uri, columns, partition)
        except (*PARQUET_ERRORS, csv.Error, EOFError, zlib.error) as error:
            raise ManifestError(f"{uri} cannot be read as a manifest: {error}") from error
    columns.check_met(folder or uris[0])
    columns.report(folder or uris[0])


def read_partition(uri: str, folder: str = "") -> dict[str, str | None]:
    """Return the values that folders below another folder state: {"site": "a"} for site=a/part-0.parquet."""
    pairs = [part.partition("=") for part in uri.removeprefix(folder).split("/")[:-1] if "=" in part]
    return {unquote(name): None if value == _NO_VALUE else unquote(value) for name, _, value in pairs}


def _read_file(file: Any, uri: str, columns: Columns, partition: dict[str, str | None]) -> Iterator[tuple[str, Row]]:
    also = tuple(partition)
    if ending_of(uri) == ".parquet":
        yield from _name_rows(_parquet_cells(file, uri, columns, also), uri, columns, partition)
        return
    with open_text(file, uri) as text:
        is_json = ".jsonl" in str(ending_of(uri))
        cells = read_json(text, uri, columns) if is_json else read_csv(text, uri, columns, also)
        yield from _name_rows(cells, uri, columns, partition)


def _name_rows(rows: Cells, uri: str, columns: Columns, partition: dict[str, str | None]) -> Iterator[tuple[str, Row]]:
    known = columns.read(list(partition.values()), columns.find(tuple(partition), uri), uri)
    for number, found, cells in rows:
        where = f"{uri}, row {number}"
        yield where, known | columns.read(cells, found, where)


def _parquet_cells(file: Any, uri: str, columns: Columns, also: tuple[str, ...]) -> Cells:
    table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # pre_buffer: see storage.read_table
    names = table.schema_arrow.names
    read = {known: names[position] for known, position in columns.require(names, uri, also).items()}
    number = 0
    chosen = list(dict.fromkeys(read.values()))  # the list's `group` may travel too
    texts = open_texts(file, table, chosen)
    found = {known: position for position, known in enumerate(read)}
    for batch in texts.iter_batches(batch_size=CARRIED_ROWS if columns.carried else 4096, columns=chosen):
        for cells in zip(*(_read_cells(batch, name, known, columns) for known, name in read.items()), strict=True):
            number += 1
            yield number, found, cells


def _read_cells(batch: pa.RecordBatch, name: str, known: str, columns: Columns) -> list[Any]:
    column = batch.column(batch.schema.names.index(name))
    return columns.carried.read(known, column) if columns.carried and known.startswith(CARRIED) else read_texts(column)
