"""Reading, writing and listing files on local disks and object stores, with fsspec, s3fs and obstore.

A location is a local path or a URI that fsspec knows (`s3://bucket/key`). Names are literal: brackets, percent signs
and `::` have no special meaning. Endpoint and credentials come from the store's standard environment variables.
"""

import contextlib
import datetime
import errno
import logging
import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlsm.errors import ConfigError, StorageError, VlsmError
from vlsm.locations import HTTP, LOCAL
from vlsm.locations import absolute as absolute
from vlsm.locations import join as join
from vlsm.locations import parent as parent
from vlsm.locations import spell_out as spell_out
from vlsm.locations import split_scheme as split_scheme
from vlsm.locations import without_query as without_query
from vlsm.stores import is_local as is_local
from vlsm.stores import open_uri as open_uri

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
logger = logging.getLogger("vlsm")

QUICK_S = 10.5  # retry time where a person waits for the answer, or where one object is concerned
PATIENT_S = 300.0  # retry time of an unattended run: a store may be down for minutes
FIRST_S = 0.5  # retry time of a command for a store that has never answered it: its address is probably wrong
_LONGEST_DELAY_S = 30.0
_SILENCE_S = 60.0  # one line of the log per store in this time; an outage fails thousands of tries
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_answered: set[str] = set()  # the stores (s3://bucket) that have answered this process
_told_s: dict[str, float] = {}  # when the log last said that a store does not answer
_first_s = math.inf


def exists(uri: str, allow: tuple[str, ...] = ()) -> bool:
    """Return whether there is a file or a non-empty folder at the location; `allow` as for `open_uri`."""
    fs, path = open_uri(uri, allow)
    return bool(with_retries(lambda: fs.exists(path), uri, QUICK_S))


def read_bytes(uri: str, patience_s: float = QUICK_S, max_bytes: int | None = None) -> bytes:
    """Return the whole content of a file; if it is longer than `max_bytes`, its first `max_bytes` + 1 bytes."""
    fs, path = open_uri(uri)

    def read() -> bytes:
        # stores refuse a range of an empty file, so the size comes first; a pipe of the local disk has no size
        is_long = max_bytes is not None and (is_local(fs) or (fs.size(path) or 0) > max_bytes)
        return bytes(fs.cat_file(path, end=max_bytes + 1) if is_long and max_bytes is not None else fs.cat_file(path))

    return with_retries(read, uri, patience_s)


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

    A failed try is a line of the log, one per store and minute. After `expect_answers`, a store that has never answered
    this process is retried for FIRST_S at most: a typing error in its address need not be waited for, an outage in a
    run is.

    Args:
        call: the function to call.
        uri: the location that the call reads or writes; messages name it.
        patience_s: the total time in seconds to wait between tries. The delay grows from try to try.

    Raises:
        FileNotFoundError, PermissionError: the call raises them; they are not retried.
        OSError: the local disk fails in another way; this is not retried.
        StorageError: a remote store still fails at the last try.
    """
    scheme, path = split_scheme(uri)
    if scheme in ("file", "local"):
        return call()
    store, num_tries = f"{scheme}://{path.partition('/')[0]}", 0
    delays = _delays(patience_s if store in _answered else min(patience_s, _first_s))
    while True:
        num_tries += 1
        try:
            result = call()
        except (FileNotFoundError, PermissionError):
            _answered.add(store)
            raise
        except _transient_errors() as error:
            if store not in _answered and error_code(error):  # it answers, though with an error
                _answered.add(store)
                delays = _delays(patience_s)
            if (delay_s := next(delays, None)) is None:
                raise StorageError(f"{uri} could not be reached in {num_tries} tries: {error}") from error
            _tell(store, uri, error)
            time.sleep(delay_s * random.uniform(0.5, 1))  # random: many processes fail at the same moment
        else:
            _answered.add(store)
            return result


def _tell(store: str, uri: str, error: BaseException) -> None:
    if time.monotonic() - _told_s.get(store, -math.inf) > _SILENCE_S:
        _told_s[store] = time.monotonic()
        logger.info("%s does not answer, and is tried again: %s", uri, error)


def expect_answers() -> None:
    """Let this process give up soon on a store that has never answered it. Commands call this; workers do not."""
    global _first_s  # noqa: PLW0603 - one for each process
    _first_s = FIRST_S


def _delays(patience_s: float) -> Iterator[float]:
    delay_s = 0.5
    while patience_s > 0:
        yield min(delay_s, patience_s)
        patience_s -= delay_s
        delay_s = min(delay_s * 4, _LONGEST_DELAY_S)


@contextlib.contextmanager
def name_errors(what: str, uri: str) -> Iterator[None]:
    """Turn storage errors into a ConfigError whose one-line message names the setting (`what`) and the location.

    Clients of unusual stores raise errors of every type, such as NotImplementedError for what they cannot do.
    """
    usual = (*LOCAL, *HTTP, "s3", "s3a")
    is_usual = split_scheme(uri)[0] in usual
    errors: tuple[type[Exception], ...] = (OSError, *store_errors()) if is_usual else (Exception,)
    try:
        yield
    except VlsmError:
        raise
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what} {uri!r} cannot be used: {reason}{_credentials_hint(error)}") from error


def _credentials_hint(error: BaseException) -> str:
    if type(error).__name__ not in ("NoCredentialsError", "PartialCredentialsError"):
        return ""
    return (
        "; give them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in a profile (AWS_PROFILE) or as the role of the "
        "machine"
    )


def check_writable(uri: str) -> None:
    """Raise an OSError if files cannot be written below a location. Nothing is written.

    On a local disk the deepest folder that exists must be writable. In S3 an upload is begun and aborted at once. Other
    stores are not checked.
    """
    fs, path = open_uri(uri)
    if is_local(fs):
        folder = Path(path)
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} may not be written")
    elif "s3" in fs.protocol:
        bucket, key, _ = fs.split_path(f"{path}/config.yaml")

        def try_upload() -> None:
            fs.call_s3("head_bucket", Bucket=bucket)
            upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])

        with_retries(try_upload, uri, QUICK_S)


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
