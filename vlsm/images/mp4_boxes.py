"""Checks the number of frames that an .mp4 or .mov states, before FFmpeg allocates a place for each.

A table of equally large samples has 20 bytes, whatever their number. FFmpeg would take 2 GB for a file of 2 kB.

Source: ISO/IEC 14496-12, 4.2 (boxes), 8.6.1.2 (stts), 8.7.3 (stsz, stz2), 8.8.8 (trun).
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vlsm.errors import BeyondLimitError
from vlsm.limits import MAX_IMAGES

_TYPES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"sidx", b"meta")
_CONTAINERS = (
    b"moov",
    b"moof",
    b"trak",
    b"traf",
    b"mdia",
    b"minf",
    b"stbl",
    b"mvex",
    b"edts",
    b"udta",
    b"wave",
    b"dinf",
)
_MOST_BOXES = 1 << 20
_MOST_SAMPLES = 4 * MAX_IMAGES  # of a track: sound has more samples than a video has frames


@dataclass
class _Facts:
    """What the boxes of a track, or of the fragments, state so far."""

    num_samples: int = 0  # of the track
    num_in_fragments: int = 0
    is_even: bool = False  # whether all samples of the track have the length 1, as those of uncompressed sound
    is_sound: bool = False

    @property
    def most(self) -> int:
        """The number of samples that FFmpeg makes a place for."""
        return max(0 if self.is_sound and self.is_even else self.num_samples, self.num_in_fragments)


def check_frames(file: BinaryIO, name: str) -> None:
    """Raise a BeyondLimitError if an .mp4 or .mov states more samples than a video has; other files pass.

    Uncompressed sound has a sample for each of its values. FFmpeg reads it in chunks, so that they do not count.

    Args:
        file: the video; it is read where boxes begin.
        name: its name in messages.
    """
    file.seek(0)
    if file.read(8)[4:] in _TYPES:
        facts = _Facts()
        for kind, inner in (*_boxes(file, file.seek(0, io.SEEK_END)), (b"trak", 0)):
            if kind == b"trak" and facts.most > _MOST_SAMPLES:  # the track before it is complete
                raise BeyondLimitError(f"{name} states {facts.most:,} frames; {_MOST_SAMPLES:,} are the most")
            if kind == b"trak":
                facts = _Facts(num_in_fragments=facts.num_in_fragments)
            _note(file, kind, inner, facts)
    file.seek(0)


def _boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield the type of each box, and the position of its content, in their order. Containers come before their boxes.

    As in FFmpeg, a box without a valid size ends with its container.
    """
    start, ends = 0, [end]
    for _ in range(_MOST_BOXES):
        while len(ends) > 1 and start + 8 > ends[-1]:
            start = ends.pop()
        file.seek(start)
        head = file.read(16)
        if start + 8 > end or len(head) < 8:
            return
        size, kind = struct.unpack_from(">I4s", head)
        inner = start + 8
        if size == 1 and len(head) == 16:
            size, inner = struct.unpack_from(">Q", head, 8)[0], start + 16
        yield kind, inner
        box_end = min(ends[-1], start + size) if size >= inner - start else ends[-1]
        if kind in _CONTAINERS:
            ends.append(box_end)
            box_end = inner
        start = box_end


def _note(file: BinaryIO, kind: bytes, inner: int, facts: _Facts) -> None:
    """Add what a box states to the facts."""
    if kind not in (b"stsz", b"stz2", b"stts", b"hdlr", b"trun"):
        return
    file.seek(inner)
    _, first, second, third = struct.unpack(">4I", file.read(16).ljust(16, b"\0"))
    if kind in (b"stsz", b"stz2"):
        facts.num_samples = max(facts.num_samples, second)
    elif kind == b"stts":
        facts.is_even = first == 1 and third == 1
    elif kind == b"hdlr":
        facts.is_sound = struct.pack(">I", second) == b"soun"
    elif kind == b"trun":
        facts.num_in_fragments += first
