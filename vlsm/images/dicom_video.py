"""Frames of DICOM objects in time: the video stream in an object, and the choice of frames in a loop."""

import io
import itertools
import struct
from collections.abc import Sequence
from typing import BinaryIO, cast

from pydicom.dataset import Dataset

from vlsm.errors import BeyondLimitError
from vlsm.images import video
from vlsm.images.dicom_form import read_number, read_numbers
from vlsm.images.dicom_header import UNDEFINED_LENGTH, read_header
from vlsm.images.spans import Spans
from vlsm.limits import MAX_IMAGES

_PIXEL_DATA = 0x7FE00010
_ITEM = 0xE000FFFE


def choose_frames(rule: str | None, num_frames: int, header: Dataset) -> Sequence[int]:
    """Return the numbers of the chosen frames of an object: all without a rule, or if the rule needs times it lacks.

    Args:
        rule: the setting `frames`.
        num_frames: of the object.
        header: may have frame times or rates.
    """
    if rule is None:
        return range(num_frames)
    steps_ms = [step or 0.0 for step in read_numbers(header, "FrameTimeVector")]
    if len(steps_ms) != num_frames:
        rate = read_number(header, "CineRate") or read_number(header, "RecommendedDisplayFrameRate")
        step_ms = read_number(header, "FrameTime") or (1000 / rate if rate else 0.0)
        steps_ms = [step_ms] * num_frames
    if sum(steps_ms) <= 0 and not rule.startswith("every"):
        return range(num_frames)
    return video.choose_frames(rule, [time_ms / 1000 for time_ms in itertools.accumulate(steps_ms)])


def open_stream(file: BinaryIO, name: str) -> BinaryIO:
    """Return the video stream of an object as a file: its fragments, without the headers between them. It reads lazily.

    Args:
        file: the object.
        name: its name in error messages.
    """
    found: list[tuple[int, int]] = []

    def is_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag == _PIXEL_DATA:
            found.append((file.tell(), length))
        return bool(found)

    file.seek(0)
    read_header(file, is_pixels, [], 0, name)
    offset, length = found[0] if found else (0, 0)
    spans = [(offset, length)] if length != UNDEFINED_LENGTH else _find_fragments(file, offset)
    return cast(BinaryIO, io.BufferedReader(Spans(file, spans), 1 << 16))


def _find_fragments(file: BinaryIO, offset: int) -> list[tuple[int, int]]:
    """Return the offset and length of each fragment; the first item is a table of offsets (PS3.5, A.4)."""
    spans: list[tuple[int, int]] = []
    while True:
        file.seek(offset)
        head = file.read(8)
        if len(head) < 8 or struct.unpack("<II", head)[0] != _ITEM:
            return spans[1:]
        length = struct.unpack("<II", head)[1]
        spans.append((offset + 8, length))
        if len(spans) > MAX_IMAGES:
            raise BeyondLimitError(f"its stream has more than {MAX_IMAGES:,} fragments, which are the most")
        offset += 8 + length
