"""Local disks and object stores behind the same few functions; fsspec and s3fs do the work.

A location is a local path or a URI that fsspec knows (`s3://bucket/key`). Names are taken literally: brackets, percent
signs and `::` in them mean nothing here. Endpoint and credentials come from the standard environment of the store.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from vlsm.errors import ConfigError, ImageError, StorageError

T = TypeVar("T")

# Many small objects per process: fresh listings, room for as many connections as threads, patience bounded by timeouts.
_S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "max_pool_connections": 64,
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 1},  # s3fs and with_retries try again
    },
}
_RETRY_DELAYS_S = (0.5, 2.0, 8.0)


def split_scheme(uri: str) -> tuple[str, str]:
    """The scheme of a location ("file" for a local path) and what follows it."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def absolute(uri: str) -> str:
    """The location as every process on this machine understands it: local paths absolute, no trailing slash."""
    scheme, rest = split_scheme(uri)
    if scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest))
    return uri.rstrip("/")


def join(uri: str, *names: str) -> str:
    """The location of something below a folder or prefix."""
    return "/".join([uri.rstrip("/"), *names])


def open_uri(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location and the path within it.

    Raises:
        ConfigError: no file system is known for the scheme, or its package is not installed.
    """
    scheme, _ = split_scheme(uri)
    if scheme in ("file", "local"):
        return fsspec.filesystem("file"), absolute(uri)
    try:
        fs = fsspec.filesystem(scheme, **(_S3_OPTIONS if scheme in ("s3", "s3a") else {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {uri!r}: {error}; use a local path or s3://bucket/prefix") from error
    return fs, fs._strip_protocol(uri)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether paths of the file system are paths of this machine."""
    return bool(fs.protocol == "file" or "file" in fs.protocol)


def exists(uri: str) -> bool:
    """Whether there is a file or a non-empty folder at the location."""
    fs, path = open_uri(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    fs, path = open_uri(uri)
    return bytes(with_retries(lambda: fs.cat_file(path), uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Put a file in one atomic step: readers see the old content or all of the new, whatever dies on the way.

    Locally that is a temporary file renamed into place; on an object store one put (or one completed multipart upload).
    """
    fs, path = open_uri(uri)
    if not is_local(fs):
        with_retries(lambda: fs.pipe_file(path, data), uri)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def list_names(uri: str) -> list[str]:
    """The names of the files directly in a folder, sorted; empty where there is no such folder."""
    fs, path = open_uri(uri)
    try:
        return sorted(info["name"].rsplit("/", 1)[-1] for info in fs.ls(path, detail=True) if info["type"] == "file")
    except FileNotFoundError:
        return []


def remove(uri: str) -> None:
    """Remove one file if it is there."""
    fs, path = open_uri(uri)
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return


def read_image_bytes(uri: str, size_bytes: int | None, max_bytes: int) -> bytes:
    """The content of one image of an archive.

    Args:
        uri: where the image is.
        size_bytes: its size as listed, or None to ask the store first.
        max_bytes: larger files are refused before they are read.

    Raises:
        ImageError: the file is missing, forbidden, empty, too large or cannot be read; it will not be better next time.
        StorageError: the store itself went on failing through the retries.
    """
    fs, path = open_uri(uri)
    try:
        if size_bytes is None:
            size_bytes = int(with_retries(lambda: fs.info(path), uri)["size"])
        if size_bytes > max_bytes:
            raise ImageError("too_large", f"{uri} has {size_bytes:,} bytes; max_image_bytes is {max_bytes:,}")
        data = bytes(with_retries(lambda: fs.cat_file(path), uri)) if size_bytes else b""
    except FileNotFoundError as error:
        raise ImageError("missing", f"there is no file {uri}") from error
    except PermissionError as error:
        raise ImageError("forbidden", f"no permission to read {uri}") from error
    except OSError as error:  # a store's outage is a StorageError by now: this is one bad file of a local disk
        raise ImageError("unreadable", f"{uri}: {error.strerror or error}") from error
    if not data:
        raise ImageError("empty", f"{uri} has 0 bytes")
    return data


def with_retries(call: Callable[[], T], uri: str) -> T:
    """What the call returns, tried again where a remote store may have failed for a moment.

    Raises:
        FileNotFoundError, PermissionError: as the call raises them, without a second try.
        OSError: any other failure of the local disk, without a second try.
        StorageError: a remote store still failed at the last try.
    """
    remote = split_scheme(uri)[0] not in ("file", "local")
    for delay_s in (*_RETRY_DELAYS_S, None):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except _transient_errors() as error:
            if not remote:
                raise
            if delay_s is None:
                raise StorageError(
                    f"{uri} could not be reached in {len(_RETRY_DELAYS_S) + 1} tries: {error}"
                ) from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def name_errors(what: str, uri: str) -> Iterator[None]:
    """Storage that refuses is one sentence that names what was asked of it."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # without s3fs there are only this machine's own errors
        BotoCoreError = ClientError = OSError
    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise ConfigError(f"{what} {uri!r} cannot be used: {error}") from error


def _transient_errors() -> tuple[type[BaseException], ...]:
    errors: list[Any] = [OSError, TimeoutError]
    try:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError
    except ImportError:  # a machine without s3fs reads its own disk
        return tuple(errors)
    return (*errors, ClientError, BotoCoreError)
