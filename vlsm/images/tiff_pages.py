"""Finds the pages of a TIFF file by their list, and reads nothing else of them.

tifffile loads every value of every page. Pages may share their values, so that its work grows with the square of a
file's size. It also runs in a circle for 100 pages, and takes a damaged list, or a store that fails, for the end.
"""

import struct
from typing import Any, BinaryIO

from vlsm.limits import MAX_IMAGES

_REDUCED_OR_MASK = 0b101  # TIFF 6.0, tag NewSubfileType
_SUBFILE_TYPE = 254
_MOST_TAGS = 4096  # of a page; tifffile reads no more
_SIZES = {1: 1, 3: 2, 4: 4, 16: 8}  # bytes of a number, by the type of its tag


def find_pages(file: BinaryIO, first: int, sizes: Any) -> list[bool]:
    """Return for each page, up to one that is listed twice, whether it is an image: no mask and no reduced copy.

    Each page is read once, up to the offset of the next one: a seek and a read.

    Args:
        file: the file.
        first: offset of the first page.
        sizes: tifffile's description of the numbers in the file.

    Raises:
        ValueError: the list of pages is damaged, or there are more than MAX_IMAGES.
    """
    offset, seen, are_images = first, set[int](), list[bool]()
    while offset and offset not in seen:
        if len(seen) == MAX_IMAGES:
            raise ValueError(f"it has more than {MAX_IMAGES:,} pages, which are the most in one file")
        seen.add(offset)
        file.seek(offset)
        count = file.read(sizes.tagnosize)
        num_tags = struct.unpack(sizes.tagnoformat, count)[0] if len(count) == sizes.tagnosize else 0
        if num_tags > _MOST_TAGS:
            raise ValueError(f"page {len(seen) - 1} states {num_tags:,} tags; {_MOST_TAGS:,} are the most")
        tags = file.read(num_tags * sizes.tagsize + sizes.offsetsize)
        if len(tags) < num_tags * sizes.tagsize + sizes.offsetsize:
            raise ValueError(f"its list of pages breaks off after page {len(seen) - 1}")
        are_images.append(not _subfile_type(tags[: -sizes.offsetsize], sizes) & _REDUCED_OR_MASK)
        (offset,) = struct.unpack(sizes.offsetformat, tags[-sizes.offsetsize :])
    return are_images


def _subfile_type(tags: bytes, sizes: Any) -> int:
    """Return the value of the tag NewSubfileType, 0 by default."""
    order = "little" if sizes.byteorder == "<" else "big"
    for start in range(0, len(tags), sizes.tagsize):
        code, kind = struct.unpack_from(f"{sizes.byteorder}HH", tags, start)
        if code == _SUBFILE_TYPE:
            value = start + (12 if sizes.is_bigtiff else 8)
            return int.from_bytes(tags[value : value + _SIZES.get(kind, 4)], order)  # type: ignore[arg-type]
    return 0


def start_at(data: bytes, page: Any) -> bytes:
    """Return a TIFF whose list of pages begins with a page of tifffile, so that a reader need not walk to it."""
    sizes = page.parent.tiff
    position = 8 if sizes.is_bigtiff else 4
    offset = struct.pack(sizes.offsetformat, page.offset)
    return b"".join([data[:position], offset, memoryview(data)[position + len(offset) :]])
