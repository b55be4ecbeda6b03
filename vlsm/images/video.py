"""The frames of videos: .mp4, .avi, .mov, .mkv, .webm, .mpg, and the streams in DICOM objects.

PyAV (BSD-3-Clause) reads them. It comes with the extra `vlsm[video]`, because its wheels contain FFmpeg (LGPL) with
x264 and x265 (GPL).

`frame=N` is the N-th frame in the order of presentation, from 0. A frame is shown upright and with square pixels, as
the stream's rotation and pixel aspect state.
"""

import contextlib
import io
import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vlsm.errors import ImageError
from vlsm.images.grey_levels import STORED, Decoded
from vlsm.images.mp4_boxes import check_frames
from vlsm.limits import MAX_IMAGES

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

DEFAULT_FRAMES = "1 per second"
_TOLERANCE_S = 1e-3  # containers round times to milliseconds
_MAX_LISTED_PIXELS = 1 << 27  # FFmpeg's own limit is about as large
_ALIGNMENT_PIXELS = 1 << 20  # FFmpeg counts the padding of rows too
_MAX_READY = 32  # decoded frames that wait for their turn
# FFmpeg reads no playlist, which could name any file of the machine, and opens nothing beside the given bytes.
_CONTAINERS = {"format_whitelist": "mov,avi,matroska,webm,mpeg,mpegts,mpegvideo,h264,hevc", "protocol_whitelist": ""}


def choose_frames(rule: str, times_s: Sequence[float]) -> list[int]:
    """Return the numbers of the chosen frames.

    Args:
        rule: "every N", or "N per second": the first frame, and then the first frame at or after each 1/N second.
        times_s: the time of each frame in seconds, in order.
    """
    words = rule.split()
    if words[0] == "every":
        return list(range(0, len(times_s), int(words[1])))
    chosen, due, rate = [], 0.0, float(words[0])
    for number, time_s in enumerate(times_s):
        passed_s = time_s - times_s[0] + _TOLERANCE_S
        if passed_s >= due:
            chosen.append(number)
            due = (passed_s * rate // 1 + 1) / rate
    return chosen


class Video:
    """An opened video.

    Frames are decoded in order. A request for a later frame goes on, or jumps to the last keyframe before it. Chosen
    frames that are passed stay ready for the next requests. Threads may share a Video.

    Args:
        file: the video; it must be seekable.
        name: its name in error messages.
        max_pixels: videos with larger frames are refused.
        rule: which frames are wanted, as for `choose_frames`.

    Attributes:
        size: (height, width) of the shown frames in pixels.
        times_s: the time of each frame in seconds.

    Raises:
        ImageError: "unreadable": PyAV is not installed. "corrupt", "too_large".
    """

    def __init__(self, file: BinaryIO, name: str, max_pixels: int, rule: str) -> None:
        self._av = import_av(name)
        self._file, self._name, self._max_pixels = file, name, max_pixels
        self._lock = threading.Lock()
        self._ready: dict[int, np.ndarray] = {}
        with video_errors(name):
            check_frames(file, name)
            self._open()
            self._pts, self.times_s, self._keys = _read_times(self._container, self._stream)
            self._open()
            self.size = self._shown_size()
            self._open()
        self._num_frames = len(self.times_s)
        self._wanted = set(choose_frames(rule, self.times_s))

    def frame(self, number: int) -> np.ndarray:
        """Return a frame, (H, W, 3) uint8, RGB.

        Raises:
            ImageError: "corrupt": there is no such frame, or it is damaged.
        """
        if not 0 <= number < self._num_frames:
            raise ImageError("corrupt", f"{self._name} has {self._num_frames:,} frames and no frame {number}")
        with self._lock, video_errors(self._name):
            if number in self._ready:
                return self._ready.pop(number)
            for start in self._starts(number):
                self._jump(start)
                image, is_late = self._decode_to(number)
                if image is not None:
                    return image
                if not is_late:
                    break
        raise ImageError("corrupt", f"{self._name}: frame {number} cannot be decoded, or the video ends before it")

    def _starts(self, number: int) -> Iterator[int | None]:
        """Yield frames to start decoding at, the best first; None to go on."""
        keys = [key for key in self._keys if key <= number][::-1]
        if self._next <= number and (not keys or keys[0] <= self._next):
            yield None
        yield from keys[:2]  # the container may jump to a keyframe that is shown too late
        yield 0

    def _jump(self, start: int | None) -> None:
        if start == 0:
            self._open()
        elif start is not None:
            self._container.seek(self._pts[start], stream=self._stream)
            self._frames, self._next = self._decode(), start

    def _decode_to(self, number: int) -> tuple[np.ndarray | None, bool]:
        """Return a frame at or after the current position, or None if it does not come.

        Also return whether decoding began too late for it.
        """
        first, is_late = self._next, True
        for frame in self._frames:
            position = self._position_of(frame)
            if position is None or position < first:  # frames before a keyframe lack those they depend on
                continue
            self._next = position + 1
            if position == number:
                return self._show(frame), False
            if position > number:
                return None, is_late
            is_late = False
            if position in self._wanted:
                self._keep(position, frame)
        if not self._keys:
            self._num_frames = self._next
        self._next = len(self._pts)
        return None, is_late

    def _position_of(self, frame: Any) -> int | None:
        """Return the number of a frame, or None if no packet announced it."""
        if not self._keys:  # the container states no times: frames are counted
            return self._next
        position = bisect_left(self._pts, frame.pts) if frame.pts is not None else len(self._pts)
        return position if position < len(self._pts) and self._pts[position] == frame.pts else None

    def _keep(self, position: int, frame: Any) -> None:
        with contextlib.suppress(ImageError):  # a request for this frame will raise it
            self._ready[position] = self._show(frame)
        while len(self._ready) > _MAX_READY:
            del self._ready[next(iter(self._ready))]

    def _open(self) -> None:
        self._file.seek(0)
        self._container = self._av.open(self._file, container_options=_CONTAINERS)
        self._stream = video_stream(self._container, self._name)
        self._stream.codec_context.options = {"max_pixels": str(2 * self._max_pixels + _ALIGNMENT_PIXELS)}
        self._stream.codec_context.thread_count = 1  # a task has one CPU
        self._frames, self._next = self._decode(), 0

    def _decode(self) -> Iterator[Any]:
        """Yield decoded frames. Packets that cannot be decoded are skipped."""
        for packet in self._container.demux(self._stream):
            try:
                yield from packet.decode()
            except self._av.error.InvalidDataError:
                continue

    def _shown_size(self) -> tuple[int, int]:
        context = self._stream.codec_context
        width, height = self._square(context.width, context.height)
        if height * width > self._max_pixels:
            raise ImageError(
                "too_large",
                f"{self._name} is {width} x {height} = {height * width:,} pixels; max_pixels is {self._max_pixels:,}",
            )
        if not height * width:
            raise ImageError("corrupt", f"{self._name} has frames of no size")
        if (first := next(self._decode(), None)) is None:
            return height, width
        width, height = self._square(first.width, first.height)
        return (width, height) if first.rotation % 180 else (height, width)  # only frames state their rotation

    def _square(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of a frame with square pixels, none smaller than before."""
        aspect = self._stream.sample_aspect_ratio or 1
        return (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))

    def _show(self, frame: Any) -> np.ndarray:
        if frame.is_corrupt:
            raise ImageError("corrupt", f"{self._name}: a frame is damaged")
        width, height = self._square(frame.width, frame.height)
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        if pixels.shape[:2] != self.size:
            raise ImageError("corrupt", f"{self._name}: the size of a frame is not that of the video")
        return pixels


@contextlib.contextmanager
def video_errors(name: str) -> Iterator[None]:
    """Turn every error into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # damage causes errors of any type
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ImageError("corrupt", f"{name} cannot be read as a video: {reason}") from error


def video_stream(container: Any, name: str) -> Any:
    """Return the video stream of an opened container that a player would show.

    Raises:
        ImageError: "corrupt": there is none. "unreadable": FFmpeg has no decoder for it.
    """
    if (stream := container.streams.best("video")) is None:
        raise ImageError("corrupt", f"{name} has no video stream")
    if stream.codec_context is None:
        raise ImageError("unreadable", f"{name}: there is no decoder for its video stream")
    return stream


def import_av(name: str) -> Any:
    """Return PyAV.

    Raises:
        ImageError: "unreadable": it is not installed.
    """
    try:
        import av
    except ImportError:
        raise ImageError("unreadable", f"{name} is a video; reading it needs `pip install 'vlsm[video]'`") from None
    return av


def _read_times(container: Any, stream: Any) -> tuple[list[Any], list[float], list[int]]:
    """Return the presentation times of all frames, in the stream's unit and in seconds, and the numbers of keyframes.

    Nothing is decoded: each packet holds a frame. Packets that are not shown, because the container cuts them off or a
    keyframe is missing before them, have no number. Without times there are no keyframes, and the rate is even.
    """
    demuxed = itertools.islice(container.demux(stream), MAX_IMAGES)
    packets = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in demuxed if packet.size]
    # The times in an .avi are those of decoding.
    if container.format.name == "avi" or len({pts for pts, _, _ in packets} - {None}) < len(packets):
        return [None] * len(packets), [number / _rate_of(stream) for number in range(len(packets))], []
    first = next((pts for pts, is_key, _ in packets if is_key), np.inf)
    shown = sorted((pts, is_key) for pts, is_key, is_cut in packets if not is_cut and pts >= first)
    times_s = [float(pts * stream.time_base) for pts, _ in shown]
    return [pts for pts, _ in shown], times_s, [number for number, (_, is_key) in enumerate(shown) if is_key]


def _read_index(stream: Any) -> list[float] | None:
    """Return the time of each frame in seconds by the index of the container, or None if the index does not tell.

    The index has times of decoding. They tell the times of presentation only if all frames are equally long.
    """
    if not 1 < stream.frames == len(stream.index_entries) <= MAX_IMAGES or stream.time_base is None:
        return None
    times = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    steps = np.diff(times)
    return [float(time * stream.time_base) for time in times] if len(steps) and np.ptp(steps) <= 1 else None


def _rate_of(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
) -> tuple[Sequence[str | None], tuple[int, int]]:
    """The chosen frames of a video, and their size; see `vlsm.images.formats.FormatModule`.

    The index of an .mp4 or .mov states the times of all frames. Other containers are read to their end.
    """
    rule = look.frames or DEFAULT_FRAMES
    av = import_av(name)
    with video_errors(name):
        check_frames(file, name)
    with video_errors(name), av.open(file, container_options=_CONTAINERS) as container:
        stream = video_stream(container, name)
        times_s = _read_index(stream)
        size = stream.codec_context.height, stream.codec_context.width
    if times_s is None or look.tile.size is not None:
        video = Video(file, name, _MAX_LISTED_PIXELS, rule)
        times_s, size = times_s or video.times_s, video.size
    if not times_s:
        raise ImageError("corrupt", f"{name} is a video without frames")
    return [f"frame={number}" for number in choose_frames(rule, times_s)], size


def open_images(data: bytes | BinaryIO, name: str, settings: "SegmentSettings") -> Callable[[str | None], Decoded]:
    """The frames of a video; see `vlsm.images.formats.FormatModule`."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    video = Video(file, name, settings.max_pixels, settings.frames or DEFAULT_FRAMES)

    return lambda selector: Decoded(video.frame(int((selector or "").partition("=")[2] or 0)), STORED)
