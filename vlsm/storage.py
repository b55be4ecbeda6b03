"""Reading, writing and listing files on local disks and object stores, with fsspec and s3fs.

A location is a local path or a URI that fsspec knows (`s3://bucket/key`). Names are literal: brackets, percent signs
and `::` have no special meaning. Endpoint and credentials come from the store's standard environment variables.
"""

import contextlib
import datetime
import errno
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec

from vlsm.errors import ConfigError, StorageError
from vlsm.shown import describe_secret

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

# One process reads many small objects: it needs fresh listings, a connection for each thread, and timeouts.
_S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "max_pool_connections": 64,
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 1},  # s3fs and with_retries already retry
    },
}
QUICK_S = 10.5  # retry time where a person waits for the answer, or where one object is concerned
PATIENT_S = 300.0  # retry time of an unattended run: a store may be down for minutes
_LONGEST_DELAY_S = 30.0
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def split_scheme(uri: str) -> tuple[str, str]:
    """Return the scheme of a location ("file" for a local path) and the rest of the location."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def absolute(uri: str) -> str:
    """Return the location in the form that every process on this machine understands.

    Local paths become absolute. A trailing slash is removed.
    """
    scheme, rest = split_scheme(uri)
    if scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest))
    return uri.rstrip("/")


def join(uri: str, *names: str) -> str:
    """Return the location of a file or folder below a folder or prefix."""
    return "/".join([uri.rstrip("/"), *names])


def open_uri(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a location and the path within it.

    Raises:
        ConfigError: fsspec knows no file system for the scheme, or its package is not installed.
    """
    scheme, _ = split_scheme(uri)
    if scheme in ("file", "local"):
        return fsspec.filesystem("file"), absolute(uri)
    if problem := describe_secret(uri):
        raise ConfigError(f"cannot open {uri!r}: {problem}")
    try:
        fs = fsspec.filesystem(scheme, **(_S3_OPTIONS if scheme in ("s3", "s3a") else {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {uri!r}: {error}; use a local path or s3://bucket/prefix") from error
    return fs, fs._strip_protocol(uri)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether the file system is this machine's disk."""
    return bool(fs.protocol == "file" or "file" in fs.protocol)


def exists(uri: str) -> bool:
    """Return whether there is a file or a non-empty folder at the location."""
    fs, path = open_uri(uri)
    return bool(with_retries(lambda: fs.exists(path), uri, QUICK_S))


def read_bytes(uri: str, patience_s: float = QUICK_S) -> bytes:
    """Return the whole content of a file."""
    fs, path = open_uri(uri)
    return bytes(with_retries(lambda: fs.cat_file(path), uri, patience_s))


def read_table(uri: str, columns: list[str] | None = None) -> "pa.Table":
    """Return the content of one Parquet file, or some of its columns.

    `pyarrow.parquet.read_table` reads a Python file in threads of its own. Such a thread may drop the last reference to
    the file after the caller has its table. If Python ends at this moment, the whole process aborts ("terminate called
    without an active exception"). Without `pre_buffer`, only the calling thread uses the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(read_bytes(uri)), pre_buffer=False) as file:
        return file.read(columns, use_threads=False)


def write_bytes(uri: str, data: bytes, patience_s: float = PATIENT_S) -> None:
    """Write a file atomically: readers see the old content or the whole new content, also if the writer dies.

    On a local disk this renames a temporary file. On an object store it is one put or one completed multipart upload.
    """
    fs, path = open_uri(uri)
    if not is_local(fs):
        with_retries(lambda: fs.pipe_file(path, data), uri, patience_s)
        return
    with _temporary_file(path, data) as temporary:
        os.replace(temporary, path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file atomically if it does not exist yet. Returns whether this call has written it.

    Several processes may call it at the same time: one of them writes the file. On an object store, a process that
    tries to write the same content also gets True.
    """
    fs, path = open_uri(uri)
    if not is_local(fs):

        def put() -> None:
            try:
                fs.pipe_file(path, data, mode="create")
            except OSError:  # stores raise different errors for "the file exists"
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
    """Yield a temporary file in the folder of the path, with the content synced to disk. Remove it at the end."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")  # `is_temporary` knows this form
    try:
        with name_full_disk(path):
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def name_full_disk(path: str) -> Iterator[None]:
    """Turn the error of a full disk into a StorageError that names the path and says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"{path} could not be written: {os.strerror(error.errno)}; make room there, and the same command goes on "
            "from here"
        ) from error


def is_temporary(name: str) -> bool:
    """Return whether a file has the name of a temporary file of this module. A killed process leaves such a file."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def remove_leftovers(uri: str) -> None:
    """Remove the temporary files directly in a folder. No other process may be writing there."""
    for name in filter(is_temporary, list_names(uri)):
        remove(join(uri, name))


def remove_empty_folder(uri: str) -> None:
    """Remove a folder of the local disk if it is empty. Object stores have no empty folders."""
    fs, path = open_uri(uri)
    if is_local(fs):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def list_names(uri: str, patience_s: float = QUICK_S) -> list[str]:
    """Return the sorted names of the files directly in a folder, or an empty list if there is no such folder."""
    return sorted(_list_files(uri, patience_s))


def list_times(uri: str) -> dict[str, float]:
    """Return the time of the last write of each file directly in a folder, in seconds since 1970, by file name."""
    return {name: _modified_s(info) for name, info in _list_files(uri).items()}


def list_versions(uri: str) -> dict[str, str]:
    """Return the version of each file directly in a folder, by file name: the etag, or else size and time."""
    return {
        name: str(info.get("ETag") or info.get("etag") or f"{info.get('size')} {_modified_s(info)}").strip('"')
        for name, info in _list_files(uri).items()
    }


def _list_files(uri: str, patience_s: float = QUICK_S) -> dict[str, dict[str, Any]]:
    fs, path = open_uri(uri)
    try:
        infos = with_retries(lambda: fs.ls(path, detail=True), uri, patience_s)
        files = {info["name"].rsplit("/", 1)[-1]: info for info in infos if info["type"] == "file"}
        return {name: info for name, info in files.items() if name}  # some stores list an emptied folder as a file
    except FileNotFoundError:
        return {}


def _modified_s(info: dict[str, Any]) -> float:
    """Return the time of the last write in seconds since 1970; each store has its own key and type for it."""
    time_keys = ("mtime", "LastModified", "last_modified", "updated")
    modified = next((info[key] for key in time_keys if info.get(key)), 0.0)
    if isinstance(modified, str):
        modified = datetime.datetime.fromisoformat(modified)
    return modified.timestamp() if isinstance(modified, datetime.datetime) else float(modified)


def remove(uri: str) -> None:
    """Remove one file if it exists."""
    fs, path = open_uri(uri)
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return


def with_retries(call: Callable[[], T], uri: str, patience_s: float = PATIENT_S) -> T:
    """Return the result of the call; retry it if a remote store fails in a way that may be temporary.

    Args:
        call: the function to call.
        uri: the location that the call reads or writes; messages name it.
        patience_s: the total time in seconds to wait between tries. The delay grows from try to try.

    Raises:
        FileNotFoundError, PermissionError: the call raises them; they are not retried.
        OSError: the local disk fails in another way; this is not retried.
        StorageError: a remote store still fails at the last try.
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
            time.sleep(delay_s * random.uniform(0.5, 1))  # random: many processes fail at the same moment
    raise AssertionError("unreachable")


def _delays(patience_s: float) -> Iterator[float]:
    delay_s = 0.5
    while patience_s > 0:
        yield min(delay_s, patience_s)
        patience_s -= delay_s
        delay_s = min(delay_s * 4, _LONGEST_DELAY_S)


@contextlib.contextmanager
def name_errors(what: str, uri: str) -> Iterator[None]:
    """Turn storage errors into a ConfigError whose one-line message names the setting (`what`) and the location."""
    errors: tuple[type[Exception], ...] = (OSError, *store_errors())
    try:
        yield
    except errors as error:
        raise ConfigError(f"{what} {uri!r} cannot be used: {error}") from error


def store_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions, beside OSError, that the client of a store raises."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # without s3fs only OSError can occur
        return ()
    return (BotoCoreError, ClientError)


def is_bad_name(error: BaseException) -> bool:
    """Return whether an error of `store_errors` says that the name is invalid for any file of the store."""
    from botocore.exceptions import ParamValidationError

    return isinstance(error, ParamValidationError)


def error_code(error: BaseException) -> str | None:
    """Return the error code of S3, such as "ExpiredToken", or None if the error does not come from S3."""
    response = getattr(error.__cause__, "response", None) or {}
    return dict(response).get("Error", {}).get("Code")


def _transient_errors() -> tuple[type[BaseException], ...]:
    errors: list[Any] = [OSError, TimeoutError]
    try:
        from aiohttp import ClientError
        from botocore.exceptions import ConnectionError as BotoConnectionError
        from botocore.exceptions import HTTPClientError, ResponseStreamingError
        from botocore.parsers import ResponseParserError
    except ImportError:  # without s3fs only the local disk is read
        return tuple(errors)
    return (*errors, ClientError, BotoConnectionError, HTTPClientError, ResponseStreamingError, ResponseParserError)


def spell_out(path: str) -> str:
    """Return the path if it is valid UTF-8, else a readable and unique UTF-8 text for it.

    Tables cannot hold paths that are not UTF-8. Reading a file by such a text fails with the reason "missing".
    """
    readable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if readable == path:
        return path
    return f"{readable}~{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
