"""Everything below a folder or prefix, file by file in a stable order, while it is being listed."""

import os
import stat
from collections.abc import Iterator
from typing import Any

from vlsm import storage
from vlsm.errors import StorageError

Info = dict[str, Any]  # what fsspec says of a file: name, size, type, and what else its store knows


def list_files(uri: str, after: str | None = None) -> Iterator[Info]:
    """The files below a folder or prefix; no more of them is in memory than a page of a store, or one local folder.

    Links to files are files; other links are given with the type "link" and not followed.

    Args:
        uri: the folder or prefix.
        after: the name that a listing which was broken off had come to: only what follows it.

    Yields:
        Of S3 in the order of its keys; else folder by folder, sorted by name.

    Raises:
        StorageError: the store went on failing through the retries, or a folder may not be listed.
    """
    fs, path = storage.open_uri(uri)
    if "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield from _list_s3(fs, path, uri, after)
        return
    last = tuple(after.split("/")) if after else ()
    yield from _walk(fs, path, uri, last)


def _list_s3(fs: Any, path: str, uri: str, after: str | None) -> Iterator[Info]:
    bucket, key, _ = fs.split_path(path)
    request = {"Bucket": bucket, "Prefix": key.rstrip("/") + "/" if key else ""}
    if after:
        request["StartAfter"] = fs.split_path(after)[1]
    while True:
        page = storage.with_retries(lambda: fs.call_s3("list_objects_v2", **request), uri, storage.PATIENT_S)
        for found in page.get("Contents", ()):
            if not found["Key"].endswith("/"):  # what consoles make to show an empty folder
                yield found | {"name": f"{bucket}/{found['Key']}", "size": found["Size"], "type": "file"}
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _walk(fs: Any, folder: str, uri: str, last: tuple[str, ...]) -> Iterator[Info]:
    try:
        infos = storage.with_retries(lambda: fs.ls(folder, detail=True), uri, storage.PATIENT_S)
    except PermissionError as error:  # what it holds would be lost without a word
        raise StorageError(f"the folder {folder} may not be listed") from error
    for info in sorted(infos, key=lambda info: info["name"].rstrip("/")):
        name = info["name"].rstrip("/")
        parts = tuple(name.split("/"))
        if info["type"] == "directory":
            if parts >= last[: len(parts)]:
                yield from _walk(fs, name, uri, last)
        elif parts > last:
            yield follow_link(info)


def follow_link(info: Info) -> Info:
    """What a link of the local disk leads to, where that is a file; anything else as it is."""
    if not info.get("islink"):
        return info
    try:
        found = os.stat(info["name"])
    except OSError:  # nowhere: reading it will say so
        return info | {"type": "file", "size": None}
    if not stat.S_ISREG(found.st_mode):
        return info | {"type": "link"}
    return info | {"type": "file", "size": found.st_size, "mtime": found.st_mtime}
