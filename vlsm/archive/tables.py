"""Reads the rows of a list: a Parquet, CSV, TSV or JSON Lines file, or a folder of such files, as Ray writes it."""

import codecs
import csv
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any
from urllib.parse import unquote

import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.columns import Columns, Row, shorten
from vlsm.archive.listing import list_files
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import kind_of
from vlsm.images.parquet import PARQUET_ERRORS, find_image_column, list_image_columns

logger = logging.getLogger("vlsm")

_TEXTS = (".csv", ".tsv", ".jsonl")
MANIFEST_EXTENSIONS = (".parquet", *_TEXTS, *(f"{ending}.gz" for ending in _TEXTS))
_MOST_CELL_LETTERS = 1 << 24  # of a CSV; a longer cell is a quote that nobody closed
_HEAD_BYTES = 4096
_NOTES = ("readme", "license", "notice")  # names without an extension, as an image may have
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the folder of rows without a value
_MARKS = {  # byte order marks; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Cells = Iterator[tuple[int, Mapping[str, int], Sequence[Any]]]  # a row's number, the positions of known columns, cells


def find_lists(uri: str, is_file: bool, exclude: str | None) -> list[str]:
    """Return the list files that INPUT is: one file, or a folder with list files of one kind and no image.

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
        return [uri] if ending_of(uri) else []
    fs, path = storage.open_uri(uri)
    if storage.is_local(fs) and not fs.isdir(path):
        return []
    names: list[str] = []
    is_delta = False
    for info in list_files(uri):
        name = info["name"]
        inner = name.removeprefix(path.rstrip("/") + "/")
        is_delta = is_delta or inner.startswith("_delta_log/")
        if _counts(inner) and not (exclude and name.startswith(exclude)):
            if (ending := ending_of(name)) is None or ending_of(names[0] if names else name) != ending:
                return []
            names.append(name if storage.is_local(fs) else fs.unstrip_protocol(name))
    if names and is_delta:
        raise ManifestError(f"{uri} is a Delta table; its log says which files count: write it as plain Parquet files")
    return names


def _counts(inner: str) -> bool:
    """Return whether a file may be a list or an image, by its path in the folder."""
    *_, base = parts = inner.split("/")
    is_hidden = any(part.startswith(("_", ".")) for part in parts)
    is_note = kind_of(base) is None or base.lower().startswith(_NOTES)
    return not is_hidden and (ending_of(base) is not None or not is_note)


def ending_of(name: str) -> str | None:
    """Return the ending of a list file, one of MANIFEST_EXTENSIONS, or None for another file."""
    return next((ending for ending in MANIFEST_EXTENSIONS if name.lower().endswith(ending)), None)


def holds_images(uri: str, columns: Mapping[str, str]) -> bool:
    """Return whether a file is Parquet with images in it, not a list of images: it has no column with locations.

    The setting `columns` decides where it names `image` or `image_uri`.

    Raises:
        ManifestError: it has several columns that may be the images.
    """
    if ending_of(uri) != ".parquet":
        return False
    fs, path = storage.open_uri(uri)
    try:
        with fs.open(path, "rb") as file:
            schema = pq.read_schema(file)
        is_list = "image" not in columns and "image_uri" in Columns(columns).find(schema.names, uri)
        column = None if is_list else find_image_column(schema, columns.get("image"))
        others = [name for name in list_image_columns(schema) if name != column]
        if others and "image" not in columns and (is_list or column):
            read = f"as a list of {columns.get('image_uri', 'image_uri')}" if is_list else f"for the images in {column}"
            logger.warning("%s is read %s; --set columns.image=%s reads the images there", uri, read, others[0])
        return column is not None
    except ImageError as error:
        raise ManifestError(f"{uri}: {error}") from error
    except PARQUET_ERRORS:
        return False  # whoever reads it as a list says why that fails


def read_manifest_rows(
    uris: Sequence[str], chosen: Mapping[str, str] | None = None, folder: str | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield the name of each row in messages, and its values by the names of known columns, without further checks.

    Args:
        uris: the files of the list.
        chosen: the setting `columns`; None where it does not exist.
        folder: the folder of a list of several files. Below it, folders such as site=a are a column, as in Hive.

    Raises:
        ManifestError: a file cannot be read, has no column image_uri, or a row has more cells than the header.
    """
    columns = Columns(chosen)
    for uri in uris:
        partition = {} if folder is None else read_partition(uri, folder)
        fs, path = storage.open_uri(uri)
        try:
            with fs.open(path, "rb") as file:
                yield from _read_file(file, uri, columns, partition)
        except (*PARQUET_ERRORS, EOFError, zlib.error) as error:
            raise ManifestError(f"{uri} cannot be read as a manifest: {error}") from error
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
        cells = _json_cells(text, uri, columns) if is_json else _csv_cells(text, uri, columns, also)
        yield from _name_rows(cells, uri, columns, partition)


def _name_rows(rows: Cells, uri: str, columns: Columns, partition: dict[str, str | None]) -> Iterator[tuple[str, Row]]:
    known = columns.read(list(partition.values()), columns.find(tuple(partition), uri), uri)
    for number, found, cells in rows:
        where = f"{uri}, row {number}"
        yield where, known | columns.read(cells, found, where)


def _parquet_cells(file: Any, uri: str, columns: Columns, also: tuple[str, ...]) -> Cells:
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    read = {known: names[position] for known, position in columns.require(names, uri, also).items()}
    number = 0
    for batch in table.iter_batches(batch_size=4096, columns=list(read.values())):
        found = {known: batch.schema.names.index(name) for known, name in read.items()}
        for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            number += 1
            yield number, found, cells


def open_text(file: Any, uri: str) -> io.TextIOWrapper:
    """Return a list file as text: UTF-8, or UTF-16 and UTF-32 if it begins with their mark; unpacked if it is .gz.

    Bytes that are not UTF-8 become surrogates, so that the message about them can name the row.

    Raises:
        ManifestError: it has NUL bytes, which no text has.
    """
    if uri.lower().endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if encoding := next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None):
        return io.TextIOWrapper(file, encoding, newline="")
    if b"\0" in head:
        raise ManifestError(f"{uri} has NUL bytes: it is no text, or UTF-16 without its mark; write it as UTF-8")
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def _csv_cells(text: IO[str], uri: str, columns: Columns, also: tuple[str, ...]) -> Cells:
    """Yield the cells of a CSV. All cells are text: an image_id 007 stays 007. An empty cell means no value.

    The delimiter is the first of comma, semicolon, tab and bar that gives the header its columns (in a .tsv, the tab is
    tried first). If names in the header have blanks around them, blanks around cells are no part of the cells either.
    """
    line = next((line for line in text if line.strip()), "")
    delimiters = "\t,;|" if ending_of(uri) in (".tsv", ".tsv.gz") else ",;\t|"
    if stated := re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE):  # a line for Excel
        delimiters, line = stated[1], next(text, "")
    header, delimiter = _find_header(line, delimiters, columns, uri)
    is_padded = any(name != name.strip(" ") for name in header)
    found = columns.require(header, uri, also)
    csv.field_size_limit(_MOST_CELL_LETTERS)
    lines = itertools.chain([line], text)
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=is_padded)
    for number, cells in enumerate(_read_csv(rows, uri)):
        if number == 0:  # the header
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            raise ManifestError(
                f"{uri}, row {number} has {len(cells)} cells, but the header has {len(header)} columns: "
                f"{shorten(cells)}; put quotes around a text with the delimiter {delimiter!r}"
            )
        for known, position in found.items():
            if known in ("prompt", "prompts") and position < len(cells):
                cells[position] = _clean_text(cells[position], f"{uri}, row {number}")
        yield number, found, [(cell.strip(" ") if is_padded else cell) or None for cell in cells]


def _find_header(line: str, delimiters: str, columns: Columns, uri: str) -> tuple[list[str], str]:
    """Return the names in the first line of a CSV, without empty ones at the end, and the delimiter between them."""
    headers = []
    for delimiter in delimiters:
        header = next(csv.reader([line], delimiter=delimiter), [])
        while header and not header[-1].strip():
            header.pop()
        if "image_uri" in columns.find(header, uri):
            return header, delimiter
        headers.append((header, delimiter))
    return max(headers, key=lambda pair: len(pair[0]))


def _read_csv(rows: Iterator[list[str]], uri: str) -> Iterator[list[str]]:
    """Yield the rows that are not empty; an error names the row."""
    number = 0
    try:
        for number, cells in enumerate(filter(None, rows)):  # noqa: B007 - for the message
            yield cells
    except csv.Error as error:
        raise ManifestError(
            f"{uri} cannot be read as a manifest behind row {number}: {error}; is a quote not closed there?"
        ) from error


def _clean_text(cell: str, where: str) -> str:
    """Return a prompt of a CSV without blanks, and without quotes, around it.

    Raises:
        ManifestError: it has a line break. A quote that nobody closed swallows the next rows.
    """
    text = cell.strip()
    if ("\n" in text or "\r" in text) and not text.startswith(("[", "(")):
        raise ManifestError(f"{where}: the prompt has a line break: {shorten(text)}; is a quote not closed there?")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def _json_cells(text: IO[str], uri: str, columns: Columns) -> Cells:
    number = 0
    for line_number, line in enumerate(text, start=1):
        if line.strip():
            number += 1
            record = _json_record(line, f"{uri}, line {line_number}")
            found = columns.find(tuple(record), f"{uri}, line {line_number}")
            if "image_uri" not in found:
                keys = ", ".join(list(record)[:20])
                hint = columns.suggest(list(record))
                raise ManifestError(f"{uri}, row {number} has the keys {keys}; a manifest needs image_uri{hint}")
            yield number, found, list(record.values())
    columns.check_met(uri)


def _json_record(line: str, where: str) -> dict[str, Any]:
    """Return the object in a line of JSON; `where` names the line in messages."""
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ManifestError(f"{where} is {shorten(record)}; a manifest's line is an object with image_uri")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return record
