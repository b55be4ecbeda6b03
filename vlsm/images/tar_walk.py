"""A tar as tarfile reads it from header to header, within the limits of `vlsm.limits`."""

import contextlib
import tarfile
from collections.abc import Iterator
from typing import Any

from vlsm.errors import BeyondLimitError
from vlsm.limits import (
    MAX_MEMBERS,
    MAX_NAMES_BYTES,
    MAX_TAR_ATTRIBUTES,
    MAX_TAR_GAP_BYTES,
    MAX_TAR_HEADER_BYTES,
    MAX_TAR_HEADERS_BYTES,
)

_LARGEST_READ = 1 << 26  # bytes of a member at once


class Walk:
    """A file object that tarfile reads. It notes damage, and stops where a tar is beyond a limit.

    Attributes:
        marked_offset: offset at which the next member should begin. The block read there is kept.
        num_zeros: length in bytes of the run of zeros that was read last.
        problem: description of the first damage, or None.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._marked: bytes = b""
        self._is_inside = False  # of a member, whose bytes are no header
        self._num_members = self._num_name_bytes = self._num_gap_bytes = self._num_header_bytes = 0
        self.marked_offset, self.num_zeros = 0, 0
        self.problem: str | None = None

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. Raise a BeyondLimitError if they are too many."""
        if not self._is_inside and not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise BeyondLimitError(f"a header asks for {size:,} bytes; {MAX_TAR_HEADER_BYTES:,} are the most")
        if not 0 <= size <= _LARGEST_READ:  # the fault of this member
            raise ValueError(f"it asks for {size:,} bytes at once; {_LARGEST_READ:,} are the most")
        is_marked = self._file.tell() == self.marked_offset
        data = bytes(self._file.read(size))
        if is_marked:
            self._marked = data
        if not self._is_inside:
            self._note_header(data)
        return data

    def _note_header(self, data: bytes) -> None:
        self.num_zeros = 0 if not data or data.strip(b"\0") else self.num_zeros + len(data)
        self._num_gap_bytes += len(data)
        self._num_header_bytes += len(data)
        if self._num_gap_bytes > MAX_TAR_GAP_BYTES:
            raise BeyondLimitError(f"more than {MAX_TAR_GAP_BYTES:,} bytes follow each other without a member")
        if self._num_header_bytes > MAX_TAR_HEADERS_BYTES:
            raise BeyondLimitError(f"its headers have more than {MAX_TAR_HEADERS_BYTES:,} bytes, which are the most")

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position, and return it."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return int(self._file.tell())

    def seekable(self) -> bool:
        """Return True; tarfile asks."""
        return True

    def count(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Count a member. Raise a BeyondLimitError if there are too many, or their names are too long together."""
        self._num_gap_bytes = 0
        self._num_members += 1
        self._num_name_bytes += len(member.name)
        if self._num_members > MAX_MEMBERS:
            raise BeyondLimitError(f"it has more than {MAX_MEMBERS:,} members, which are the most")
        if self._num_name_bytes > MAX_NAMES_BYTES:
            raise BeyondLimitError(f"its names have more than {MAX_NAMES_BYTES:,} letters, which are the most")
        if len(archive.pax_headers) > MAX_TAR_ATTRIBUTES:
            raise BeyondLimitError(f"more than {MAX_TAR_ATTRIBUTES:,} attributes hold for all its members")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Read the bytes of a member in this context."""
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def check_gap(self, end: int, begin: int | None) -> None:
        """Note the problem if the next member does not begin at `end`, unless the tar has its end mark there."""
        if begin == end or self.problem:
            return
        block = self._marked[: tarfile.BLOCKSIZE]
        if not block:
            self.problem = "it breaks off between two members"
        elif block.strip(b"\0") and not _is_header(block):
            self.problem = f"the member at byte {end:,} cannot be read"


def _is_header(block: bytes) -> bool:
    """Return whether a block is a valid header, also of a kind that tarfile skips, such as git's global header."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
