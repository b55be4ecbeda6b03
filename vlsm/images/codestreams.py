"""Reads the headers of JPEG and JPEG 2000 codestreams before a decoder written in C trusts them."""

import struct
from collections.abc import Iterator

_SOF3, _SOF55, _SOS, _APP0, _APP14 = 0xC3, 0xF7, 0xDA, 0xE0, 0xEE
_FRAMES = {*range(0xC0, 0xD0), _SOF55} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, without DHT, JPG and DAC; JPEG-LS
_ADOBE_COLOURS = {0: "RGB", 1: "YCBCR"}
_COLOURS_BY_IDS = {b"RGB": "RGB", b"rgb": "RGB", b"\1\2\3": "YCBCR"}


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


def jpeg_colours(encoded: bytes) -> str | None:
    """Return the colours of a JPEG or JPEG-LS codestream with three components: "RGB" or "YCBCR"; None if unknown.

    This is libjpeg's inference: a JFIF segment means YCbCr. Else Adobe's segment states the transform. Else components
    with the ids R, G, B (or r, g, b) are RGB, and 1, 2, 3 are YCbCr; a lossless process has no default transform. None
    stands for all other ids, where libjpeg guesses.

    Source: libjpeg-turbo 3, default_decompress_parms in src/jdapimin.c.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    adobe, is_lossless = None, False
    try:
        for marker, content in _segments(encoded):
            if marker == _APP0 and content[:5] == b"JFIF\0":
                return "YCBCR"
            if marker == _APP14 and content[:5] == b"Adobe" and len(content) >= 12:
                adobe = _ADOBE_COLOURS.get(content[11], "YCBCR")
            if marker in _FRAMES:
                is_lossless = marker in (_SOF3, _SOF55)
                colours = adobe or _COLOURS_BY_IDS.get(content[6::3][:3])
                return None if is_lossless and not adobe and colours == "YCBCR" else colours
    except (struct.error, IndexError):
        pass
    return None


def is_lossless_jpeg(encoded: bytes) -> bool:
    """Return whether a JPEG codestream is of the lossless process (ITU-T T.81, annex H)."""
    return next((marker == _SOF3 for marker, _ in _segments(encoded) if marker in _FRAMES), False)


def has_jpeg_end(encoded: bytes) -> bool:
    """Return whether a JPEG codestream has an end marker behind its first scan. A thumbnail has one before it."""
    try:
        start = 2 + sum(4 + len(content) for _, content in _segments(encoded))
    except (struct.error, IndexError):
        return False
    return encoded.rfind(b"\xff\xd9") >= start


def without_metadata(encoded: bytes) -> bytes:
    """Return a JPEG codestream without comments and application segments, except those that state its colours.

    Raises:
        IndexError, struct.error: the codestream ends before its first scan.
    """
    kept, position = [encoded[:2]], 2
    for marker, content in _segments(encoded):
        start = encoded.index(bytes([0xFF, marker]), position)  # behind fill bytes
        position = start + 4 + len(content)
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE  # noqa: PLR2004 - APP0 to APP15, and COM
        if not is_metadata or marker in (_APP0, _APP14):
            kept.append(encoded[start:position])
    return b"".join([*kept, encoded[position:]])


def is_jpeg_ls(encoded: bytes) -> bool:
    """Return whether a codestream is JPEG-LS (ITU-T T.87), which begins as a JPEG does."""
    return next((marker == _SOF55 for marker, _ in _segments(encoded) if marker in _FRAMES), False)


def rare_jpeg_bits(encoded: bytes) -> int | None:
    """Return the bits of a value of a JPEG-LS, or of a JPEG with more than 8 bits; None for all other content."""
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        for marker, content in _segments(encoded):
            if marker in _FRAMES:
                return content[0] if marker == _SOF55 or content[0] > 8 else None
    except (struct.error, IndexError):
        pass
    return None


def has_component_transform(encoded: bytes) -> bool:
    """Return whether a JPEG 2000 codestream has the transform whose inverse gives RGB (ISO/IEC 15444-1, A.6.1)."""
    start = _jp2_codestream(encoded) if encoded[4:8] == b"jP  " else 0
    if encoded[start : start + 2] != b"\xff\x4f":
        return False
    position = start + 2
    while encoded[position : position + 2] not in (b"\xff\x52", b""):
        position += 2 + struct.unpack_from(">H", encoded, position + 2)[0]
    return encoded[position + 8 : position + 9] == b"\1"


def _jpeg_size(encoded: bytes) -> tuple[int, int, int] | None:
    """Return the (height, width, components) of the first frame header (ITU-T T.81, B.2.2), or None."""
    for marker, content in _segments(encoded):
        if marker in _FRAMES:
            height, width, components = struct.unpack_from(">HHB", content, 1)
            return height, width, components
    return None


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the (marker, content) of each segment before the first scan.

    Raises:
        IndexError, struct.error: the codestream ends early.
    """
    position, marker = 2, 0
    while encoded[position] == 0xFF and marker != _SOS:
        if (marker := encoded[position + 1]) == 0xFF:  # a fill byte before a marker
            position += 1
            continue
        length = struct.unpack_from(">H", encoded, position + 2)[0]
        yield marker, encoded[position + 4 : position + 2 + length]
        position += 2 + length


def _jp2_codestream(encoded: bytes) -> int:
    """Return the offset of the codestream in a JP2 file, the content of its first jp2c box (ISO/IEC 15444-1, I.4)."""
    position = 0
    while encoded[position + 4 : position + 8] != b"jp2c":
        length = struct.unpack_from(">I", encoded, position)[0]
        if length < 8:
            raise IndexError
        position += length
    return position + 8
