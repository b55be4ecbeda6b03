"""Turns the rows of a manifest, the user's own list of images, into rows of the plan, and checks them."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlsm import storage
from vlsm.archive.carried import Carried
from vlsm.archive.columns import Row, shorten
from vlsm.archive.places import check_place
from vlsm.archive.tables import read_manifest_rows
from vlsm.errors import ManifestError
from vlsm.shown import public_uri

_MAX_TEXT_BYTES = 8192  # limit for an image_id, a location, an etag and a prompt


def read_image_list(  # noqa: PLR0913 - every property of a list
    uri: str,
    files: Sequence[str],
    prompts: tuple[str, ...],
    allow: tuple[str, ...],
    columns: Mapping[str, str],
    carried: Carried | None = None,
) -> Iterator[Row]:
    """Yield the images of a manifest as rows with columns of PLAN_SCHEMA.

    A row with a selector stands for one image of a file, and its image_id for this image.

    Args:
        uri: INPUT: the manifest, or the folder of its files. A relative image_uri starts from the manifest's folder, or
            from the folder of its files.
        files: the files of the manifest.
        prompts: as for `open_archive`.
        allow: as for `open_archive`.
        columns: the setting `columns`.
        carried: further columns; each row has their values in `carried`, by their names in the results.

    Raises:
        ManifestError: the manifest cannot be read, lacks a column or a value, or has an image_uri that is not allowed.
    """
    is_folder = list(files) != [uri]
    folder = storage.absolute(uri if is_folder else storage.parent(uri))
    rows = read_manifest_rows(files, columns, folder if is_folder else None, allow=allow, carried=carried)
    for where, row in rows:
        image_uri = row.get("image_uri")
        if not isinstance(image_uri, str) or not image_uri:
            raise ManifestError(f"{where}: image_uri is {shorten(image_uri)}; it must name an image")
        is_relative = "://" not in image_uri and not image_uri.startswith("/")
        location = storage.join(folder, image_uri) if is_relative else image_uri
        selector = read_text(row.get("selector")) or None
        name = public_uri(image_uri)  # an image_id is in all results: it has no signature
        stated = read_text(row.get("image_id"))
        image_id = public_uri(stated) if stated else f"{name}#{selector}" if selector else name
        texts = read_prompts(row, prompts, where)
        etag = read_text(row.get("etag"))
        for text in (image_id, location, selector or "", etag or "", *texts):
            check_text(text, where)
        check_place(location, uri, allow, where)
        image = {"image_id": image_id, "image_uri": location, "selector": selector, "prompts": texts}
        further = {} if carried is None else {"carried": carried.collect(row, where)}
        yield image | further | describe_file(_size(row.get("size_bytes")), etag, row.get("mtime"))


def check_text(text: str, where: str) -> None:
    """Raise a ManifestError if a text is not valid Unicode, too long or has a NUL; `where` names its row."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ManifestError(f"{where}: {shorten(text)} is no Unicode text; write the manifest as UTF-8") from error
    if "\0" in text:
        raise ManifestError(f"{where}: {shorten(text)} has a NUL; write the manifest as UTF-8")
    if num_bytes > _MAX_TEXT_BYTES:
        raise ManifestError(
            f"{where}: a text of {num_bytes:,} bytes; {_MAX_TEXT_BYTES:,} are the most: {shorten(text)}"
        )


def describe_file(size_bytes: int | None, etag: str | None, mtime: Any) -> dict[str, Any]:
    """Return the columns that describe a file; its image_version is the etag, or else its size and mtime."""
    modified = _timestamp(mtime)
    version = [str(size_bytes)] if size_bytes is not None else []
    version += [shorten(mtime) if modified is None else modified.isoformat()] if mtime is not None else []
    return {
        "size_bytes": size_bytes,
        "etag": etag,
        "mtime": modified,
        "image_version": etag or " ".join(version) or None,
    }


def read_prompts(row: dict[str, Any], prompts: tuple[str, ...], where: str) -> list[str]:
    """Return the prompts of a row without repetitions, or the run's prompts if the row has none."""
    given = [row[name] for name in ("prompts", "prompt") if row.get(name) is not None]
    if not given:
        return list(prompts)
    row_prompts, *others = [[texts] if isinstance(texts, str) else texts for texts in given]
    if others and others != [row_prompts]:
        raise ManifestError(f"{where} has the prompt {shorten(given[1])} and prompts {shorten(given[0])}; give one")
    # "" is a prompt of its own in a column of lists, but nobody means a blank
    is_list = isinstance(row_prompts, list) and row_prompts not in ([], [""])
    if not is_list or not all(isinstance(text, str) and (text.strip() or not text) for text in row_prompts):
        raise ManifestError(f"{where}: prompts are {shorten(given[0])}; they must be one text or a list of texts")
    return list(dict.fromkeys(row_prompts))


def read_text(value: Any) -> str | None:
    """Return a value as text, such as the image_id 7."""
    return None if value is None else str(value)


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
