"""Reads lists that are text: CSV, TSV and JSON Lines."""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Iterator
from typing import IO, Any

from vlsm.archive.columns import Cells, Columns, parse_texts, shorten
from vlsm.cells import CHOICE_COLUMNS, INDEX_COLUMNS, LABEL_COLUMNS, read_cell
from vlsm.documents import parse_json
from vlsm.errors import ManifestError
from vlsm.images.formats import file_name
from vlsm.images.gunzip import open_gzip
from vlsm.limits import MAX_LINE_LETTERS

_HEAD_BYTES = 4096
_MARKS = {  # byte order marks; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKED = {
    b"\x1f\x8b": "packed with gzip; its name must end with .gz",
    b"PK\x03\x04": "a zip file, as .xlsx is; save it as CSV",
}


def open_text(file: Any, uri: str) -> io.TextIOWrapper:
    """Return a list file as text: UTF-8, or UTF-16 and UTF-32 if it begins with their mark; unpacked if it is .gz.

    Bytes that are not UTF-8 become surrogates, so that the message about them can name the row.

    Raises:
        ManifestError: it is packed in another way, or has NUL bytes, which no text has.
    """
    if file_name(uri).endswith(".gz"):
        file = open_gzip(file)
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if encoding := next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None):
        return io.TextIOWrapper(file, encoding, newline="")
    if packed := next((packed for mark, packed in _PACKED.items() if head.startswith(mark)), None):
        raise ManifestError(f"{uri} is {packed}")
    if b"\0" in head:
        raise ManifestError(f"{uri} has NUL bytes: it is no text, or UTF-16 without its mark; write it as UTF-8")
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def read_csv(text: IO[str], uri: str, columns: Columns, also: tuple[str, ...]) -> Cells:
    """Yield the cells of a CSV. All cells are text: an image_id 007 stays 007. An empty cell means no value.

    Rows of blank cells, as Excel writes them behind a table, have a number, but are no rows.

    The delimiter is the first of comma, semicolon, tab and bar that gives the header its columns (in a .tsv, the tab is
    tried first). If names in the header have blanks around them, blanks around cells are no part of the cells either.

    Args:
        text: the opened file.
        uri: of the file, in messages.
        columns: finds the known columns.
        also: columns that the folders of the file state.

    Raises:
        ManifestError: the file is empty, there is no column image_uri, a quote is not closed, or a row has more cells
            than the header.
    """
    header, delimiter, lines = read_header(text, uri, columns)
    is_padded = any(name != name.strip(" ") for name in header)
    found = columns.require(header, uri, also)
    # the index of an export, corrected masks, or the images to label next
    ours = (INDEX_COLUMNS, LABEL_COLUMNS, CHOICE_COLUMNS)
    is_ours = any(tuple(header[: len(names)]) == names for names in ours)
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=is_padded)
    for number, cells in enumerate(_read_rows(rows, uri)):
        if number == 0 or not any(map(str.strip, cells)):  # the header, or blank cells
            continue
        _check_cells(cells, header, delimiter, f"{uri}, row {number}")
        cells = list(map(read_cell, cells)) if is_ours else cells
        for known, position in found.items():
            if known in ("prompt", "prompts") and position < len(cells):
                cells[position] = _clean_text(cells[position], f"{uri}, row {number}")
        yield number, found, [(cell.strip(" ") if is_padded else cell) or None for cell in cells]


def read_header(text: IO[str], uri: str, columns: Columns) -> tuple[list[str], str, Iterator[str]]:
    """Return the header of a CSV, its delimiter, and its lines, the header among them; see `read_csv`.

    Raises:
        ManifestError: the file is empty, or a line is too long.
    """
    csv.field_size_limit(MAX_LINE_LETTERS)  # a longer cell is a quote that nobody closed
    read_lines = _lines(text, uri)
    line = next((line for line in read_lines if line.strip()), "")
    delimiters = "\t,;|" if file_name(uri).endswith((".tsv", ".tsv.gz")) else ",;\t|"
    if stated := re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE):  # a line for Excel
        delimiters, line = stated[1], next(read_lines, "")
    if not line:
        raise ManifestError(f"{uri} is empty; a manifest needs image_uri")
    return *_find_header(line, delimiters, columns, uri), itertools.chain([line], read_lines)


def _lines(text: IO[str], uri: str) -> Iterator[str]:
    """Yield the lines of a text. Raise a ManifestError for a line that is too long: it may be as long as the file."""
    for number in itertools.count(1):
        line = text.readline(MAX_LINE_LETTERS + 1)
        if len(line) > MAX_LINE_LETTERS:
            raise ManifestError(
                f"{uri}, line {number} has more than {MAX_LINE_LETTERS:,} letters, which are the most; each line is a "
                "row of the list"
            )
        if not line:
            return
        yield line


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


def _read_rows(rows: Iterator[list[str]], uri: str) -> Iterator[list[str]]:
    """Yield the rows that are not empty; an error names the row."""
    number = 0
    try:
        for number, cells in enumerate(filter(None, rows)):  # noqa: B007 - for the message
            yield cells
    except csv.Error as error:
        raise ManifestError(
            f"{uri} cannot be read as a manifest behind row {number}: {error}; is a quote not closed there?"
        ) from error


def _check_cells(cells: list[str], header: list[str], delimiter: str, where: str) -> None:
    """Raise a ManifestError for a row that could mean something else; `where` names it in the message."""
    if any(cell.strip() for cell in cells[len(header) :]):
        raise ManifestError(
            f"{where} has {len(cells)} cells, but the header has {len(header)} columns: {shorten(cells)}; "
            f"put quotes around a text with the delimiter {delimiter!r}"
        )
    # Empty cells at the end may be absent. But a quote that nobody closed swallows the next rows.
    if len(cells) < len(header) and any("\n" in cell or "\r" in cell for cell in cells):
        raise ManifestError(
            f"{where} has {len(cells)} cells with a line break, but the header has {len(header)} columns: "
            f"{shorten(cells)}; is a quote not closed there?"
        )


def _clean_text(cell: str, where: str) -> str:
    """Return a prompt of a CSV without blanks, and without quotes, around it.

    Raises:
        ManifestError: it has a line break and is no list. A quote that nobody closed swallows the next rows.
    """
    text = cell.strip()
    if ("\n" in text or "\r" in text) and isinstance(parse_texts(text, where), str):
        raise ManifestError(f"{where}: the prompt has a line break: {shorten(text)}; is a quote not closed there?")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def read_json(text: IO[str], uri: str, columns: Columns) -> Cells:
    """Yield the values of a JSON Lines file: each line is a row with columns of its own.

    Raises:
        ManifestError: a line is no object, or has no image_uri.
    """
    for number, where, record in read_records(text, uri):
        found = columns.locate(list(record), columns.find(tuple(record), where))
        if "image_uri" not in found:
            keys = ", ".join(list(record)[:20])
            hint = columns.suggest(list(record))
            raise ManifestError(f"{uri}, row {number} has the keys {keys}; a manifest needs image_uri{hint}")
        yield number, found, list(record.values())


def read_records(text: IO[str], uri: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number of each row of a JSON Lines file, its line in words, and its object.

    Raises:
        ManifestError: a line is no object.
    """
    number = 0
    for line_number, line in enumerate(_lines(text, uri), start=1):
        if line.strip():
            number += 1
            where = f"{uri}, line {line_number}"
            yield number, where, _json_record(line, where)


def _json_record(line: str, where: str) -> dict[str, Any]:
    """Return the object in a line of JSON; `where` names the line in messages."""
    record = parse_json(line.strip(), where, ManifestError, "; each line must be one object with image_uri")
    if not isinstance(record, dict):
        raise ManifestError(f"{where} is {shorten(record)}; a manifest's line is an object with image_uri")
    return record
