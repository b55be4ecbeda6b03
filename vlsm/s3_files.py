"""Files in S3. s3fs does everything; where obstore does the same, it reads files and writes small ones.

**The answer of s3fs counts.** obstore delivers bytes, or nothing: after any failure, the same call goes to s3fs. So
reasons, messages, retries, refreshed credentials and redirects to other regions are those of s3fs, and nobody sees the
messages of obstore, which quote requests and answers.

- s3fs opens each bucket: obstore serves it after an answer to s3fs, and after a failure not before the next answer.
- What obstore would do differently stays with s3fs (see `vlsm.s3_clients`); one line of the log says why.
- Names that obstore would change or refuse stay with s3fs: with empty parts, `.`, `..`, or invisible characters.
- Whole files without a limit stay with s3fs, which compares checksums; so do files of 100 MiB and writes that must not
  replace a file.
- obstore cannot be used in a fork of a process that has used it; s3fs serves the fork.
"""

import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fsspec.asyn import FSTimeoutError, sync
from s3fs import S3FileSystem
from s3fs.core import _error_wrapper  # private, as `_call_s3`: what s3fs puts around its own requests

from vlsm.s3_clients import Access, NotAlike, find_access, make_store

T = TypeVar("T")
logger = logging.getLogger("vlsm")

_MAX_PUT_BYTES = 100 << 20  # s3fs writes larger files in several parts
_FRESH_S = 60.0  # then s3fs serves one request and looks at the credentials, minutes before they expire
_MAX_MISSES = 5  # obstore may fail so often after s3fs has succeeded
_MAX_STORES = 8  # per bucket, one for each timeout: each has its connections
_STATUS = re.compile(r"status code: (\d{3})|HTTP error: ([a-z ]+)")


class S3Files(S3FileSystem):  # type: ignore[misc] # s3fs has no types
    """A file system of s3fs whose `cat_file`, `cat_within` and `pipe_file` use obstore where it does the same.

    Threads share an instance, and so its connections.
    """

    @functools.cached_property
    def _lanes(self) -> dict[str, "_Lane"]:
        return {}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, timeout: float | None = None, **options: Any
    ) -> bytes:
        """Return the bytes of a file from start to end, or to its own end. At most so many are in memory."""
        slow = functools.partial(self._cat_file, path, start=start, end=end, **options)
        if options or start is None or end is None or not 0 <= start < end:
            return bytes(sync(self.loop, slow, timeout=timeout))
        return bytes(self._serve(path, lambda store, key: _read(store, key, start, end), slow, timeout))

    def cat_within(self, path: str, max_bytes: int, timeout: float | None = None) -> tuple[bytes, int]:
        """Return the bytes of a file whose size nobody knows yet, and its size; no bytes if it has more than max_bytes.

        obstore needs one request for both. A list of images rarely states sizes.
        """

        async def ask() -> tuple[bytes, int]:
            bucket, key, version = self.split_path(path)
            chosen = {"VersionId": version} if version else {}
            reply = await self._call_s3("get_object", Bucket=bucket, Key=key, **chosen, **self.req_kw)
            try:
                if "ContentRange" in reply:
                    raise OSError(f"only the bytes {reply['ContentRange']} came")
                size = int(reply["ContentLength"])
                return bytes(await reply["Body"].read()) if 0 < size <= max_bytes else b"", size
            finally:
                reply["Body"].close()

        slow = functools.partial(_error_wrapper, ask, retries=self.retries)
        found: tuple[bytes, int] = self._serve(
            path, lambda store, key: _read_within(store, key, max_bytes), slow, timeout
        )
        return found

    def pipe_file(
        self, path: str, value: bytes, mode: str = "overwrite", timeout: float | None = None, **options: Any
    ) -> None:
        """Write a file with one request; in the mode "create", only if it does not exist."""
        slow = functools.partial(self._pipe_file, path, value, mode=mode, **options)
        if options or mode != "overwrite" or len(value) >= _MAX_PUT_BYTES:
            sync(self.loop, slow, timeout=timeout)
            return
        self._serve(path, lambda store, key: _write(store, key, value), slow, timeout)
        self.invalidate_cache(path)

    def _serve(self, path: str, fast: Callable[[Any, str], T], slow: Callable[[], Any], timeout_s: float | None) -> T:
        """Return the result of obstore, or else of s3fs. Both have timeout_s together."""
        bucket, key, version = self.split_path(path)
        if version or not _is_plain(key):
            return sync(self.loop, slow, timeout=timeout_s)
        lane = self._lanes.get(bucket) or self._lanes.setdefault(bucket, _Lane(self, bucket))
        started_s, access = time.monotonic(), lane.enter()
        if access is not None:
            try:
                result = _interruptible(functools.partial(fast, lane.store(access, timeout_s), key))
            except FileNotFoundError as error:  # probably true; the lane stays open unless s3fs finds the file
                failure: Exception = error
            except Exception as error:
                failure = error
                lane.close(access, error)
            else:
                lane.num_misses = 0
                return result
            timeout_s = _rest(timeout_s, started_s)
        answer: T = sync(self.loop, slow, timeout=timeout_s)
        if access is not None:
            lane.close(access, failure)
        lane.open()
        return answer


S3Files._cache = S3FileSystem._cache  # who clears the instances of s3fs means these too


class _Lane:
    """The way of obstore to one bucket.

    It takes no lock for longer than a moment: threads use what they find, and s3fs is always right.

    Attributes:
        num_misses: how often it was closed since its last success.
    """

    def __init__(self, fs: S3Files, bucket: str) -> None:
        self.num_misses = 0
        self._fs, self._bucket = fs, bucket
        self._access: Access | None = None
        self._stores: dict[tuple[Access, float | None], Any] = {}
        self._fresh_until_s, self._is_barred, self._opening = 0.0, False, threading.Lock()

    def enter(self) -> Access | None:
        """Return how obstore reaches the bucket, or None if s3fs must serve a request."""
        access, now_s = self._access, time.monotonic()
        if access is None or not _is_own_process():
            return None
        if now_s > self._fresh_until_s:
            self._fresh_until_s = now_s + _FRESH_S  # the other threads need not wait
            return None
        return access

    def store(self, access: Access, timeout_s: float | None) -> Any:
        """Return the store of obstore whose requests end after timeout_s, to two digits."""
        key = access, timeout_s and float(f"{timeout_s:.2g}")
        if (store := self._stores.get(key)) is None:
            if len(self._stores) >= _MAX_STORES:
                self._stores = {}
            store = self._stores.setdefault(key, make_store(*key))
        return store

    def close(self, access: Access, error: Exception) -> None:
        """Leave the bucket to s3fs until it is opened again. Of threads that fail together, only one counts."""
        if self._access is not access:
            return
        self._access = None
        self.num_misses += 1
        if self.num_misses >= _MAX_MISSES:
            found = _STATUS.search(str(error))
            reason = (found[1] or found[2]) if found else type(error).__name__
            self._bar(f"obstore fails where s3fs succeeds ({reason})")

    def open(self) -> None:
        """Let obstore serve the bucket: s3fs has just had an answer."""
        if self._is_barred or not _is_own_process() or not self._opening.acquire(blocking=False):
            return
        try:
            access = sync(self._fs.loop, find_access, self._fs, self._bucket)
            self.store(access, None)
            _claim_process()
            self._access, self._fresh_until_s = access, time.monotonic() + _FRESH_S
        except NotAlike as error:
            self._bar(str(error))
        except ImportError:
            self._bar("the package obstore is not installed")
        except Exception as error:  # of botocore, of a future version of obstore: s3fs works
            self._bar(f"obstore cannot be set up ({type(error).__name__})")
        finally:
            self._opening.release()

    def _bar(self, reason: str) -> None:
        if not self._is_barred:
            self._is_barred, self._access = True, None
            logger.info("s3://%s is served by s3fs alone, which takes more CPU time: %s", self._bucket, reason)


_process_id: int | None = None  # of the process whose threads serve obstore


def _is_own_process() -> bool:
    """Return whether obstore may be used: not in a fork of a process that has used it."""
    return _process_id in (None, os.getpid())


def _claim_process() -> None:
    global _process_id  # noqa: PLW0603 - its threads are one for each process, too
    _process_id = _process_id or os.getpid()


def _rest(timeout_s: float | None, started_s: float) -> float | None:
    """Return what is left of a timeout, in seconds; None is no limit."""
    if timeout_s is None or (left_s := timeout_s - (time.monotonic() - started_s)) > 0:
        return None if timeout_s is None else left_s
    raise FSTimeoutError


def _is_plain(key: str) -> bool:
    """Return whether obstore asks for exactly this key."""
    return key.isprintable() and not any(part in ("", ".", "..") for part in key.split("/"))


def _interruptible(call: Callable[[], T]) -> T:
    """Return the result of a call of obstore, which sees no Ctrl-C: the main thread waits for another one."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # every type of error: the main thread waits for it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def _read(store: Any, key: str, start: int, end: int) -> bytes:
    import obstore

    return _first_bytes(obstore.get(store, key, options={"range": (start, end)}), end - start)


def _read_within(store: Any, key: str, max_bytes: int) -> tuple[bytes, int]:
    import obstore

    # with a range, obstore compares what comes with what was asked for
    reply = obstore.get(store, key, options={"range": (0, max_bytes + 1)})
    size = int(reply.meta["size"])
    return _first_bytes(reply, size) if 0 < size <= max_bytes else b"", size


def _first_bytes(reply: Any, left: int) -> bytes:
    content: list[bytes] = []
    for block in reply.stream(min_chunk_size=left):
        content.append(bytes(block)[:left])
        left -= len(content[-1])
        if left <= 0:  # a server may send more
            break
    return content[0] if len(content) == 1 else b"".join(content)


def _write(store: Any, key: str, value: bytes) -> None:
    import obstore

    obstore.put(store, key, value, use_multipart=False)
