"""Unpacks gzip files, and members of archives, in bounded steps."""

import gzip
import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from vlsm.errors import BeyondLimitError, ImageError
from vlsm.limits import MAX_LISTED_BYTES, MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO

_BLOCK = 1 << 14  # packed bytes that are read at once
_SKIPPED = 1 << 20  # unpacked bytes that a seek drops at once
_GZIP = 16 + zlib.MAX_WBITS
_MOST_EMPTY = 1000  # members without a byte in a row
_MOST_HEADER_BYTES = 1 << 20  # packed bytes without an unpacked one


class Budget:
    """Counts the bytes that are unpacked of one archive while it is listed.

    Args:
        size_bytes: of the archive.
    """

    def __init__(self, size_bytes: int) -> None:
        self._most = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size_bytes)
        self._count = 0

    def note(self, num_bytes: int) -> None:
        """Count bytes. Raise a BeyondLimitError if there are too many."""
        self._count += num_bytes
        if self._count > self._most:
            raise BeyondLimitError(f"counting its images unpacks more than {self._most:,} bytes, which are the most")


def open_member(file: Any, name: str, note: Callable[[int], None] = lambda num_bytes: None) -> BinaryIO:
    """Return a packed member of an archive that is unpacked once, as far as it is read, whatever is sought in it.

    Args:
        file: the member.
        name: its name in messages.
        note: called with the number of unpacked bytes, again and again. It may raise an error to stop.

    Raises:
        ImageError: (while reading) more than MAX_LISTED_BYTES must be unpacked.
    """
    return cast(BinaryIO, io.BufferedReader(_Kept(file, name, note), 1 << 16))


class _Kept(io.RawIOBase):
    def __init__(self, file: Any, name: str, note: Callable[[int], None]) -> None:
        self._file, self.name, self._note = file, name, note  # pydicom asks for the name
        self._kept, self._position, self._is_whole = bytearray(), 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._keep(MAX_LISTED_BYTES + 1)
        self._position = max(0, offset + (0, self._position, len(self._kept))[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._keep(self._position + len(buffer))
        with memoryview(self._kept) as kept:  # a slice of it copies nothing
            content = kept[self._position : self._position + len(buffer)]
            buffer[: len(content)] = content
            num_bytes = len(content)
            content.release()
        self._position += num_bytes
        return num_bytes

    def _keep(self, end: int) -> None:
        """Unpack up to a position, or up to the end of the member."""
        while len(self._kept) < end and not self._is_whole:
            if len(self._kept) > MAX_LISTED_BYTES:
                raise ImageError(
                    "too_large",
                    f"{self.name} must be unpacked beyond {MAX_LISTED_BYTES:,} bytes to list its images, which are "
                    "the most; unpack the archive before the run",
                )
            data = self._file.read(_SKIPPED)
            self._is_whole = not data
            self._note(len(data))
            self._kept += data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_gzip(file: Any, note: Callable[[int], None] = lambda num_bytes: None) -> BinaryIO:
    """Return the unpacked content of a gzip file. It reads lazily; seeking backwards unpacks from the start.

    Python's GzipFile reads a name in a header byte by byte, and empty members one after the other without an end. Here
    zlib reads the headers, and content that packs nothing is an error.

    Args:
        file: the packed file.
        note: called with the number of unpacked bytes, again and again. It may raise an error to stop.

    Raises:
        gzip.BadGzipFile: (while reading) a header is damaged, also of bytes behind the end.
        zlib.error: the packed bytes are damaged.
        EOFError: the file ends early.
    """
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, note), 1 << 16))


class _Unpacked(io.RawIOBase):
    def __init__(self, file: Any, note: Callable[[int], None]) -> None:
        self._file, self._note, self._start = file, note, file.tell()
        self._begin()

    def _begin(self) -> None:
        self._file.seek(self._start)
        self._position = self._num_empty = self._num_idle_bytes = 0
        self._packed = b""
        self._member: Any = None  # the decompressor of a member of the file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the size of packed content is unknown")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target < self._position:
            self._begin()
        while self._position < target and self._unpack(min(target - self._position, _SKIPPED)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._unpack(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _unpack(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end of the file."""
        while most and (self._member or self._find_member()):
            if not self._packed:
                self._packed = self._read()
                if not self._packed:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            content: bytes = self._member.decompress(self._packed, most)
            self._packed = self._member.unconsumed_tail
            if self._member.eof:
                self._packed, self._member = self._member.unused_data, None
                self._num_empty += 1
            if content:
                self._position += len(content)
                self._num_empty = self._num_idle_bytes = 0
                self._note(len(content))
                return content
            if self._num_empty > _MOST_EMPTY or self._num_idle_bytes > _MOST_HEADER_BYTES:
                raise gzip.BadGzipFile("it goes on without content")
        return b""

    def _read(self) -> bytes:
        data = bytes(self._file.read(_BLOCK))
        self._num_idle_bytes += len(data)
        return data

    def _find_member(self) -> bool:
        """Begin the next member, behind zeros that pad the one before. Return whether there is one."""
        is_first = self._position == 0 and not self._num_empty
        while not self._packed or not (is_first or self._packed.strip(b"\0")):
            self._packed, self._num_idle_bytes = self._read(), 0
            if not self._packed:
                return False
        self._packed = self._packed if is_first else self._packed.lstrip(b"\0")
        if len(self._packed) == 1:
            self._packed += self._read()
        if self._packed[:2] != b"\x1f\x8b":
            raise gzip.BadGzipFile(f"Not a gzipped file ({self._packed[:2]!r})")
        self._member = zlib.decompressobj(_GZIP)
        return True
