"""An archive that a user gives as a list: a Parquet, CSV or JSON Lines file with a row per image."""

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
_MAX_TEXT_BYTES = 8192  # of an image_id, a location, a prompt


def read_image_list(uri: str, prompts: tuple[str, ...], allow: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The images that a list names, as rows with the columns of MANIFEST_SCHEMA; arguments as for `open_archive`.

    Raises:
        ManifestError: it cannot be read, lacks what it needs, or leads to where it may not.
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
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ManifestError(f"{where}: {_shorten(text)} is no Unicode text") from error
    if num_bytes > _MAX_TEXT_BYTES:
        raise ManifestError(
            f"{where}: a text of {num_bytes:,} bytes; {_MAX_TEXT_BYTES:,} are the most: {_shorten(text)}"
        )


def _check_place(location: str, uri: str, allow: tuple[str, ...], where: str) -> None:
    scheme, rest = storage.split_scheme(uri)
    if scheme in ("file", "local"):  # a list on this machine may name what its user may read
        if not _is_known(storage.split_scheme(location)[0]):
            raise ManifestError(f"{where}: image_uri {_shorten(location)} is no location that is known here")
        return
    if ".." in location.split("/"):
        raise ManifestError(f"{where}: image_uri {_shorten(location)} leads upwards")
    own = f"{scheme}://{rest.partition('/')[0]}/"
    if not any(location.startswith(place.rstrip("/") + "/") for place in (own, *allow)):
        raise ManifestError(
            f"{where}: image_uri {_shorten(location)} lies outside of {own}; "
            f"--set 'run.allow=[{location[:60]}]' if it may be read"
        )


@functools.cache
def _is_known(scheme: str) -> bool:
    """Whether there is a file system for it, and the package that it needs."""
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError):
        return False
    return True


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}... ({len(text):,} characters)"


def describe_file(size_bytes: int | None, etag: str | None, mtime: Any) -> dict[str, Any]:
    """What is known of an image's file, and the version that follows: its etag, or its size and mtime."""
    modified = _timestamp(mtime)
    known = [str(size_bytes)] if size_bytes is not None else []
    known += [_shorten(mtime) if modified is None else modified.isoformat()] if mtime is not None else []
    return {
        "size_bytes": size_bytes,
        "etag": etag,
        "mtime": modified,
        "image_version": etag or " ".join(known) or None,
    }


def _row_prompts(row: dict[str, Any], prompts: tuple[str, ...], where: str) -> list[str]:
    own = row.get("prompts")
    if own is None:
        own = row.get("prompt")
    if own is None:
        return list(prompts)
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, list) or not own or not all(isinstance(prompt, str) for prompt in own):
        raise ManifestError(f"{where}: prompts are {_shorten(own)}; they must be one text or a list of texts")
    return list(dict.fromkeys(own))


def read_manifest_rows(uri: str) -> Iterator[dict[str, Any]]:
    """The rows of a manifest as they are written.

    Raises:
        ManifestError: it cannot be read, or has no image_uri.
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
                # everything is text: an image_id of 007 stays 007, and only an empty cell is no value
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
    """A manifest's size_bytes: a whole number, written in a CSV or not; anything else is not known."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _timestamp(value: Any) -> datetime.datetime | None:
    """A time as stores and manifests tell it: seconds since 1970, ISO 8601, or a datetime; None for anything else."""
    try:
        if isinstance(value, (int, float)):
            return datetime.datetime.fromtimestamp(value, datetime.UTC)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
    except (ValueError, OverflowError, OSError):
        return None
    return value if isinstance(value, datetime.datetime) else None
