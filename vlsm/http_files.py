"""Files by HTTP, read within limits, whatever a server announces.

fsspec reads a reply to its end. A server may state a false length or none, ignore the range that was asked for, pack
its reply, or send a byte each second.
"""

import contextlib
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import IO, Any

import aiohttp
from fsspec.asyn import sync, sync_wrapper
from fsspec.implementations.http import HTTPFile, HTTPFileSystem

from vlsm.errors import BeyondLimitError, ImageError
from vlsm.limits import MAX_LISTED_BYTES, MAX_SILENCE_S, MIN_BYTES_PER_S

_BLOCK = 1 << 16
_UNPACKED = {"gzip", "x-gzip", "deflate"}
_REFUSED, _BUSY = (401, 402, 403, 407, 451), (408, 425, 429)  # statuses of HTTP
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=MAX_SILENCE_S, sock_read=MAX_SILENCE_S)


class BoundedHttpFiles(HTTPFileSystem):  # type: ignore[misc] # fsspec has no types
    """Files by HTTP. Of a reply no more is read than was asked for.

    A reply that is slower than MIN_BYTES_PER_S, after MAX_SILENCE_S, is an ImageError "timeout".
    """

    async def _info(self, url: str, **options: Any) -> Any:
        """Return the facts of a file. fsspec reports every failure as a missing file; an answer says what it is."""
        try:
            return await super()._info(url, **{"timeout": _TIMEOUT} | options)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, aiohttp.ClientResponseError):
                _raise_for_status(error.__cause__.status, url, error.__cause__)
            raise

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if min(start or 0, end or 0) < 0:
            raise ValueError("positions count from the start of a file")
        if end is not None and end <= (start or 0):
            return b""
        content = bytearray()
        async for block in self._blocks(url, start or 0, end, options):
            content += block
        return bytes(content)

    async def _cat_within(self, url: str, max_bytes: int) -> tuple[bytes, int | None]:
        """Return the bytes of a file whose size nobody knows yet, and its size if the server states it.

        Of a larger file, no bytes if the server states its size, else max_bytes + 1 bytes. One request asks for both.
        """
        async with self._reply(url, {}, {}) as reply:
            size = None if _is_packed(reply) else reply.content_length
            content = bytearray()
            if size is None or size <= max_bytes:
                async for block in _read(reply, url):
                    content += block
                    if len(content) > max_bytes:
                        break
            if (len(content) if size is None else size) > max_bytes:
                reply.close()  # the rest is not read
            return bytes(content[: max_bytes + 1]), size

    cat_within = sync_wrapper(_cat_within)

    async def _copy(self, url: str, max_bytes: int, target: IO[bytes]) -> None:
        async for block in self._blocks(url, 0, max_bytes, {}):
            target.write(block)

    async def _blocks(self, url: str, start: int, end: int | None, options: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield the bytes of a file from start to end, or to its own end."""
        headers = options.pop("headers", {})
        if start or end is not None:
            headers = {**headers, "Range": f"bytes={start}-{'' if end is None else end - 1}"}
        async with self._reply(url, headers, options) as reply:
            if reply.status == 416:  # the file ends before
                return
            if start and (reply.status != 206 or _is_packed(reply)):
                raise ValueError("its server sends no parts of files; copy it to a disk or a bucket before the run")
            left = None if end is None else end - start
            stated = -1 if _is_packed(reply) else reply.content_length or -1
            is_longer = left is not None and not 0 <= stated <= left
            async for block in _read(reply, url):
                yield block[:left]
                left = None if left is None else max(left - len(block), 0)
                if is_longer and left == 0:
                    reply.close()  # the rest is not read; any other reply ends here, and its connection is kept
                    break

    @contextlib.asynccontextmanager
    async def _reply(
        self, url: str, headers: Mapping[str, str], options: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield the reply to a GET. Its status is a success, or 416 if the headers ask for a range.

        Raises:
            OSError: the server answers with an error, or with a part although the headers ask for none.
        """
        session = await self.set_session()
        options = {"timeout": _TIMEOUT, "auto_decompress": False} | options
        headers = {**headers, "Accept-Encoding": "identity"}
        async with session.get(self.encode_url(url), headers=headers, **options) as reply:
            if not (reply.status == 416 and "Range" in headers):
                _raise_for_status(reply.status, url)
                self._raise_not_found_for_status(reply, url)
            if reply.status == 206 and "Range" not in headers:
                raise OSError("its server sends a part, although nobody asked for one")
            yield reply

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        """Return a file that reads blocks. A file without a stated length is copied to a temporary file."""
        size = options.pop("size", None) or self.info(path)["size"]
        if size is None:
            copy = tempfile.TemporaryFile()  # without a name: it is gone when it is closed
            sync(self.loop, self._copy, path, MAX_LISTED_BYTES + 1, copy)
            if copy.tell() > MAX_LISTED_BYTES:
                copy.close()
                raise BeyondLimitError(
                    f"{path}: its server states no length, and sends more than {MAX_LISTED_BYTES:,} bytes, which are "
                    "the most for such a file; copy it to a disk or a bucket before the run"
                )
            copy.seek(0)
            return copy
        session = sync(self.loop, self.set_session)
        options = {"cache_type": self.cache_type, "cache_options": self.cache_options} | options
        return _Blocks(self, path, session, block_size or self.block_size, mode, size=size, loop=self.loop, **options)


class _Blocks(HTTPFile):  # type: ignore[misc] # fsspec has no types
    async def _read_block(self, start: int, end: int) -> bytes:
        return bytes(await self.fs._cat_file(self.url, start, end))

    _fetch_range = sync_wrapper(_read_block)

    def _fetch_all(self) -> None:
        """Read blocks also for the whole file: the reply to a request without a range may be longer."""


def _raise_for_status(status: int, url: str, cause: BaseException | None = None) -> None:
    """Raise the error of an answer that is not about a missing file: one says no, another one may succeed later.

    Raises:
        PermissionError: the server refuses the request. To ask again is in vain.
        OSError: the server has trouble, or too many requests.
    """
    if status in _REFUSED:
        raise PermissionError(f"{url}: its server answers with {status}") from cause
    if status in _BUSY or status >= 500:
        raise OSError(f"its server answers with {status}") from cause


def _is_packed(reply: aiohttp.ClientResponse) -> bool:
    return reply.headers.get("Content-Encoding", "").lower() in _UNPACKED


def _read(reply: aiohttp.ClientResponse, url: str) -> AsyncIterator[bytes]:
    """Return the blocks of a reply, unpacked. They raise an ImageError if they come too slowly."""
    return _watch_speed(_unpack(reply) if _is_packed(reply) else reply.content.iter_chunked(_BLOCK), url)


async def _unpack(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the unpacked content of a packed reply; of a part of it, what can be unpacked."""
    unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)  # gzip or zlib
    async for packed in reply.content.iter_chunked(_BLOCK):
        while packed and not unpacker.eof:
            yield unpacker.decompress(packed, _BLOCK)
            packed = unpacker.unconsumed_tail


async def _watch_speed(blocks: AsyncIterator[bytes], url: str) -> AsyncIterator[bytes]:
    """Pass blocks on. Raise an ImageError if they come too slowly."""
    started_s, num_bytes = time.monotonic(), 0
    try:
        async for block in blocks:
            num_bytes += len(block)
            yield block
            passed_s = time.monotonic() - started_s
            if passed_s > MAX_SILENCE_S + num_bytes / MIN_BYTES_PER_S:
                raise ImageError("timeout", f"{url}: the server sent {num_bytes:,} bytes in {passed_s:.0f} s")
    except aiohttp.SocketTimeoutError as error:
        raise ImageError("timeout", f"{url}: the server sent nothing for {MAX_SILENCE_S} s") from error
