"""An archive as rows: every image under a folder or prefix, of a glob, or of a manifest."""

import csv
import datetime
import functools
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ConfigError, ManifestError
from vlsm.images import EXTENSIONS
from vlsm.listing import Info, follow_link, list_files

MANIFEST_EXTENSIONS = (".parquet", ".csv", ".jsonl")
_MAX_TEXT_BYTES = 8192  # of an image_id, a location, a prompt
_ETAG_KEYS = ("ETag", "etag")  # as the file systems of several stores call it
_MTIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass
class Archive:
    """A stream of manifest rows (dicts with the columns of MANIFEST_SCHEMA) and what was passed over on the way.

    `skipped` counts the files that are no images by their extension; it is complete once `rows` is exhausted.
    `is_listed` tells a folder, prefix or glob from a manifest.
    """

    rows: Iterable[dict[str, Any]]
    is_listed: bool = True
    skipped: Counter[str] = field(default_factory=Counter)


def open_archive(
    uri: str,
    prompts: tuple[str, ...],
    exclude: str | None = None,
    allow: tuple[str, ...] = (),
    after: str | None = None,
) -> Archive:
    """The images of an archive, one row each, in a stable order.

    Args:
        uri: a folder or prefix (recursive), a glob, one image, or a manifest (.parquet, .csv, .jsonl with `image_uri`
            and optionally `image_id`, `prompt` or `prompts`; relative image_uris start from the manifest's folder).
        prompts: those of every image for which a manifest gives none.
        exclude: a folder whose files are no input, such as an output folder inside the archive.
        allow: what the image_uris of a manifest in an object store may begin with besides the store's own bucket:
            whoever can put a manifest there is not to read this machine's files, or other buckets, through the job.
        after: the image_uri that a listing which was broken off had come to: only what follows it.

    Raises:
        ConfigError: there is nothing at the location.
        ManifestError: the manifest cannot be read, lacks what it needs, or leads to where it may not.
    """
    fs, path = storage.open_uri(uri)
    archive = Archive(rows=(), is_listed=not uri.lower().endswith(MANIFEST_EXTENSIONS) or not fs.isfile(path))
    if not archive.is_listed:
        archive.rows = _read_manifest(uri, prompts, allow)
        return archive
    excluded = None if exclude is None else storage.open_uri(exclude)[1].rstrip("/") + "/"
    root, infos = _find_files(fs, path, uri, after and storage.open_uri(after)[1])
    archive.rows = _image_rows(fs, root, infos, prompts, excluded, archive.skipped)
    return archive


def _find_files(fs: Any, path: str, uri: str, after: str | None) -> tuple[str, Iterable[Info]]:
    """The folder that image_ids are relative to, and what the store says of each file in it."""
    if fs.isfile(path):
        return path.rsplit("/", 1)[0], [fs.info(path)]
    infos = iter(()) if storage.is_local(fs) and not fs.isdir(path) else list_files(uri)
    if (first := next(infos, None)) is not None:
        return path, itertools.chain([first], infos) if after is None else list_files(uri, after)
    if any(character in path for character in "*?["):
        plain = path[: min(path.index(character) for character in "*?[" if character in path)]
        found = sorted(fs.glob(path, detail=True).values(), key=lambda info: info["name"])
        return plain.rsplit("/", 1)[0], [follow_link(info) for info in found if not after or info["name"] > after]
    if storage.is_local(fs) and fs.isdir(path):
        return path, []
    raise ConfigError(f"INPUT {uri!r} does not exist; it must be a folder, a prefix, a glob, an image or a manifest")


def _image_rows(  # noqa: PLR0913 - one place that knows how a listed file becomes a row
    fs: Any,
    root: str,
    infos: Iterable[Info],
    prompts: tuple[str, ...],
    excluded: str | None,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    prefix = root.rstrip("/") + "/"
    for info in infos:
        path = info["name"]
        name = path.rsplit("/", 1)[-1]
        if excluded and path.startswith(excluded):
            continue
        # "._x.jpg" is what macOS leaves beside x.jpg on foreign disks: never an image
        if info["type"] != "file" or not name.lower().endswith(EXTENSIONS) or name.startswith("._"):
            skipped[_describe_other(info, name)] += 1
            continue
        readable = _utf8(path)
        yield {
            "image_id": readable.removeprefix(_utf8(prefix)),
            "image_uri": readable if storage.is_local(fs) else fs.unstrip_protocol(readable),
            "prompts": list(prompts),
        } | _describe_file(info.get("size"), _text(_known(info, _ETAG_KEYS), strip='"'), _known(info, _MTIME_KEYS))


def _known(info: Info, keys: tuple[str, ...]) -> Any:
    return next((info[key] for key in keys if info.get(key) is not None), None)


def _describe_other(info: Info, name: str) -> str:
    if info["type"] != "file":
        return f"of type {info['type']}"
    return "." + name.rsplit(".", 1)[-1].lower() if "." in name else "no extension"


def _read_manifest(uri: str, prompts: tuple[str, ...], allow: tuple[str, ...]) -> Iterator[dict[str, Any]]:
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
        yield {"image_id": image_id, "image_uri": location, "prompts": texts} | _describe_file(
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


def _describe_file(size_bytes: int | None, etag: str | None, mtime: Any) -> dict[str, Any]:
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


def _utf8(path: str) -> str:
    """File names that are not UTF-8, spelled out: no table could hold them; fetching such a file says it is missing."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
