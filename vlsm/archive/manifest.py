"""Reads a manifest, the user's own list of images: a Parquet, CSV or JSON Lines file with one row per image."""

import csv
import datetime
import functools
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ManifestError

MANIFEST_EXTENSIONS = (".parquet", ".csv", ".jsonl")
_MAX_TEXT_BYTES = 8192  # limit for an image_id, a location, an etag and a prompt


def read_image_list(uri: str, prompts: tuple[str, ...], allow: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the images of a manifest as rows with columns of PLAN_SCHEMA; arguments as for `open_archive`.

    Raises:
        ManifestError: the manifest cannot be read, lacks a column or a value, or has an image_uri that is not allowed.
    """
    folder = storage.absolute(uri.rsplit("/", 1)[0] if "/" in uri else ".")
    for number, row in enumerate(read_manifest_rows(uri), start=1):
        where = f"{uri}, row {number}"
        image_uri = row.get("image_uri")
        if not isinstance(image_uri, str) or not image_uri:
            raise ManifestError(f"{where}: image_uri is {_shorten(image_uri)}; it must name an image")
        is_relative = "://" not in image_uri and not image_uri.startswith("/")
        location = storage.join(folder, image_uri) if is_relative else image_uri
        image_id = _text(row.get("image_id")) or image_uri
        texts = _row_prompts(row, prompts, where)
        etag = _text(row.get("etag"))
        for text in (image_id, location, etag or "", *texts):
            _check_text(text, where)
        _check_place(location, uri, allow, where)
        yield {"image_id": image_id, "image_uri": location, "prompts": texts} | describe_file(
            _size(row.get("size_bytes")), etag, row.get("mtime")
        )


def _check_text(text: str, where: str) -> None:
    """Raise a ManifestError if a text is not valid Unicode or too long; `where` names its row in the message."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ManifestError(f"{where}: {_shorten(text)} is no Unicode text; write the manifest as UTF-8") from error
    if num_bytes > _MAX_TEXT_BYTES:
        raise ManifestError(
            f"{where}: a text of {num_bytes:,} bytes; {_MAX_TEXT_BYTES:,} are the most: {_shorten(text)}"
        )


def _check_place(location: str, uri: str, allow: tuple[str, ...], where: str) -> None:
    """Raise a ManifestError if a manifest may not name a location; `where` names its row in the message."""
    scheme, rest = storage.split_scheme(uri)
    if scheme in ("file", "local"):  # a manifest on this machine may name every file that its user may read
        if not _is_known(storage.split_scheme(location)[0]):
            raise ManifestError(
                f"{where}: image_uri {_shorten(location)} is no location that is known here; "
                "use a path or a URI whose fsspec package is installed"
            )
        return
    if ".." in location.split("/"):
        raise ManifestError(f"{where}: image_uri {_shorten(location)} leads upwards; it must not contain '..'")
    bucket = f"{scheme}://{rest.partition('/')[0]}/"
    if not any(location.startswith(prefix.rstrip("/") + "/") for prefix in (bucket, *allow)):
        raise ManifestError(
            f"{where}: image_uri {_shorten(location)} lies outside of {bucket}; "
            f"--set 'run.allow=[{location[:60]}]' if it may be read"
        )


@functools.cache
def _is_known(scheme: str) -> bool:
    """Return whether fsspec has a file system for the scheme, and its package is installed."""
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError):
        return False
    return True


def _shorten(value: Any) -> str:
    """Return the repr of a value, cut to about 100 characters, for messages."""
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}... ({len(text):,} characters)"


def describe_file(size_bytes: int | None, etag: str | None, mtime: Any) -> dict[str, Any]:
    """Return the columns that describe a file; its image_version is the etag, or else its size and mtime."""
    modified = _timestamp(mtime)
    version = [str(size_bytes)] if size_bytes is not None else []
    version += [_shorten(mtime) if modified is None else modified.isoformat()] if mtime is not None else []
    return {
        "size_bytes": size_bytes,
        "etag": etag,
        "mtime": modified,
        "image_version": etag or " ".join(version) or None,
    }


def _row_prompts(row: dict[str, Any], prompts: tuple[str, ...], where: str) -> list[str]:
    """Return the prompts of a row without repetitions, or the run's prompts if the row has none."""
    row_prompts = row.get("prompts")
    if row_prompts is None:
        row_prompts = row.get("prompt")
    if row_prompts is None:
        return list(prompts)
    row_prompts = [row_prompts] if isinstance(row_prompts, str) else row_prompts
    is_list = isinstance(row_prompts, list) and all(isinstance(prompt, str) for prompt in row_prompts)
    if not row_prompts or not is_list:
        raise ManifestError(f"{where}: prompts are {_shorten(row_prompts)}; they must be one text or a list of texts")
    return list(dict.fromkeys(row_prompts))


def read_manifest_rows(uri: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a manifest as they are written, without checks of their values.

    Raises:
        ManifestError: the manifest cannot be read, or has no column image_uri.
    """
    fs, path = storage.open_uri(uri)
    try:
        with fs.open(path, "rb") as file:
            if uri.lower().endswith(".parquet"):
                table = pq.ParquetFile(file)
                _check_columns(table.schema_arrow.names, uri)
                for batch in table.iter_batches(batch_size=4096):
                    yield from batch.to_pylist()
            elif uri.lower().endswith(".csv"):
                # All cells are text: an image_id 007 stays 007. Only an empty cell means that there is no value.
                reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
                _check_columns(reader.fieldnames or [], uri)
                yield from ({name: cell or None for name, cell in row.items()} for row in reader)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _json_record(line, f"{uri}, line {number}")
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError, OverflowError) as error:
        raise ManifestError(f"{uri} cannot be read as a manifest: {error}") from error


def _check_columns(names: Sequence[str], uri: str) -> None:
    if "image_uri" not in names:
        raise ManifestError(f"{uri} has the columns {', '.join(names)}; a manifest needs image_uri")


def _json_record(line: bytes, where: str) -> dict[str, Any]:
    """Return the object in a line of JSON; `where` names the line in messages."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ManifestError(f"{where} is {_shorten(record)}; a manifest's line is an object with image_uri")
    return record


def _text(value: Any, strip: str = "") -> str | None:
    return None if value is None else str(value).strip(strip) if strip else str(value)


def _size(value: Any) -> int | None:
    """Return a size_bytes value, a whole number or its text, as int. Return None for any other value."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _timestamp(value: Any) -> datetime.datetime | None:
    """Return a datetime for seconds since 1970, an ISO 8601 text or a datetime. Return None for any other value."""
    try:
        if isinstance(value, (int, float)):
            return datetime.datetime.fromtimestamp(value, datetime.UTC)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
    except (ValueError, OverflowError, OSError):
        return None
    return value if isinstance(value, datetime.datetime) else None
