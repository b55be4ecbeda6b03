"""What JPEG and JPEG 2000 codestreams tell of themselves, looked at before a decoder written in C believes it."""

import re
import struct
from collections.abc import Iterator
from typing import cast

_SOF3, _DHT, _EOI, _SOS = 0xC3, 0xC4, 0xD9, 0xDA
_HARMLESS = {0xDD, 0xFE, *range(0xE0, 0xF0)}  # restart interval, comment, application data


def codestream_size(encoded: bytes) -> tuple[int, int, int] | None:
    """The (height, width, components) that a JPEG, JPEG-LS or JPEG 2000 codestream tells; None where it tells none."""
    try:
        if encoded[:2] == b"\xff\xd8":
            return _jpeg_size(encoded)
        start = _jp2_codestream(encoded) if encoded[4:8] == b"jP  " else 0
        if encoded[start : start + 4] != b"\xff\x4f\xff\x51":
            return None
        width, height, left, top = struct.unpack_from(">4I", encoded, start + 8)
        return height - top, width - left, struct.unpack_from(">H", encoded, start + 40)[0]
    except (struct.error, IndexError):
        return None


def _jpeg_size(encoded: bytes) -> tuple[int, int, int] | None:
    """Of the frame header (ITU-T T.81, B.2.2): SOF0 to SOF15 without DHT, JPG and DAC, and JPEG-LS's SOF55."""
    place = 2
    while encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # fill bytes may stand before a marker
            place += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return cast(tuple[int, int, int], struct.unpack_from(">HHB", encoded, place + 5))
        else:
            place += 2 + struct.unpack_from(">H", encoded, place + 2)[0]
    return None


def _jp2_codestream(encoded: bytes) -> int:
    """Where the codestream of a JP2 file begins (ISO/IEC 15444-1, I.4): inside the first box of type jp2c."""
    place = 0
    while encoded[place + 4 : place + 8] != b"jp2c":
        length = struct.unpack_from(">I", encoded, place)[0]
        if length < 8:
            raise IndexError
        place += length
    return place + 8


def check_lossless(encoded: bytes, bits_allocated: int) -> None:
    """Refuse what is not a well-formed JPEG Lossless image of one scan (ITU-T T.81, annexes B and H).

    GDCM writes beyond its buffers where the tables or the frame header are missing, doubled or of another process.

    Raises:
        ValueError: it is not.
        struct.error: it ends early.
    """
    tables: set[int] = set()
    frames: list[bytes] = []
    for marker, content, end in _segments(encoded):
        if marker == _DHT:
            tables |= _huffman_tables(content)
        elif marker == _SOF3:
            frames.append(content)
        elif marker == _SOS:
            if len(frames) != 1:
                raise ValueError("not one frame header")
            _check_scan(frames[0], content, tables, bits_allocated)
            # of markers inside of the scan there are only restarts, and then its end
            found = re.search(rb"\xff[^\x00\xd0-\xd7]", encoded[end:])
            if found is None or found[0][1] != _EOI:
                raise ValueError("not one scan")
            return
        elif marker not in _HARMLESS or (content[:5] == b"Adobe" and content[11:] not in (b"\0", b"\1")):
            raise ValueError("a marker of another process, or of a colour transform that is not known")
    raise ValueError("no scan")


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The (marker, content, end) of each segment after the start of image."""
    place = 2
    while encoded[place : place + 1] == b"\xff":
        marker, length = struct.unpack_from(">xBH", encoded, place)
        end = place + 2 + length
        if length < 2 or end > len(encoded):
            raise ValueError("a segment ends outside")
        yield marker, encoded[place + 4 : end], end
        place = end


def _huffman_tables(content: bytes) -> set[int]:
    """The numbers of the tables that a segment defines."""
    numbers = set()
    while content:
        number, counts = content[0], content[1:17]
        codes = sum(count << (16 - length) for length, count in enumerate(counts, start=1))
        values = content[17 : 17 + sum(counts)]
        if number > 3 or codes > 1 << 16 or not values or len(values) < sum(counts) or max(values) > 16:
            raise ValueError("a damaged table")
        numbers.add(number)
        content = content[17 + sum(counts) :]
    return numbers


def _check_scan(frame: bytes, scan: bytes, tables: set[int], bits_allocated: int) -> None:
    precision, count = frame[0], frame[5]
    if not bits_allocated - 8 < max(precision, 2) <= bits_allocated <= 16:
        raise ValueError("a precision that is not that of the pixels")
    if len(frame) != 6 + 3 * count or any(frame[7 + 3 * n] != 0x11 for n in range(count)):
        raise ValueError("a damaged frame header, or components of several sizes")
    selected = [scan[1 + 2 * n : 3 + 2 * n] for n in range(count)]
    if scan[0] != count or len(scan) != 4 + 2 * count or [one[0] for one in selected] != list(frame[6::3]):
        raise ValueError("a scan of other components")
    if any(one[1] & 0x0F or one[1] >> 4 not in tables for one in selected):
        raise ValueError("a missing table")
    if not 1 <= scan[-3] <= 7 or scan[-2] or scan[-1] >> 4 or scan[-1] >= precision:
        raise ValueError("no such predictor")
