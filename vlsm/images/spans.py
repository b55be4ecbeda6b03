"""Parts of a file as a file."""

import io
import itertools
from bisect import bisect_right
from typing import Any, BinaryIO


class Spans(io.RawIOBase):
    """Some parts of a file, read as one file."""

    name = ""  # pydicom asks for it

    def __init__(self, file: BinaryIO, spans: list[tuple[int, int]]) -> None:
        self._file, self._spans, self._position = file, spans, 0
        self._starts = [0, *itertools.accumulate(length for _, length in spans)]

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        self._position = offset + (0, self._position, self._starts[-1])[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer up to the end of a part, and return the number of bytes."""
        number = bisect_right(self._starts, self._position) - 1
        if number >= len(self._spans):
            return 0
        inside = self._position - self._starts[number]
        offset, length = self._spans[number]
        self._file.seek(offset + inside)
        content = self._file.read(min(len(buffer), length - inside))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
