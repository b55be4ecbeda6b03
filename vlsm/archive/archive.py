"""An archive as rows: every image under a folder or prefix, of a glob, or of a list."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vlsm import storage
from vlsm.archive.expand import expand_rows
from vlsm.archive.listing import Info, follow_link, list_files
from vlsm.archive.manifest import MANIFEST_EXTENSIONS, describe_file, read_image_list
from vlsm.errors import ConfigError
from vlsm.images.formats import Look, describe_other, kind_of

_ETAG_KEYS = ("ETag", "etag")  # as the file systems of several stores call it
_MTIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass
class Archive:
    """A stream of manifest rows (dicts with the columns of MANIFEST_SCHEMA) and what was passed over on the way.

    `skipped` counts what is no image, by extension; it is complete once `rows` is exhausted.
    `is_listed` tells a folder, prefix or glob from a list.
    """

    rows: Iterable[dict[str, Any]]
    is_listed: bool = True
    skipped: Counter[str] = field(default_factory=Counter)


def open_archive(  # noqa: PLR0913 - all that can be said of an INPUT
    uri: str,
    prompts: tuple[str, ...],
    exclude: str | None = None,
    allow: tuple[str, ...] = (),
    after: tuple[str, str | None] | None = None,
    look: Look | None = None,
) -> Archive:
    """The images of an archive, one row each, in a stable order; files that hold several are looked into.

    Args:
        uri: a folder or prefix (recursive), a glob, one file, or a list (.parquet, .csv, .jsonl with `image_uri`
            and optionally `image_id`, `prompt` or `prompts`; relative image_uris start from the list's folder).
        prompts: those of every image for which a list gives none.
        exclude: a folder whose files are no input, such as an output folder inside the archive.
        allow: what the image_uris of a list in an object store may begin with besides the store's own bucket:
            whoever can put a list there is not to read this machine's files, or other buckets, through the job.
        after: image_uri and selector that a listing which was broken off had come to: only what follows them.
        look: how files are looked into.

    Raises:
        ConfigError: there is nothing at the location.
        ManifestError: the list cannot be read, lacks what it needs, or leads to where it may not.
    """
    fs, path = storage.open_uri(uri)
    look = look or Look()
    archive = Archive(rows=(), is_listed=not uri.lower().endswith(MANIFEST_EXTENSIONS) or not fs.isfile(path))
    if not archive.is_listed:
        archive.rows = expand_rows(read_image_list(uri, prompts, allow), look, archive.skipped, is_list=True)
        return archive
    excluded = None if exclude is None else storage.open_uri(exclude)[1].rstrip("/") + "/"
    last = None if after is None else storage.open_uri(after[0])[1]
    root, infos = _find_files(fs, path, uri, last)
    if after is not None and after[1] is not None and fs.isfile(last):  # of which more may follow
        infos = itertools.chain([fs.info(last)], infos)
    rows = expand_rows(_file_rows(fs, root, infos, prompts, (excluded, archive.skipped)), look, archive.skipped)
    archive.rows = rows if after is None else _behind(rows, after, archive.skipped)
    return archive


def _find_files(fs: Any, path: str, uri: str, after: str | None) -> tuple[str, Iterable[Info]]:
    """The folder that image_ids are relative to, and what the store says of each file in it."""
    if fs.isfile(path):
        return path.rsplit("/", 1)[0], [] if after else [fs.info(path)]
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


def _file_rows(
    fs: Any, root: str, infos: Iterable[Info], prompts: tuple[str, ...], passing: tuple[str | None, Counter[str]]
) -> Iterator[dict[str, Any]]:
    """Every file that may hold images as a row; `passing` is the folder to leave out, and the count of the others."""
    prefix = root.rstrip("/") + "/"
    excluded, skipped = passing
    for info in infos:
        path = info["name"]
        if excluded and path.startswith(excluded):
            continue
        if info["type"] != "file" or kind_of(path) is None:
            skipped[f"of type {info['type']}" if info["type"] != "file" else describe_other(path)] += 1
            continue
        readable = storage.spell_out(path)
        etag = next((str(info[key]).strip('"') for key in _ETAG_KEYS if info.get(key) is not None), None)
        yield {
            "image_id": readable.removeprefix(storage.spell_out(prefix)),
            "image_uri": readable if storage.is_local(fs) else fs.unstrip_protocol(readable),
            "prompts": list(prompts),
        } | describe_file(info.get("size"), etag, next((info[key] for key in _MTIME_KEYS if info.get(key)), None))


def _behind(
    rows: Iterable[dict[str, Any]], after: tuple[str, str | None], skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The rows without those of the file that a listing had come to, up to the one that it had come to."""
    is_behind = after[1] is None
    for row in rows:
        if is_behind or row["image_uri"] != after[0]:
            if not is_behind:  # its rest cannot be told from what is planned; an update can tell
                skipped["archive that changed while it was listed: --set update=true"] += 1
            is_behind = True
            yield row
        is_behind = is_behind or row["selector"] == after[1]
