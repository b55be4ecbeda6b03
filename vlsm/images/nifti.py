"""Decodes the slices of NIfTI volumes to images in radiological view, and maps masks of slices back into volumes.

A volume is turned to the closest canonical orientation (nibabel: axes towards the patient's right, front and head)
without resampling. Axial slices have the front on top and the patient's right on the left. Coronal slices have the head
on top and the patient's right on the left. Sagittal slices have the head on top and the front on the left. Slices are
counted in canonical order: axial from the feet, coronal from the back, sagittal from the patient's left.
"""

import gzip
import io
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import nibabel as nib
import numpy as np

from vlsm.errors import ImageError
from vlsm.images.grey_levels import STORED, Decoded, Levels, Window, as_rgb, choose_levels, sample_values, show

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}

_GZIP = b"\x1f\x8b"
_MAX_RATIO = 1032  # deflate compresses 1,032-fold at most
_MAX_SLICES = 1_000_000  # in one file
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


@dataclass(frozen=True, eq=False)
class NiftiGrid:
    """The geometry of a NIfTI file: shape, orientation and slices.

    Args:
        shape: (X, Y, Z) of a volume as stored, in voxels.
        num_volumes: number of such volumes in the file.
        affine: (4, 4), maps voxel indices to millimetres.
        axis: the slices are "axial", "coronal" or "sagittal".
    """

    shape: tuple[int, int, int]
    num_volumes: int
    affine: np.ndarray
    axis: str

    def selectors(self) -> list[str]:
        """Return the selector of every slice, in order: "slice=17", or "volume=2,slice=17" with several volumes."""
        num_slices = self._turn(np.broadcast_to(np.uint8(0), self.shape)).shape[AXES[self.axis]]
        slices = [f"slice={number}" for number in range(num_slices)]
        if self.num_volumes == 1:
            return slices
        return [f"volume={volume},{selector}" for volume in range(self.num_volumes) for selector in slices]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """The (height, width) of a shown slice in pixels."""
        empty = np.broadcast_to(np.uint8(0), self.shape)
        height, width = np.moveaxis(self._turn(empty), AXES[self.axis], 0).shape[:0:-1]
        return height, width

    def slice_of(self, volumes: np.ndarray, selector: str) -> np.ndarray:
        """Return one slice as it is shown. It is a view: a write to it changes the volumes.

        Args:
            volumes: (X, Y, Z, V) of any type, as stored.
            selector: one that `selectors` returns.

        Returns:
            (H, W) of the same type.

        Raises:
            LookupError: there is no such slice.
        """
        volume, number = parse_selector(selector)
        plane = np.moveaxis(self._turn(volumes[..., volume]), AXES[self.axis], 0)[number]
        return plane.T[::-1, ::-1]

    def _turn(self, volume: np.ndarray) -> np.ndarray:
        """Return a view of a volume (X, Y, Z) with its axes towards right, front and head."""
        return np.asarray(nib.apply_orientation(volume, _orientation(self.affine)))


def _orientation(affine: np.ndarray) -> np.ndarray:
    """Return the body axis and direction of each stored axis, (3, 2); not finite if the affine gives no direction."""
    with np.errstate(all="ignore"):
        return np.asarray(nib.io_orientation(affine))


def parse_selector(selector: str) -> tuple[int, int]:
    """Return the (volume, slice) numbers of a selector, each from 0.

    Raises:
        LookupError: it is not a selector of a NIfTI file.
    """
    numbers = re.fullmatch(r"(?:volume=(\d{1,9}),)?slice=(\d{1,9})", selector)
    if numbers is None:
        raise LookupError(f"{selector!r} is no slice; it must be as 'slice=17' or 'volume=2,slice=17'")
    return int(numbers[1] or 0), int(numbers[2])


def read_grid(file: BinaryIO, name: str, axis: str) -> NiftiGrid:
    """Return the grid of a .nii or .nii.gz file, from its header.

    Args:
        file: at its start.
        name: the file's name in error messages.
        axis: the slices are "axial", "coronal" or "sagittal".

    Raises:
        ImageError: "corrupt", or "too_large" if there are more than 1,000,000 slices.
    """
    return _read_header(file, name, axis).grid


def list_slices(file: BinaryIO, name: str, axis: str) -> list[str]:
    """Return the selectors of a file's slices, from its header; arguments and errors as for `read_grid`."""
    return read_grid(file, name, axis).selectors()


@dataclass(frozen=True, eq=False)
class _Header:
    grid: NiftiGrid
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    display_range: tuple[float, float]

    @property
    def num_bytes(self) -> int:
        """The size of the whole uncompressed file in bytes."""
        return self.offset + math.prod(self.grid.shape) * self.grid.num_volumes * self.dtype.itemsize


class NiftiImages:
    """The slices of one NIfTI file, each as a viewer shows it: RGB, 8 bits per channel.

    Values are scaled by the header's slope and intercept. `vlsm.images.grey_levels` states the rule for black and
    white; the header declares cal_min and cal_max. All slices of a volume have the same levels. Colours stay unchanged.

    Args:
        data: the file's content, .nii or .nii.gz.
        name: the file's name in error messages.
        max_pixels: slices with more pixels are refused.
        window: (center, width) in the scaled values' units, or None.
        axis: the slices are "axial", "coronal" or "sagittal".
        max_bytes: files with more uncompressed bytes are refused.

    Raises:
        ImageError: "corrupt" or "too_large".
    """

    def __init__(
        self,
        data: bytes,
        name: str,
        max_pixels: int,
        window: Window | None,
        axis: str,
        max_bytes: int = 1 << 31,
    ) -> None:
        self._name, self._window = name, window
        header = self._header = _read_header(io.BytesIO(data), name, axis)
        self._levels: dict[int, Levels] = {}
        if header.num_bytes > max_bytes:
            raise ImageError(
                "too_large", f"{name} has {header.num_bytes:,} uncompressed bytes; max_image_bytes is {max_bytes:,}"
            )
        if data[:2] == _GZIP:
            data = _unpack(data, header.num_bytes, name)
        if len(data) < header.num_bytes:
            raise ImageError("corrupt", f"{name} has {len(data):,} bytes; its header needs {header.num_bytes:,}")
        shape = (*header.grid.shape, header.grid.num_volumes)
        self._volumes: np.ndarray = np.ndarray(shape, header.dtype, data, header.offset, order="F")
        height, width = self.size()
        if height * width > max_pixels:
            raise ImageError(
                "too_large",
                f"{name} is {width} x {height} = {height * width:,} pixels; max_pixels is {max_pixels:,}",
            )

    def size(self) -> tuple[int, int]:
        """Return the (height, width) of every slice in pixels."""
        height, width = self._header.grid.slice_of(self._volumes, "slice=0").shape
        return height, width

    def decode(self, selector: str) -> Decoded:
        """Return one slice.

        Args:
            selector: "slice=17", or "volume=2,slice=17".

        Raises:
            ImageError: "corrupt": there is no such slice.
        """
        try:
            stored = self._header.grid.slice_of(self._volumes, selector)
            volume = parse_selector(selector)[0]
        except LookupError:
            raise ImageError("corrupt", f"{self._name} has no {selector!r}") from None
        if stored.dtype.names:
            return Decoded(np.stack([stored[channel] for channel in "RGB"], axis=-1), STORED)
        levels = self._levels_of(volume)
        return Decoded(as_rgb(show(self._scale(stored), levels)), levels.rule)

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        """Return stored values with the header's slope and intercept applied, float of the same shape."""
        exact = np.float32 if stored.dtype.itemsize <= 2 else np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            values: np.ndarray = stored.astype(exact)
            values *= self._header.slope
            values += self._header.intercept
        return values

    def _levels_of(self, volume: int) -> Levels:
        if volume not in self._levels:
            values = self._scale(sample_values(self._volumes[..., volume]))
            self._levels[volume] = choose_levels(values, self._window, self._header.display_range)
        return self._levels[volume]


def _read_header(file: BinaryIO, name: str, axis: str) -> _Header:
    """Return the header of a file, checked against the file's size; errors as for `read_grid`."""
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}; known axes: {', '.join(AXES)}")
    try:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        is_gzip = file.read(2) == _GZIP
        file.seek(0)
        block = (gzip.GzipFile(fileobj=file) if is_gzip else file).read(max(_HEADERS))
        header = _parse_header(block, axis)
    except Exception as error:  # damage causes errors of any type; their texts may quote header values
        raise ImageError("corrupt", f"{name}: its NIfTI header is damaged ({type(error).__name__})") from None
    if header.num_bytes > num_bytes * (_MAX_RATIO if is_gzip else 1):
        raise ImageError("corrupt", f"{name} has {num_bytes:,} bytes, fewer than its header needs")
    if header.grid.num_volumes * max(header.grid.shape) > _MAX_SLICES:
        raise ImageError("too_large", f"{name} has more than {_MAX_SLICES:,} slices")
    return header


def _parse_header(block: bytes, axis: str) -> _Header:
    """Return the header in the first 540 bytes of a file.

    Raises:
        Exception: of any type, for damage.
    """
    sizes = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")} & _HEADERS.keys()
    (size,) = sizes
    header = _HEADERS[size](block[:size], check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("the header and the data are not in one file")
    shape = [int(side) for side in header.get_data_shape()]
    if not 2 <= len(shape) <= 7 or min(shape) < 1:
        raise ValueError("the shape is not that of a volume")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" and dtype.names not in (("R", "G", "B"), ("R", "G", "B", "A")):
        raise ValueError("the values are neither real numbers nor colours")
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(_orientation(affine)).all():
        raise ValueError("an axis has no direction")
    slope, intercept = header.get_slope_inter()
    offset = int(header.get_data_offset())
    if offset < size:
        raise ValueError("the data begin inside the header")
    x, y, z = (*shape, 1)[:3]
    return _Header(
        NiftiGrid((x, y, z), math.prod(shape[3:]), affine, axis),
        dtype,
        offset,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        (float(header["cal_min"]), float(header["cal_max"])),
    )


def _unpack(data: bytes, num_bytes: int, name: str) -> bytes:
    """Return the first num_bytes of an unpacked gzip file; more is never unpacked."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(num_bytes)
            file.read(1)  # gzip checks the checksum at the end of the file
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError("corrupt", f"{name}: its compressed data are damaged ({type(error).__name__})") from None
    return content


def list_images(file: BinaryIO, name: str, size_bytes: int | None, look: "Look") -> tuple[list[str], tuple[int, int]]:
    """The slices of the file's volumes, and their size; see `vlsm.images.formats.FormatModule`."""
    grid = read_grid(file, name, look.axis)
    return grid.selectors(), grid.slice_shape


def open_images(data: bytes, name: str, settings: "SegmentSettings") -> Callable[[str | None], Decoded]:
    """The slices of the file's volumes; see `vlsm.images.formats.FormatModule`."""
    limits = settings.window, settings.slices, settings.max_image_bytes
    images = NiftiImages(data, name, settings.max_pixels, *limits)
    return lambda selector: images.decode(selector or "slice=0")
