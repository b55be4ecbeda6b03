"""Reading the bytes of one image, with retries and a wait for a store that is down."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vlsm.errors import ImageError, ManifestError, RedirectError, StorageError
from vlsm.locations import HTTP, split_scheme
from vlsm.storage import PATIENT_S, QUICK_S, error_code, is_bad_name, is_local, open_uri, store_errors, with_retries
from vlsm.stores import check_file

T = TypeVar("T")

_NO_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
)


def read_image_bytes(  # noqa: PLR0913 - everything that limits a read
    uri: str,
    size_bytes: int | None,
    max_bytes: int,
    timeout_s: float | None = None,
    patience_s: float = PATIENT_S,
    span: tuple[int, int] | None = None,
    allow: tuple[str, ...] = (),
) -> bytes:
    """Return the content of a file, or of a part of it.

    Temporary failures are retried: for about 10 s while the store answers other requests, for up to patience_s while
    it answers none.

    Args:
        uri: location of the file.
        size_bytes: size of the file as listed, or None to ask the store first.
        max_bytes: larger files are refused before they are read, even if size_bytes is wrong.
        timeout_s: limit for all tries together, on a remote store; None for no limit.
        patience_s: how long the store may be down, in seconds.
        span: offset and length of the part in bytes; None for the whole file.
        allow: the setting `run.allow`: redirects of HTTP may lead there.

    Raises:
        ImageError: the file is missing, forbidden, empty, too large, ends inside the part or cannot be read. Or the
            store answers other requests, but not for this file ("unavailable", "timeout").
        StorageError: the store is down for longer than patience_s, or no longer accepts the credentials.
    """
    quick_s = min(QUICK_S, patience_s)

    def read() -> bytes:
        fetch = _Fetch(uri, timeout_s, quick_s, allow)
        return fetch.read(size_bytes, max_bytes) if span is None else fetch.read_span(span, size_bytes, max_bytes)

    return read_patiently(read, uri, patience_s)


def read_patiently(read: Callable[[], T], uri: str, patience_s: float) -> T:
    """Return the result of `read`. If it fails while the store is down, wait for the store and read once more.

    Raises:
        ImageError: `read` raises it.
        StorageError: the store is down for longer than patience_s.
    """
    try:
        return read()
    except ImageError as error:
        if error.reason not in ("unavailable", "timeout") or not _wait_for_store(uri, patience_s):
            raise
    return read()


class _Fetch:
    """The reading of one file; timeout_s starts when it is created."""

    def __init__(self, uri: str, timeout_s: float | None, patience_s: float, allow: tuple[str, ...]) -> None:
        self.uri, self.timeout_s, self.patience_s = uri, timeout_s, patience_s
        with image_errors(uri):
            self._fs, self._path = open_uri(uri, allow)
        self._started_s = time.monotonic()

    def read(self, size_bytes: int | None, max_bytes: int) -> bytes:
        """Return the whole content; see `read_image_bytes`."""
        with image_errors(self.uri):
            if is_local(self._fs):
                check_file(self._path)  # before its size: a pipe has none
            if size_bytes and len(data := self._read(size_bytes, max_bytes)) <= size_bytes:
                return data
            if hasattr(self._fs, "cat_within"):
                return with_retries(lambda: self._read_within(max_bytes), self.uri, self.patience_s)
            size_bytes = with_retries(self._ask_size, self.uri, self.patience_s) or max_bytes
            if len(data := self._read(size_bytes, max_bytes)) > size_bytes:
                raise ImageError("unreadable", f"{self.uri} grows beyond {size_bytes:,} bytes while it is read")
            return data

    def read_span(self, span: tuple[int, int], size_bytes: int | None, max_bytes: int) -> bytes:
        """Return a part of the content."""
        offset, length = span
        name = f"the member at byte {offset:,} of {self.uri}"
        broken = ImageError("corrupt", f"{name} should end at byte {offset + length:,}, but the file is shorter")

        def get() -> bytes:
            data = bytes(self._ask(self._fs.cat_file, start=offset, end=offset + length))
            if len(data) < length and (self._ask_size() or 0) >= offset + length:
                raise OSError(f"only {len(data):,} bytes came")
            return data

        with image_errors(self.uri):
            check_size(name, length, max_bytes)
            if (size_bytes or offset + length) < offset + length:
                raise broken
            if len(data := with_retries(get, self.uri, self.patience_s)) == length:
                return data
            raise broken

    def _read(self, size_bytes: int, max_bytes: int) -> bytes:
        """Return the content if it has at most size_bytes bytes, else its first size_bytes + 1 bytes."""
        check_size(self.uri, size_bytes, max_bytes)

        def get() -> bytes:
            data = bytes(self._ask(self._fs.cat_file, start=0, end=size_bytes + 1))
            # A response may end early without an error, or the file may have changed since it was listed.
            if len(data) < size_bytes and self._ask_size() not in (len(data), None):
                raise OSError(f"only {len(data):,} bytes came")
            return data

        if data := with_retries(get, self.uri, self.patience_s):
            return data
        raise ImageError("empty", f"{self.uri} has 0 bytes")

    def _read_within(self, max_bytes: int) -> bytes:
        """Return the content of a file whose size comes with it, if its store states it."""
        data, size_bytes = self._ask(self._fs.cat_within, max_bytes=max_bytes)
        if size_bytes is None and len(data) > max_bytes:
            raise ImageError("too_large", f"{self.uri} has more bytes than max_image_bytes, which is {max_bytes:,}")
        check_size(self.uri, len(data) if size_bytes is None else size_bytes, max_bytes)
        if size_bytes not in (len(data), None):
            raise OSError(f"{len(data):,} of its {size_bytes:,} bytes came")
        return bytes(data)

    def _ask_size(self) -> int | None:
        """Return the size of the file in bytes; None if an HTTP server does not state it."""
        size = self._ask(self._fs.info)["size"]
        return None if size is None else int(size)

    def _ask(self, method: Callable[..., Any], **limits: int) -> Any:
        """Return the result of a method of the file system, called with the rest of timeout_s as its timeout."""
        if self.timeout_s is None or not getattr(self._fs, "async_impl", False):
            return method(self._path, **limits)
        left_s = self._started_s + self.timeout_s - time.monotonic()
        if left_s <= 0:
            raise ImageError("timeout", f"{self.uri} could not be read in {self.timeout_s:g} s")
        return method(self._path, timeout=left_s, **limits)


def check_size(name: str, size_bytes: int, max_bytes: int) -> None:
    """Raise an ImageError if a file is empty or larger than max_bytes."""
    if size_bytes > max_bytes:
        raise ImageError("too_large", f"{name} has {size_bytes:,} bytes; max_image_bytes is {max_bytes:,}")
    if not size_bytes:
        raise ImageError("empty", f"{name} has 0 bytes")


class WatchedFile:
    """A file that records the first error of its store, also if its reader hides the error.

    Attributes:
        error: the first error of a read, or None.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, *size: int) -> bytes:
        """Return bytes as the file does, and record its error."""
        try:
            return bytes(self._file.read(*size))
        except Exception as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def image_errors(uri: str) -> Iterator[None]:
    """Turn every storage error for a file into an ImageError with its reason.

    Raises:
        ImageError: the file cannot be read.
        StorageError: the store no longer accepts the credentials. This is not the fault of one image.
    """
    try:
        yield
    except (ImageError, ManifestError):
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"there is no file {uri}") from error
    except PermissionError as error:
        if (code := error_code(error)) in _NO_CREDENTIALS:
            raise StorageError(f"{uri}: its store no longer takes the credentials: {code}") from error
        is_redirect = isinstance(error, RedirectError)
        raise ImageError("forbidden", str(error) if is_redirect else f"no permission to read {uri}") from error
    except StorageError as error:
        raise ImageError("unavailable", str(error)) from error
    except store_errors() as error:  # such as missing credentials; _wait_for_store then finds the cause
        reason = "unreadable" if is_bad_name(error) else "unavailable"
        raise ImageError(reason, f"{uri}: {error}") from error
    except Exception as error:  # of the local disk, of an invalid name, of a file system that cannot read files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError("unreadable", f"{uri}: {reason}") from error


def _wait_for_store(uri: str, patience_s: float) -> bool:
    """Wait until the store of a file answers any request. Returns whether the first request failed.

    An HTTP server is not waited for: a list may name thousands, and one of them must not hold up or end a run.

    Raises:
        StorageError: the store is down for longer than patience_s.
    """
    if split_scheme(uri)[0] in HTTP:
        return False
    fs, path = open_uri(uri)
    num_tries = 0

    def ask() -> None:
        nonlocal num_tries
        num_tries += 1
        try:
            fs.info(fs._parent(path))
        except (FileNotFoundError, PermissionError):
            return  # also an answer
        except OSError as error:
            response = getattr(error.__cause__, "response", {})
            if not 400 <= response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
                raise

    with_retries(ask, uri, patience_s)
    return num_tries > 1
