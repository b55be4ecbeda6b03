"""Opens INPUT as a stream of rows: one row per image in a folder, a prefix, a glob, a file or a manifest."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vlsm import storage
from vlsm.archive.carried import Carried, Carry, find_carried
from vlsm.archive.expand import expand_rows
from vlsm.archive.listing import Info, follow_link, list_files
from vlsm.archive.manifest import describe_file, read_image_list
from vlsm.archive.tables import find_lists, holds_images, read_partition
from vlsm.errors import ConfigError
from vlsm.images.formats import Look, describe_other, header_of, kind_of
from vlsm.shown import public_uri
from vlsm.stores import check_input

_WILD = "*?["  # characters of a glob
_MOST_LOOKS = 20  # files of a folder that are opened to see what it is
_ETAG_KEYS = ("ETag", "etag")  # stores use different names
_MTIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass
class Archive:
    """The images of an archive.

    Attributes:
        rows: a stream of dicts with the columns of PLAN_SCHEMA but `vanished`.
        is_listed: whether INPUT is a folder, prefix or glob whose rows may be listed while the run works. The rows of
            a manifest, and of Parquet files with images and further columns, are all checked before the work.
        skipped: number of skipped files, by extension or description; complete once `rows` is exhausted.
        carried: the further columns of a manifest, or of Parquet files with images, that each row has in `carried`;
            None if there are none.
    """

    rows: Iterable[dict[str, Any]]
    is_listed: bool = True
    skipped: Counter[str] = field(default_factory=Counter)
    carried: Carried | None = None


def open_archive(  # noqa: PLR0913 - every property of an INPUT
    uri: str,
    prompts: tuple[str, ...],
    exclude: str | None = None,
    allow: tuple[str, ...] = (),
    after: tuple[str, str | None] | None = None,
    look: Look | None = None,
    carry: Carry | None = None,
) -> Archive:
    """Return the images of an archive, one row per image in a stable order. Container files give a row per image.

    Args:
        uri: a folder or prefix (recursive), a glob, one file, or a manifest: a .parquet, .csv, .tsv or .jsonl with
            `image_uri` and optionally `image_id`, `prompt` or `prompts`, or a folder with such files of one kind and no
            image. A relative image_uri starts from the manifest's folder.
        prompts: the prompts of every image for which a manifest has none.
        exclude: a folder whose files are not listed, such as an output folder inside the archive.
        allow: the setting `run.allow`; see `vlsm.archive.places`.
        after: the last image_uri and selector of an interrupted listing; only images after them are returned.
        look: options for listing the images in a file.
        carry: which further columns travel with the images of a manifest, or of Parquet files and nothing else; None
            for none.

    Raises:
        ConfigError: there is nothing at the location, or `carry` names columns and it is neither.
        ManifestError: the manifest cannot be read, lacks a column or a value, or has an image_uri that is not allowed.
    """
    check_input("INPUT", uri)
    fs, path = storage.open_uri(uri, allow)
    if (header := header_of(uri)) is not None and not fs.isdir(path):  # a pair is listed by its header
        uri, (fs, path) = header, storage.open_uri(header, allow)
    look = replace(look or Look(), allow=allow)
    after = after if after is None else (_respell(after[0], uri), after[1])
    excluded = None if exclude is None else storage.open_uri(exclude)[1].rstrip("/") + "/"
    lists, is_inside = _find_lists(fs, path, uri, excluded, look) if after is None else ([], False)
    carried = _find_carried(uri, lists, carry, look, is_inside) if lists and carry and carry.columns else None
    archive = Archive(rows=(), is_listed=not lists or (is_inside and carried is None), carried=carried)
    if lists and not is_inside:
        rows = read_image_list(uri, lists, prompts, allow, look.columns, archive.carried)
        archive.rows = expand_rows(rows, look, archive.skipped, is_list=True)
        return archive
    if not lists and after is None and carry is not None and carry.columns not in ("all", ()):
        raise ConfigError(
            f"carry is [{', '.join(carry.columns)}]: columns of a list, or of Parquet files with images and no image "
            f"beside them; INPUT {uri!r} is neither: set carry=[]"
        )
    last = None if after is None else storage.open_uri(after[0])[1]
    root, infos = _find_files(fs, path, uri, last)
    if after is not None and after[1] is not None and fs.isfile(last):  # more images of this file may follow
        infos = itertools.chain([fs.info(last)], infos)
    files = _file_rows(fs, root, infos, prompts, (excluded, archive.skipped))
    if carried is not None:  # a file that cannot be read has no values
        files = (file | {"carried": carried.collect({}, uri)} for file in files)
    rows = expand_rows(files, look, archive.skipped, carried=carried)
    archive.rows = rows if after is None else _rows_after(rows, after, archive.skipped)
    return archive


def _find_lists(fs: Any, path: str, uri: str, excluded: str | None, look: Look) -> tuple[list[str], bool]:
    """Return the files of a list, and whether they are Parquet files with images in them.

    The first file that can be read tells that. Beside Parquet files with images, lists of other kinds do not count.
    """
    lists, others = find_lists(uri, fs.isfile(path), excluded)
    if is_glob := not lists and _is_glob(path):
        found = sorted(fs.glob(path))
        lists = [name if storage.is_local(fs) else fs.unstrip_protocol(name) for name in found]
        if not all(kind_of(name) == "parquet" for name in lists):
            return [], False
    looks = (holds_images(name, look.columns, look.allow) for name in lists[:_MOST_LOOKS])
    is_inside = next((found for found in looks if found is not None), False)
    is_list = bool(lists) and not others and not is_glob
    return (lists, is_inside) if is_inside or is_list else ([], False)


def _is_glob(path: str) -> bool:
    return any(character in path for character in _WILD)


def _find_carried(uri: str, lists: list[str], carry: Carry, look: Look, is_inside: bool) -> Carried | None:
    folder = storage.absolute(uri)
    if lists != [uri] and not all(file.startswith(folder) for file in lists):  # a glob
        folder = folder[: min(folder.index(character) for character in _WILD if character in folder)].rpartition("/")[0]
    partition = {} if lists == [uri] else {name: None for file in lists for name in read_partition(file, folder)}
    carried = find_carried(uri, lists, look.columns, partition, carry, look.allow, is_inside)
    return carried and replace(carried, folder=folder)


def _respell(place: str, uri: str) -> str:
    """Return a location below INPUT as this command spells it: a password or signature may have changed since."""
    shown, root = public_uri(place), public_uri(uri)
    return uri + shown[len(root) :] if shown != place and shown.startswith(root) else place


def _find_files(fs: Any, path: str, uri: str, after: str | None) -> tuple[str, Iterable[Info]]:
    """Return the folder that image_ids are relative to, and fsspec's info of each file in it.

    Raises:
        ConfigError: there is nothing at the location.
    """
    if fs.isfile(path):
        return path.rsplit("/", 1)[0], [] if after else [fs.info(path)]
    infos = iter(()) if storage.is_local(fs) and not fs.isdir(path) else list_files(uri)
    if (first := next(infos, None)) is not None:
        return path, itertools.chain([first], infos) if after is None else list_files(uri, after)
    if _is_glob(path):
        plain = path[: min(path.index(character) for character in _WILD if character in path)]
        matches = sorted(fs.glob(path, detail=True).values(), key=lambda info: info["name"])
        return plain.rsplit("/", 1)[0], [follow_link(info) for info in matches if not after or info["name"] > after]
    if storage.is_local(fs) and fs.isdir(path):
        return path, []
    raise ConfigError(f"INPUT {uri!r} does not exist; it must be a folder, a prefix, a glob, an image or a manifest")


def _file_rows(
    fs: Any, root: str, infos: Iterable[Info], prompts: tuple[str, ...], passing: tuple[str | None, Counter[str]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every file that may hold images; `passing` has the folder to exclude and the skipped counter."""
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
            "image_id": public_uri(readable).removeprefix(public_uri(storage.spell_out(prefix))),
            "image_uri": readable if storage.is_local(fs) else fs.unstrip_protocol(readable),
            "prompts": list(prompts),
        } | describe_file(info.get("size"), etag, next((info[key] for key in _MTIME_KEYS if info.get(key)), None))


def _rows_after(
    rows: Iterable[dict[str, Any]], after: tuple[str, str | None], skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows after the image_uri and selector at which a listing was interrupted."""
    is_after = after[1] is None
    for row in rows:
        if is_after or row["image_uri"] != after[0]:
            if not is_after:  # the file changed: its new images cannot be found here, but an update finds them
                skipped["archive that changed while it was listed: --set update=true"] += 1
            is_after = True
            yield row
        is_after = is_after or row["selector"] == after[1]
