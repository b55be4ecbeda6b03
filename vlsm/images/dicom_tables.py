"""Lookup tables and palettes of DICOM objects.

pydicom's `apply_color_lut`, `apply_voi` and `apply_modality_lut` are not used, because their values differ for tables
that devices write: big-endian tables, 8-bit entries in 16-bit words, an odd number of 8-bit entries, entries of 10 to
15 bits in a modality table, signed values below the first entry, segmented palettes without a limit.
"""

from typing import Any, NamedTuple

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from vlsm.images.dicom_form import HeaderError, read_numbers

_COLOURS = ("Red", "Green", "Blue")
_MAX_ENTRIES = 1 << 16


class Table(NamedTuple):
    """A lookup table.

    Attributes:
        entries: (N,) unsigned, or (N, 3) for the colours of a palette.
        first: the value that the first entry belongs to.
        depth: bits of an entry.
    """

    entries: np.ndarray
    first: int
    depth: int

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Return the entries of values of any shape. Values outside have the first or the last entry."""
        first = self.first
        if first >= 1 << 15 and values.size and values.min() < 0:  # a negative number that was written as unsigned
            first -= 1 << 16
        exact: np.ndarray = values.astype(np.int32 if values.dtype.itemsize <= 2 else np.float64)
        np.subtract(exact, first, out=exact)
        return self.entries[np.clip(exact, 0, len(self.entries) - 1, out=exact).astype(np.intp, copy=False)]


def read_table(item: Dataset, syntax: uid.UID) -> Table:
    """Return the table of an item of a modality or VOI LUT sequence (DICOM PS3.3, C.11.1, C.11.2).

    Raises:
        HeaderError: the table does not match its descriptor.
    """
    num_entries, first, depth = _read_descriptor(item, "LUTDescriptor")
    entries = _read_entries(item, "LUTData", num_entries, syntax)
    if not 1 <= depth <= 16:
        raise HeaderError("its LUTDescriptor states no depth of 1 to 16 bits")
    return Table(entries, first, _true_depth(depth, entries))


def has_supplemental_palette(dataset: Dataset) -> bool:
    """Return whether values from the palette's first entry on are colours, and lower ones grey (PS3.3, C.7.6.19)."""
    is_mixed = str(dataset.get("PixelPresentation") or "").strip() in ("COLOR", "MIXED")
    return is_mixed and "RedPaletteColorLookupTableDescriptor" in dataset


def first_of_palette(dataset: Dataset) -> int:
    """Return the value that the first entry of a palette belongs to."""
    return _read_descriptor(dataset, "RedPaletteColorLookupTableDescriptor")[1]


def paint_palette(stored: np.ndarray, dataset: Dataset, syntax: uid.UID) -> np.ndarray:
    """Return the palette colours of stored indices (H, W) as (H, W, 3) uint8.

    Entries of 16 bits are scaled to 8 bits. If all of them are below 256, they are 8-bit entries in 16-bit words.

    Raises:
        HeaderError: a palette does not match its descriptor, or has more than 65,536 colours.
    """
    palettes = [_read_palette(dataset, colour, syntax) for colour in _COLOURS]
    if len({(len(palette.entries), palette.first) for palette in palettes}) > 1:
        raise HeaderError("its three palettes have different lengths or first values")
    depth = max(palette.depth for palette in palettes)
    colours = np.stack([palette.entries >> (depth - 8) for palette in palettes], axis=-1)
    return palettes[0]._replace(entries=colours.astype(np.uint8)).look_up(stored)


def _read_palette(dataset: Dataset, colour: str, syntax: uid.UID) -> Table:
    """Return the palette of one colour. Its depth is 8 or 16."""
    keyword = f"{colour}PaletteColorLookupTableData"
    num_entries, first, depth = _read_descriptor(dataset, f"{colour}PaletteColorLookupTableDescriptor")
    if keyword in dataset:
        entries = _read_entries(dataset, keyword, num_entries, syntax)
    else:
        entries = _expand(dataset[f"Segmented{keyword}"].value, depth, syntax)
    return Table(entries, first, 8 if _true_depth(depth, entries) <= 8 else 16)


def _read_descriptor(item: Dataset, keyword: str) -> tuple[int, int, int]:
    """Return the (number of entries, first value, depth in bits) of a table."""
    numbers = read_numbers(item, keyword)
    if len(numbers) != 3 or None in numbers:
        raise HeaderError(f"its {keyword} does not have three numbers")
    num_entries, first, depth = (int(number or 0) for number in numbers)
    return num_entries % _MAX_ENTRIES or _MAX_ENTRIES, first, depth


def _read_entries(item: Dataset, keyword: str, num_entries: int, syntax: uid.UID) -> np.ndarray:
    """Return the entries of a table, bytes or words: the length of the data tells which (PS3.3, C.7.6.3.1.6)."""
    content: Any = item[keyword].value
    if isinstance(content, bytes):
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        content = np.frombuffer(content, f"{order}u2", len(content) // 2)
        if len(content) < num_entries:  # bytes, in the order of the words
            content = content.astype("<u2").view(np.uint8)
    entries = np.atleast_1d(np.asarray(content))[:num_entries]
    if len(entries) < num_entries:
        raise HeaderError(f"its {keyword} does not match its descriptor")
    return entries


def _true_depth(depth: int, entries: np.ndarray) -> int:
    """Return the depth of entries in bits. It is 8 for words that only use their low bytes, despite the descriptor."""
    return min(depth, 8) if entries.dtype.itemsize == 1 or entries.max() < 256 else depth


def _expand(content: bytes, depth: int, syntax: uid.UID) -> np.ndarray:
    """Return the entries of a segmented palette (PS3.3, C.7.9.2)."""
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    words = np.frombuffer(content, np.uint8 if depth == 8 else f"{order}u2").tolist()
    entries: list[int] = []
    _expand_segments(words, 0, len(words), entries, 8 if depth == 8 else 16)
    return np.array(entries, np.uint8 if depth == 8 else np.uint16)


def _expand_segments(words: list[int], position: int, num_segments: int, entries: list[int], bits: int) -> None:
    """Append the entries of segments: discrete (0), linear (1), or copies (2) of segments at an offset in bytes.

    Raises:
        HeaderError: there are too many entries, as a segment of three words can stand for 65,535, or a copy of a copy.
    """
    is_copy = num_segments < len(words)
    while position + 1 < len(words) and num_segments:
        opcode, length, *_ = words[position : position + 2]
        position += 2
        num_segments -= 1
        if opcode == 0:
            entries += words[position : position + length]
            position += length
        elif opcode == 1:
            entries += np.rint(np.linspace(entries[-1], words[position], length + 1)[1:]).astype(int).tolist()
            position += 1
        elif opcode == 2 and not is_copy:
            width = 32 // bits
            offset = sum(word << bits * place for place, word in enumerate(words[position : position + width]))
            _expand_segments(words, offset * 8 // bits, min(length, len(words) - 1), entries, bits)
            position += width
        else:
            raise HeaderError("its palette has a segment of an unknown kind")
        if len(entries) > _MAX_ENTRIES:
            raise HeaderError(f"its palette has more than {_MAX_ENTRIES:,} colours")
