"""Lists all files below a folder or prefix as a stream in a stable order."""

import os
import stat
from collections.abc import Iterator
from typing import Any

from vlsm import storage
from vlsm.errors import StorageError

Info = dict[str, Any]  # fsspec's description of a file: name, size, type, and more keys that depend on the store


def list_files(uri: str, after: str | None = None) -> Iterator[Info]:
    """Yield the files below a folder or prefix. Only one page of a store, or one local folder, is in memory at a time.

    A link to a file counts as a file. Other links have the type "link" and are not followed.

    Args:
        uri: the folder or prefix.
        after: the last name of an interrupted listing; only files after it are listed.

    Yields:
        On S3 in the order of the keys, elsewhere folder by folder, sorted by name.

    Raises:
        StorageError: the store fails and all retries fail too, or there is no permission to list a folder.
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
    token: str | None = ""
    while token is not None:
        try:
            page = storage.with_retries(lambda: fs.call_s3("list_objects_v2", **request), uri, storage.PATIENT_S)
            files = [
                item | {"name": f"{bucket}/{item['Key']}", "size": item["Size"], "type": "file"}
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # S3 consoles create such objects to show an empty folder
            ]
            token = page["NextContinuationToken"] if page.get("IsTruncated") else None
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # of botocore
            what = f"{type(error).__name__}: {error}"
            raise StorageError(f"the store of {uri} sends a damaged listing ({what}); check its endpoint") from error
        if token == request.get("ContinuationToken", ""):
            raise StorageError(f"the store of {uri} lists the same files again and again; check its endpoint")
        yield from files
        request["ContinuationToken"] = token or ""


def _walk(fs: Any, root: str, uri: str, last: tuple[str, ...]) -> Iterator[Info]:
    waiting = [iter(_list_folder(fs, root, uri))]  # no recursion: folders may be nested thousands of times
    while waiting:
        if (info := next(waiting[-1], None)) is None:
            waiting.pop()
            continue
        name = info["name"].rstrip("/")
        parts = tuple(name.split("/"))
        if info["type"] == "directory":
            if parts >= last[: len(parts)]:
                waiting.append(iter(_list_folder(fs, name, uri)))
        elif parts > last:
            yield follow_link(info)


def _list_folder(fs: Any, folder: str, uri: str) -> list[Info]:
    try:
        infos = storage.with_retries(lambda: fs.ls(folder, detail=True), uri, storage.PATIENT_S)
    except PermissionError as error:  # without this error the run would silently skip its images
        raise StorageError(f"no permission to list the folder {folder}; allow it, or give another INPUT") from error
    return sorted(infos, key=lambda info: info["name"].rstrip("/"))


def follow_link(info: Info) -> Info:
    """Return the info of the file that a link on the local disk points to; return any other info unchanged."""
    if not info.get("islink"):
        return info
    try:
        target = os.stat(info["name"])
    except OSError:  # such as a broken link: reading it fails later
        return info | {"type": "file", "size": None}
    if not stat.S_ISREG(target.st_mode):
        return info | {"type": "link"}
    return info | {"type": "file", "size": target.st_size, "mtime": target.st_mtime}
