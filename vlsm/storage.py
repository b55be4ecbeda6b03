"""Local disks and object stores behind the same few functions; fsspec and s3fs do the work.

A location is a local path or a URI that fsspec knows (`s3://bucket/key`). Names are taken literally: brackets, percent
signs and `::` in them mean nothing here. Endpoint and credentials come from the standard environment of the store.
"""

import contextlib
import datetime
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from vlsm.errors import ConfigError, StorageError

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
QUICK_S = 10.5  # what a person waits for a store to answer, and a single object is worth
PATIENT_S = 300.0  # what an unattended run waits for a store to come back
_LONGEST_DELAY_S = 30.0


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
    return bool(with_retries(lambda: fs.exists(path), uri, QUICK_S))


def read_bytes(uri: str, patience_s: float = QUICK_S) -> bytes:
    """The whole content of a file."""
    fs, path = open_uri(uri)
    return bytes(with_retries(lambda: fs.cat_file(path), uri, patience_s))


def write_bytes(uri: str, data: bytes, patience_s: float = PATIENT_S) -> None:
    """Put a file in one atomic step: readers see the old content or all of the new, whatever dies on the way.

    Locally that is a temporary file renamed into place; on an object store one put (or one completed multipart upload).
    """
    fs, path = open_uri(uri)
    if not is_local(fs):
        with_retries(lambda: fs.pipe_file(path, data), uri, patience_s)
        return
    with _temporary_file(path, data) as temporary:
        os.replace(temporary, path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Put a file, as `write_bytes`, where there is none; whether this call has put it, of all that try at once."""
    fs, path = open_uri(uri)
    if not is_local(fs):

        def put() -> None:
            try:
                fs.pipe_file(path, data, mode="create")
            except OSError:  # stores have many names for "somebody was first"
                if not fs.exists(path):
                    raise

        with_retries(put, uri)
        return read_bytes(uri) == data
    with _temporary_file(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes) -> Iterator[str]:
    """A file with the content, whole on the disk, beside the path; gone afterwards where it was not renamed."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def list_names(uri: str) -> list[str]:
    """The names of the files directly in a folder, sorted; empty where there is no such folder."""
    return sorted(_list_files(uri))


def list_times(uri: str) -> dict[str, float]:
    """When each file directly in a folder was last written, in seconds since 1970, by its name."""
    return {name: _modified_s(info) for name, info in _list_files(uri).items()}


def _list_files(uri: str) -> dict[str, dict[str, Any]]:
    fs, path = open_uri(uri)
    try:
        infos = with_retries(lambda: fs.ls(path, detail=True), uri, QUICK_S)
        return {info["name"].rsplit("/", 1)[-1]: info for info in infos if info["type"] == "file"}
    except FileNotFoundError:
        return {}


def _modified_s(info: dict[str, Any]) -> float:
    """Stores have different names and forms for it."""
    found = next((info[key] for key in ("mtime", "LastModified", "last_modified", "updated") if info.get(key)), 0.0)
    if isinstance(found, str):
        found = datetime.datetime.fromisoformat(found)
    return found.timestamp() if isinstance(found, datetime.datetime) else float(found)


def remove(uri: str) -> None:
    """Remove one file if it is there."""
    fs, path = open_uri(uri)
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return


def with_retries(call: Callable[[], T], uri: str, patience_s: float = PATIENT_S) -> T:
    """What the call returns, tried again where a remote store may have failed for a moment.

    Args:
        call: what to try.
        uri: of what it asks for.
        patience_s: how long to wait in all, between tries that lie further and further apart.

    Raises:
        FileNotFoundError, PermissionError: as the call raises them, without a second try.
        OSError: any other failure of the local disk, without a second try.
        StorageError: a remote store still failed at the last try.
    """
    remote = split_scheme(uri)[0] not in ("file", "local")
    num_tries = 0
    for delay_s in (*_delays(patience_s), None):
        num_tries += 1
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except _transient_errors() as error:
            if not remote:
                raise
            if delay_s is None:
                raise StorageError(f"{uri} could not be reached in {num_tries} tries: {error}") from error
            time.sleep(delay_s * random.uniform(0.5, 1))  # many processes were turned away at the same moment
    raise AssertionError("unreachable")


def _delays(patience_s: float) -> Iterator[float]:
    delay_s = 0.5
    while patience_s > 0:
        yield min(delay_s, patience_s)
        patience_s -= delay_s
        delay_s = min(delay_s * 4, _LONGEST_DELAY_S)


@contextlib.contextmanager
def name_errors(what: str, uri: str) -> Iterator[None]:
    """Storage that refuses is one sentence that names what was asked of it."""
    errors: tuple[type[Exception], ...] = (OSError, *store_errors())
    try:
        yield
    except errors as error:
        raise ConfigError(f"{what} {uri!r} cannot be used: {error}") from error


def store_errors() -> tuple[type[Exception], ...]:
    """What a store's client raises beside an OSError."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # without s3fs there are only this machine's own errors
        return ()
    return (BotoCoreError, ClientError)


def is_bad_name(error: BaseException) -> bool:
    """Whether one of `store_errors` says that no store could have a file of such a name."""
    from botocore.exceptions import ParamValidationError

    return isinstance(error, ParamValidationError)


def error_code(error: BaseException) -> str | None:
    """S3's own word for what has gone wrong, where the error comes from there."""
    response = getattr(error.__cause__, "response", None) or {}
    return dict(response).get("Error", {}).get("Code")


def _transient_errors() -> tuple[type[BaseException], ...]:
    errors: list[Any] = [OSError, TimeoutError]
    try:
        from aiohttp import ClientError
        from botocore.exceptions import ConnectionError as BotoConnectionError
        from botocore.exceptions import HTTPClientError, ResponseStreamingError
        from botocore.parsers import ResponseParserError
    except ImportError:  # a machine without s3fs reads its own disk
        return tuple(errors)
    return (*errors, ClientError, BotoConnectionError, HTTPClientError, ResponseStreamingError, ResponseParserError)


def spell_out(path: str) -> str:
    """File names that are not UTF-8, spelled out, and told apart: no table could hold them as they are.

    Fetching such a file says that it is missing.
    """
    readable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if readable == path:
        return path
    return f"{readable}~{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
