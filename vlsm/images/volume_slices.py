"""Decodes the slices of a volume file to 8 bits per channel, from its header and its values.

Values per voxel: real numbers are shown as they are. Complex numbers are shown as their magnitude. Three or four
unsigned bytes that follow each other in the file are a colour (the fourth is dropped). Any other components, and the
time points of a series, are volumes of their own: "volume=2,slice=17".
"""

import bz2
import io
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vlsm.errors import ImageError
from vlsm.images.grey_levels import STORED, Decoded, Levels, as_rgb, choose_levels, sample_values, show
from vlsm.images.gunzip import open_gzip
from vlsm.images.volumes import BZIP2, GZIP, TEXT, VolumeHeader, is_gzip, parse_selector

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings

_FIRST = "slice=0"


class VolumeImages:
    """The slices of one volume file, each as a viewer shows it: RGB, 8 bits per channel.

    Values are scaled by the header's slope and intercept. `vlsm.images.grey_levels` states the rule for black and
    white. All slices of a volume have the same levels. Colours stay unchanged.

    Args:
        header: of the file.
        data: the content of the file with the values.
        name: the file's name in error messages.
        settings: the limits `max_pixels` and `max_image_bytes` (of the unpacked values), and `window`.

    Raises:
        ImageError: "corrupt" or "too_large".
    """

    def __init__(self, header: VolumeHeader, data: bytes, name: str, settings: "SegmentSettings") -> None:
        self._header, self._name, self._window = header, name, settings.window
        self._levels: dict[int, Levels] = {}
        header.check(len(data), name)
        if header.num_bytes > settings.max_image_bytes:
            raise ImageError(
                "too_large",
                f"{name} has {header.num_bytes:,} uncompressed bytes; max_image_bytes is {settings.max_image_bytes:,}",
            )
        height, width = header.grid.slice_shape
        if height * width > settings.max_pixels:
            raise ImageError(
                "too_large",
                f"{name} is {width} x {height} = {height * width:,} pixels; max_pixels is {settings.max_pixels:,}",
            )
        start = len(data) - header.num_bytes if header.start is None else header.start
        content = _unpack(data, start, header, name)
        if content.nbytes < header.num_bytes:
            raise ImageError("corrupt", f"{name} has {content.nbytes:,} bytes; its header needs {header.num_bytes:,}")
        stored: np.ndarray = np.ndarray(header.sizes, header.dtype, content, header.offset, order="F")
        shape = (*header.grid.shape, header.grid.num_volumes)
        self._volumes = stored.transpose(header.order).reshape(shape, order="F")

    def decode(self, selector: str | None) -> Decoded:
        """Return one slice.

        Args:
            selector: "slice=17", or "volume=2,slice=17"; None for the first slice.

        Raises:
            ImageError: "corrupt": there is no such slice.
        """
        stored = self._slice(selector)
        if stored.dtype.names:
            return Decoded(np.stack([stored[channel] for channel in "RGB"], axis=-1), STORED)
        levels = self._levels_of(parse_selector(_FIRST if selector is None else selector)[0])
        return Decoded(as_rgb(show(self._scale(stored), levels)), levels.rule)

    def labels(self, selector: str | None) -> np.ndarray:
        """Return the labels of one slice, (H, W): its values with slope and intercept applied, never turned to grey.

        Args:
            selector: as for `decode`.

        Raises:
            ImageError: "corrupt": there is no such slice. "unreadable": its values are colours.
        """
        stored = self._slice(selector)
        if stored.dtype.names:
            raise ImageError("unreadable", f"{self._name} holds colours; they are no labels")
        has_scale = (self._header.slope, self._header.intercept) != (1, 0)
        return self._scale(stored) if has_scale or stored.dtype.kind == "c" else stored

    def _slice(self, selector: str | None) -> np.ndarray:
        try:
            return self._header.grid.slice_of(self._volumes, _FIRST if selector is None else selector)
        except LookupError:
            raise ImageError("corrupt", f"{self._name} has no {selector!r}") from None

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        """Return stored values with the header's slope and intercept applied, float of the same shape."""
        exact = np.complex128 if stored.dtype.kind == "c" else np.float32 if stored.dtype.itemsize <= 2 else np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            values: np.ndarray = stored.astype(exact)
            values *= self._header.slope
            values += self._header.intercept
            return np.abs(values) if values.dtype.kind == "c" else values

    def _levels_of(self, volume: int) -> Levels:
        if volume not in self._levels:
            values = self._scale(sample_values(self._volumes[..., volume]))
            self._levels[volume] = choose_levels(values, self._window, self._header.display_range)
        return self._levels[volume]


def make_openers(
    open_volume: Callable[[bytes, str, "SegmentSettings", bytes | None], VolumeImages],
) -> tuple[Callable[..., Callable[[str | None], Decoded]], Callable[..., Callable[[str | None], np.ndarray]]]:
    """Return the functions `open_images` and `open_labels` of a format of volumes; see `vlsm.images.formats`.

    Args:
        open_volume: opens a file. Its arguments are the content and the name of the file, the settings, and the content
            of a second file with the values, or None.
    """

    def open_images(
        data: bytes, name: str, settings: "SegmentSettings", values: bytes | None = None
    ) -> Callable[[str | None], Decoded]:
        return open_volume(data, name, settings, values).decode

    def open_labels(
        data: bytes, name: str, settings: "SegmentSettings", values: bytes | None = None
    ) -> Callable[[str | None], np.ndarray]:
        return open_volume(data, name, settings, values).labels

    return open_images, open_labels


def _unpack(data: bytes, start: int, header: VolumeHeader, name: str) -> memoryview:
    """Return at least the first `header.num_bytes` bytes of the data packed from `start` on, if there are as many.

    More than these bytes is never unpacked.
    """
    packed = memoryview(data)[start:]
    try:
        if header.encoding == GZIP and is_gzip(data[start : start + 2]):
            return memoryview(_gunzip(data, start, header.num_bytes))
        if header.encoding == GZIP:
            return memoryview(zlib.decompressobj().decompress(packed, header.num_bytes))
        if header.encoding == BZIP2:
            return memoryview(bz2.BZ2Decompressor().decompress(packed, header.num_bytes))
        if header.encoding == TEXT:
            numbers = bytes(packed).replace(b",", b" ")
            values = np.fromstring(numbers, header.dtype.newbyteorder("="), math.prod(header.sizes), sep=" ")
            return values.astype(header.dtype).data.cast("B")
    except (OSError, EOFError, ValueError, DeprecationWarning, zlib.error) as error:
        raise ImageError("corrupt", f"{name}: its packed data are damaged ({type(error).__name__})") from None
    return packed


def _gunzip(data: bytes, start: int, num_bytes: int) -> bytes:
    packed = io.BytesIO(data)  # without a copy of the data
    packed.seek(start)
    file = open_gzip(packed)
    content = file.read(num_bytes)
    file.read(1)  # zlib checks the checksum at the end of the file
    return content
