"""Run lengths of Label Studio's brush: a stream of bits with the four channels (RGBA) of each pixel, row by row.

A header of 53 bits states the number of values, the bits of a value, and the bits of four kinds of counts. Blocks
follow. A block has a bit that tells a run from single values, two bits for the kind of its count, the count less 1, and
the value or the values.

Source: https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack, which Label Studio uses.
"""

import numpy as np

_CHANNELS = 4
_VALUE_BITS = 8
_COUNT_BITS = (3, 4, 8, 16)  # as Label Studio itself writes them
_HEADER_BITS = 32 + 5 + 4 * 4
_LONGEST = 1 << _COUNT_BITS[-1]  # values of one run
_OPAQUE = 128  # a stroke has soft edges: a pixel belongs to it if at least half of it is covered


def encode_brush(mask: np.ndarray) -> bytes:
    """Return the run lengths of a mask, (H, W) of 0 and 1: all four channels of a pixel are 0 or 255."""
    flat = np.ascontiguousarray(mask, np.uint8).ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size) * _CHANNELS
    num_blocks = -(-lengths // _LONGEST)
    values = np.repeat(flat[starts].astype(np.int64) * 255, num_blocks)
    counts = np.full(values.size, _LONGEST, np.int64)
    counts[np.cumsum(num_blocks) - 1] = lengths - (num_blocks - 1) * _LONGEST
    kinds = np.searchsorted([1 << bits for bits in _COUNT_BITS], counts)
    count_bits = np.array(_COUNT_BITS)[kinds]
    codes = ((0b100 | kinds) << count_bits | counts - 1) << _VALUE_BITS | values
    return _pack(_header(flat.size * _CHANNELS), codes, count_bits + 3 + _VALUE_BITS)


def _header(num_values: int) -> str:
    sizes = "".join(f"{bits - 1:04b}" for bits in _COUNT_BITS)
    return f"{num_values:032b}{_VALUE_BITS - 1:05b}{sizes}"


def _pack(header: str, codes: np.ndarray, num_bits: np.ndarray) -> bytes:
    """Return the bits of a header and of some codes, each with its number of bits, as bytes."""
    ends = np.cumsum(num_bits)
    shifts = np.repeat(ends, num_bits) - 1 - np.arange(ends[-1])
    bits = (np.repeat(codes, num_bits) >> shifts & 1).astype(np.uint8)
    return np.packbits(np.concatenate([np.array(list(header), np.uint8), bits])).tobytes()


def decode_brush(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of run lengths, (H, W) uint8 of 0 and 1: the pixels with an opacity of at least one half.

    Args:
        data: the bytes.
        size: (height, width) in pixels.

    Raises:
        ValueError: the run lengths are damaged, or are those of another size.
    """
    num_pixels = size[0] * size[1]
    num_values = num_pixels * _CHANNELS
    stated = int.from_bytes(data[:4])
    if len(data) * 8 < _HEADER_BITS or stated != num_values:
        pixels = f"{stated // _CHANNELS:,} pixels; the image has {num_pixels:,}"
        raise ValueError(f"the run lengths of the brush hold {pixels}")
    if len(data) > 3 * num_values + 64:  # no value takes more than 12 bits, even alone in its block
        raise ValueError("the run lengths of the brush are longer than its pixels")
    bits = _Bits(data)
    bits.position = 32
    if bits.read(5) + 1 != _VALUE_BITS:
        raise ValueError("the run lengths of the brush do not have values of 8 bits")
    count_bits = [bits.read(4) + 1 for _ in range(4)]
    opacity, place = np.zeros(num_pixels, np.uint8), 0
    while place < num_values:
        flags = bits.read(3)
        end = place + 1 + bits.read(count_bits[flags & 3])
        if end > num_values:
            raise ValueError("the run lengths of the brush are damaged: they have too many pixels")
        if flags & 4:
            opacity[place // _CHANNELS : end // _CHANNELS] = bits.read(_VALUE_BITS)
        else:  # the opacity is the last channel of a pixel
            opacity[place // _CHANNELS : end // _CHANNELS] = bits.read_bytes(end - place)[3 - place % 4 :: _CHANNELS]
        place = end
    return (opacity >= _OPAQUE).astype(np.uint8).reshape(size)


class _Bits:
    """Reads numbers from a stream of bits, the highest bit first.

    Args:
        data: the stream.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._end = data + bytes(5), len(data) * 8
        self.position = 0

    def read(self, num_bits: int) -> int:
        """Return the number in the next bits, at most 32."""
        start, offset = divmod(self.position, 8)
        self._advance(num_bits)
        return int.from_bytes(self._data[start : start + 5]) >> (40 - offset - num_bits) & ((1 << num_bits) - 1)

    def read_bytes(self, count: int) -> np.ndarray:
        """Return the next bytes, (count,) uint8. They may begin inside of a byte of the stream."""
        start, offset = divmod(self.position, 8)
        self._advance(8 * count)
        part = np.frombuffer(self._data, np.uint8, count + 1, start)
        return np.packbits(np.unpackbits(part)[offset : offset + 8 * count])

    def _advance(self, num_bits: int) -> None:
        self.position += num_bits
        if self.position > self._end:
            raise ValueError("the run lengths of the brush are damaged: they break off")
