"""The bytes of one image, whatever its store does meanwhile."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from vlsm.errors import ImageError, StorageError
from vlsm.storage import PATIENT_S, QUICK_S, error_code, is_bad_name, is_local, open_uri, store_errors, with_retries

_NO_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
)


def read_image_bytes(
    uri: str,
    size_bytes: int | None,
    max_bytes: int,
    timeout_s: float | None = None,
    patience_s: float = PATIENT_S,
    span: tuple[int, int] | None = None,
) -> bytes:
    """The content of one image of an archive: of a file, or of a part of it.

    What may pass is tried again: of one image for some seconds, of a store that does not answer at all for longer.

    Args:
        uri: where the image is.
        size_bytes: its size as listed, or None to ask the store first.
        max_bytes: larger files are refused before they are read, whatever size_bytes says.
        timeout_s: for all tries together, on a remote store.
        patience_s: how long a store may be away.
        span: offset and length of the part in bytes.

    Raises:
        ImageError: the file is missing, forbidden, empty, too large, ends within the part or cannot be read, or its
            store answers, but not for this file ("unavailable", "timeout").
        StorageError: the store was away for longer than patience_s, or no longer takes the credentials.
    """
    quick_s = min(QUICK_S, patience_s)

    def read() -> bytes:
        fetch = _Fetch(uri, timeout_s, quick_s)
        return fetch.read(size_bytes, max_bytes) if span is None else fetch.read_span(span, size_bytes, max_bytes)

    return read_patiently(read, uri, patience_s)


def read_patiently(read: Callable[[], bytes], uri: str, patience_s: float) -> bytes:
    """What is read of a file, a second time where its store did not answer anything meanwhile.

    Raises:
        ImageError: of the reading.
        StorageError: the store was away for longer than patience_s.
    """
    try:
        return read()
    except ImageError as error:
        if error.reason not in ("unavailable", "timeout") or not _wait_for_store(uri, patience_s):
            raise
    return read()


class _Fetch:
    """One image being read, with its time running."""

    def __init__(self, uri: str, timeout_s: float | None, patience_s: float) -> None:
        self.uri, self.timeout_s, self.patience_s = uri, timeout_s, patience_s
        with image_errors(uri):
            self._fs, self._path = open_uri(uri)
        self._started_s = time.monotonic()

    def read(self, size_bytes: int | None, max_bytes: int) -> bytes:
        """The content; see `read_image_bytes`."""
        with image_errors(self.uri):
            if is_local(self._fs) and os.path.exists(self._path) and not os.path.isfile(self._path):
                raise ImageError("unreadable", f"{self.uri} is no file")  # a pipe would be waited for without end
            if size_bytes and len(data := self._read(size_bytes, max_bytes)) <= size_bytes:
                return data
            size_bytes = with_retries(self._ask_size, self.uri, self.patience_s)
            if len(data := self._read(size_bytes, max_bytes)) > size_bytes:
                raise ImageError("unreadable", f"{self.uri} grows while it is read")
            return data

    def read_span(self, span: tuple[int, int], size_bytes: int | None, max_bytes: int) -> bytes:
        """A part of the content."""
        offset, length = span
        name = f"what stands at byte {offset:,} of {self.uri}"
        broken = ImageError("corrupt", f"{name} should end at byte {offset + length:,}, behind the end of the file")

        def get() -> bytes:
            data = bytes(self._ask(self._fs.cat_file, start=offset, end=offset + length))
            if len(data) < length and self._ask_size() >= offset + length:
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
        """The content if it has so many bytes or less, otherwise one byte more."""
        check_size(self.uri, size_bytes, max_bytes)

        def get() -> bytes:
            data = bytes(self._ask(self._fs.cat_file, start=0, end=size_bytes + 1))
            # a body may end early without an error; or the file is another than the one that was listed
            if len(data) < size_bytes and len(data) != self._ask_size():
                raise OSError(f"only {len(data):,} bytes came")
            return data

        if data := with_retries(get, self.uri, self.patience_s):
            return data
        raise ImageError("empty", f"{self.uri} has 0 bytes")

    def _ask_size(self) -> int:
        return int(self._ask(self._fs.info)["size"])

    def _ask(self, method: Callable[..., Any], **limits: int) -> Any:
        if self.timeout_s is None or not getattr(self._fs, "async_impl", False):
            return method(self._path, **limits)
        left_s = self._started_s + self.timeout_s - time.monotonic()
        if left_s <= 0:
            raise ImageError("timeout", f"{self.uri} could not be read in {self.timeout_s:g} s")
        return method(self._path, timeout=left_s, **limits)


def check_size(name: str, size_bytes: int, max_bytes: int) -> None:
    """Nothing, or an ImageError for what is empty or too large to be read."""
    if size_bytes > max_bytes:
        raise ImageError("too_large", f"{name} has {size_bytes:,} bytes; max_image_bytes is {max_bytes:,}")
    if not size_bytes:
        raise ImageError("empty", f"{name} has 0 bytes")


@contextlib.contextmanager
def image_errors(uri: str) -> Iterator[None]:
    """What storage raises for a file, as the reason why its image cannot be read."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("missing", f"there is no file {uri}") from error
    except PermissionError as error:
        if (code := error_code(error)) in _NO_CREDENTIALS:  # which is no image's fault
            raise StorageError(f"{uri}: its store no longer takes the credentials: {code}") from error
        raise ImageError("forbidden", f"no permission to read {uri}") from error
    except StorageError as error:
        raise ImageError("unavailable", str(error)) from error
    except store_errors() as error:  # no credentials, for example: asking the store itself will tell
        reason = "unreadable" if is_bad_name(error) else "unavailable"
        raise ImageError(reason, f"{uri}: {error}") from error
    except Exception as error:  # of the local disk, of a name that none can have, of a store that is no file system
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError("unreadable", f"{uri}: {reason}") from error


def _wait_for_store(uri: str, patience_s: float) -> bool:
    """Wait until the store of a file answers anything; whether it had to be waited for."""
    fs, path = open_uri(uri)
    num_tries = 0

    def ask() -> None:
        nonlocal num_tries
        num_tries += 1
        try:
            fs.info(fs._parent(path))
        except (FileNotFoundError, PermissionError):
            return  # which are answers
        except OSError as error:
            response = getattr(error.__cause__, "response", {})
            if not 400 <= response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
                raise

    with_retries(ask, uri, patience_s)
    return num_tries > 1
