"""Finds the files of an annotation tool, and reads the reviews in each, within limits."""

import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from vlsm import storage
from vlsm.datasets.folders import list_dataset
from vlsm.documents import parse_json, read_json
from vlsm.errors import BeyondLimitError, ConfigError, ImageError, ManifestError
from vlsm.images.containers import check_zip_member, open_zip
from vlsm.labels.coco import read_coco_reviews
from vlsm.labels.geojson import ENDING, read_geojson
from vlsm.labels.label_studio import read_tasks
from vlsm.labels.masks import read_mask_files
from vlsm.labels.reviews import Review
from vlsm.limits import MAX_JSON_BYTES
from vlsm.stores import check_input

_IN_ZIP = re.compile(r"(?:^|/)(?:annotations/)?instances_[^/]*\.json$")
_FILES_AT_ONCE = 10_000  # of folders with a file per image
_ADVICE = "; export the project in parts"

Read = Callable[[Any, str], Iterator[Review]]

MARKS = "marks"  # of a report, see `vlsm.labels.marks`
FORMATS = ("label-studio", "cvat", "coco", "masks", "geojson", MARKS)
_READERS: dict[str, Read] = {"label-studio": read_tasks, "cvat": read_coco_reviews, "coco": read_coco_reviews}


def read_reviews(uri: str, format_name: str) -> Iterator[list[Review]]:
    """Yield the reviews of each file, or of 10,000 files with one review each. So memory holds one such group.

    Args:
        uri: a file or a folder, local or in a store. A zip may hold COCO files.
        format_name: one of FORMATS, but not MARKS.

    Raises:
        ConfigError: there is no such file.
        ManifestError: a file is not in the format, or is beyond a limit.
    """
    uri = storage.absolute(uri)
    check_input("IN", uri)
    if not storage.exists(uri):
        raise ConfigError(f"{uri!r} does not exist")
    fs, path = storage.open_uri(uri)
    if fs.isfile(path):
        if format_name == "masks":
            raise ConfigError(f"{uri!r} is a file; --format masks needs the folder of the masks")
        yield from _read_file(uri, uri.rpartition("/")[2], format_name)
        return
    yield from _read_folder(uri, format_name)


def _read_folder(uri: str, format_name: str) -> Iterator[list[Review]]:
    """Yield the reviews of the files in a folder, as `read_reviews` does."""
    names = list_dataset(uri)
    ending = ENDING if format_name == "geojson" else re.compile(r"\.json$")
    chosen = names if format_name == "masks" else [name for name in names if ending.search(name)]
    if format_name == "masks":
        reviews = read_mask_files(uri, names)
    elif format_name == "geojson":
        files = (_read_file(f"{uri.rstrip('/')}/{name}", name, format_name) for name in chosen)
        reviews = (review for groups in files for group in groups for review in group)
    else:
        for name in chosen:
            yield from _read_file(f"{uri.rstrip('/')}/{name}", name, format_name)
        reviews = iter(())
    num_reviews = 0
    while group := list(itertools.islice(reviews, _FILES_AT_ONCE)):
        num_reviews += len(group)
        yield group
    if not chosen or (format_name == "masks" and not num_reviews):
        raise ConfigError(f"{uri!r} has no files of the format {format_name}")


def _read_file(uri: str, name: str, format_name: str) -> Iterator[list[Review]]:
    """Yield the reviews of a JSON file, or of each COCO file in a zip."""
    if format_name == "geojson":
        yield list(read_geojson(read_json(uri, uri, ManifestError, too_long=_ADVICE), uri, name))
    elif name.lower().endswith(".zip") and format_name in ("cvat", "coco"):
        for member, content in _read_zip(uri):
            yield list(_READERS[format_name](content, f"{uri}#{member}"))
    else:
        yield list(_READERS[format_name](read_json(uri, uri, ManifestError, too_long=_ADVICE), uri))


def _read_zip(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each COCO file in a zip. Nothing is unpacked to a disk.

    Raises:
        ManifestError: the zip is damaged, has no COCO file, or one that is beyond a limit.
    """
    fs, path = storage.open_uri(uri)
    try:
        with fs.open(path, "rb") as file, open_zip(file) as archive:
            infos = [info for info in archive.infolist() if _IN_ZIP.search(info.filename)]
            for info in infos:
                name = f"{uri}#{info.filename}"
                check_zip_member(name, info, archive)
                with archive.open(info) as member:
                    data = member.read(MAX_JSON_BYTES + 1)
                if len(data) > MAX_JSON_BYTES:
                    raise ManifestError(f"{name} is longer than {MAX_JSON_BYTES:,} bytes{_ADVICE}")
                yield info.filename, parse_json(data, name, ManifestError)
    except BeyondLimitError as error:
        raise ManifestError(error.of(uri)) from error
    except ImageError as error:
        raise ManifestError(str(error)) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError) as error:
        raise ManifestError(f"{uri} cannot be read as a zip: {error}") from error
    if not infos:
        raise ManifestError(f"{uri} has no annotations/instances_*.json; export the task from CVAT as COCO 1.0")
