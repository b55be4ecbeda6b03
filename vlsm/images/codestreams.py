"""Checks the headers of JPEG and JPEG 2000 codestreams before a decoder written in C trusts them."""

import re
import struct
from collections.abc import Iterator
from typing import cast

_SOF3, _DHT, _EOI, _SOS = 0xC3, 0xC4, 0xD9, 0xDA
_HARMLESS = {0xDD, 0xFE, *range(0xE0, 0xF0)}  # restart interval, comment, application data


def codestream_size(encoded: bytes) -> tuple[int, int, int] | None:
    """Return the (height, width, components) in the header of a JPEG, JPEG-LS or JPEG 2000 codestream, or None."""
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
    """Return the (height, width, components) of the first frame header (ITU-T T.81, B.2.2), or None.

    Its marker is SOF0 to SOF15, without DHT, JPG and DAC, or SOF55 of JPEG-LS.
    """
    position = 2
    while encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # a fill byte before a marker
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return cast(tuple[int, int, int], struct.unpack_from(">HHB", encoded, position + 5))
        else:
            position += 2 + struct.unpack_from(">H", encoded, position + 2)[0]
    return None


def _jp2_codestream(encoded: bytes) -> int:
    """Return the offset of the codestream in a JP2 file, the content of its first jp2c box (ISO/IEC 15444-1, I.4)."""
    position = 0
    while encoded[position + 4 : position + 8] != b"jp2c":
        length = struct.unpack_from(">I", encoded, position)[0]
        if length < 8:
            raise IndexError
        position += length
    return position + 8


def check_lossless(encoded: bytes, bits_allocated: int) -> None:
    """Raise an error unless the bytes are a well-formed JPEG Lossless image with one scan (ITU-T T.81, annexes B, H).

    GDCM writes beyond its buffers if a table or the frame header is missing, doubled or of another JPEG process.

    Raises:
        ValueError: the image is not well-formed, or has more than one scan.
        struct.error: the image ends early.
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
                raise ValueError(f"{len(frames)} frame headers; there must be one")
            _check_scan(frames[0], content, tables, bits_allocated)
            # A scan may only contain restart markers; the next other marker must be the end of the image.
            next_marker = re.search(rb"\xff[^\x00\xd0-\xd7]", encoded[end:])
            if next_marker is None or next_marker[0][1] != _EOI:
                raise ValueError("the image does not end after its first scan")
            return
        elif marker not in _HARMLESS or (content[:5] == b"Adobe" and content[11:] not in (b"\0", b"\1")):
            raise ValueError("a marker of another JPEG process, or an unknown colour transform")
    raise ValueError("there is no scan")


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (marker, content, end offset) of each segment after the start of the image."""
    position = 2
    while encoded[position : position + 1] == b"\xff":
        marker, length = struct.unpack_from(">xBH", encoded, position)
        end = position + 2 + length
        if length < 2 or end > len(encoded):
            raise ValueError("a segment ends outside the image")
        yield marker, encoded[position + 4 : end], end
        position = end


def _huffman_tables(content: bytes) -> set[int]:
    """Return the numbers of the Huffman tables that a segment defines."""
    numbers = set()
    while content:
        number, counts = content[0], content[1:17]
        codes = sum(count << (16 - length) for length, count in enumerate(counts, start=1))
        values = content[17 : 17 + sum(counts)]
        if number > 3 or codes > 1 << 16 or not values or len(values) < sum(counts) or max(values) > 16:
            raise ValueError("a Huffman table is damaged")
        numbers.add(number)
        content = content[17 + sum(counts) :]
    return numbers


def _check_scan(frame: bytes, scan: bytes, tables: set[int], bits_allocated: int) -> None:
    """Raise a ValueError if a scan header does not match its frame header, the tables or the pixels' bits."""
    precision, count = frame[0], frame[5]
    if not bits_allocated - 8 < max(precision, 2) <= bits_allocated <= 16:
        raise ValueError(f"a precision of {precision} bits does not match {bits_allocated} allocated bits")
    if len(frame) != 6 + 3 * count or any(frame[7 + 3 * n] != 0x11 for n in range(count)):
        raise ValueError("the frame header is damaged, or its components have different sizes")
    components = [scan[1 + 2 * n : 3 + 2 * n] for n in range(count)]  # each an identifier and its table numbers
    if scan[0] != count or len(scan) != 4 + 2 * count or [pair[0] for pair in components] != list(frame[6::3]):
        raise ValueError("the components of the scan are not those of the frame header")
    if any(pair[1] & 0x0F or pair[1] >> 4 not in tables for pair in components):
        raise ValueError("a Huffman table is missing")
    if not 1 <= scan[-3] <= 7 or scan[-2] or scan[-1] >> 4 or scan[-1] >= precision:
        raise ValueError("the predictor or the point transform is invalid")
