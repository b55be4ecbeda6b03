"""Geometry of volume files and their slices in radiological view, and the headers that all volume formats have.

A volume is turned to the closest canonical orientation (nibabel: axes towards the patient's right, front and head)
without resampling. Axial slices have the front on top and the patient's right on the left. Coronal slices have the head
on top and the patient's right on the left. Sagittal slices have the head on top and the front on the left. Slices are
counted in canonical order: axial from the feet, coronal from the back, sagittal from the patient's left.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from vlsm.errors import ImageError
from vlsm.limits import MAX_IMAGES

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
RAW, GZIP, BZIP2, TEXT = "raw", "gzip", "bzip2", "text"  # how the values are packed
COLOURS = {count: np.dtype([(channel, "u1") for channel in "RGBA"[:count]]) for count in (3, 4)}

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_RATIO = 1032  # deflate compresses 1,032-fold at most
MAX_NIFTI1_SIDE = 32_767
_SCANNER = 1  # code of a NIfTI affine: positions in the scanner


@dataclass(frozen=True, eq=False)
class VolumeGrid:
    """The geometry of a volume file: shape, orientation and slices.

    Args:
        shape: (X, Y, Z) of a volume as stored, in voxels. Images have Z = 1.
        num_volumes: number of such volumes in the file.
        affine: (4, 4), maps voxel indices to millimetres towards right, front and head.
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

    @property
    def slice_spacing(self) -> tuple[float, float]:
        """The distance between the rows of a shown slice, and between its columns, in millimetres."""
        columns, rows = np.delete(np.linalg.norm(self.canonical[1][:3, :3], axis=0), AXES[self.axis])
        return float(rows), float(columns)

    @property
    def canonical(self) -> tuple[tuple[int, ...], np.ndarray]:
        """The shape of the turned volume in voxels, and its affine (4, 4)."""
        turned = self._turn(np.broadcast_to(np.uint8(0), self.shape))
        return turned.shape, self.affine @ nib.orientations.inv_ornt_aff(_orientation(self.affine), self.shape)

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


def has_directions(affine: np.ndarray) -> bool:
    """Return whether an affine (4, 4) gives every axis a direction of its own. The origin does not matter."""
    return bool(np.isfinite(affine[:3, :3]).all() and np.isfinite(_orientation(affine)).all())


def parse_selector(selector: str) -> tuple[int, int]:
    """Return the (volume, slice) numbers of a selector, each from 0.

    Raises:
        LookupError: it is not a selector of a volume file.
    """
    numbers = re.fullmatch(r"(?:volume=(\d{1,9}),)?slice=(\d{1,9})", selector)
    if numbers is None:
        raise LookupError(f"{selector!r} is no slice; it must be as 'slice=17' or 'volume=2,slice=17'")
    return int(numbers[1] or 0), int(numbers[2])


@dataclass(frozen=True, eq=False)
class VolumeHeader:
    """The contents of a volume file's header.

    Attributes:
        grid: the geometry of the volumes.
        sizes: sizes of the stored array; the first axis changes fastest.
        order: the stored axes, reordered: first x, y and z, then those that count volumes.
        dtype: type of a stored value; one of COLOURS for colours.
        mask_header: NIfTI header for masks of this file, without type and values. ITK finds a mask with this header at
            the place of the file.
        start: position of the values in their file, in bytes; None if they stand at its end.
        encoding: RAW, GZIP (also zlib), BZIP2 or TEXT: how the bytes from `start` on are packed.
        offset: position of the values in these bytes after unpacking.
        slope, intercept: a value is slope * stored + intercept.
        display_range: (black, white) that the header declares, or None.
        data_file: name of the file with the values, relative to the header's folder; None if they follow the header.
    """

    grid: VolumeGrid
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    dtype: np.dtype[Any]
    mask_header: Any
    start: int | None = 0
    encoding: str = RAW
    offset: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    display_range: tuple[float, float] | None = None
    data_file: str | None = None

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the values and of the bytes before them, unpacked."""
        return self.offset + math.prod(self.sizes) * self.dtype.itemsize

    def check(self, num_file_bytes: int | None, name: str) -> None:
        """Raise an ImageError if there are too many slices, or if a file is too small for its header.

        Args:
            num_file_bytes: size of the file with the values; None if unknown.
            name: the file's name in error messages.
        """
        if self.grid.num_volumes * max(self.grid.shape) > MAX_IMAGES:
            raise ImageError("too_large", f"{name} has more than {MAX_IMAGES:,} slices")
        ratio = {RAW: 1, GZIP: _MAX_RATIO}.get(self.encoding)
        if num_file_bytes is None or ratio is None:
            return
        if self.num_bytes > (num_file_bytes - (self.start or 0)) * ratio:
            raise ImageError("corrupt", f"{name} has {num_file_bytes:,} bytes, fewer than its header needs")


def is_gzip(head: bytes) -> bool:
    """Return whether a file with these first bytes is compressed by gzip."""
    return head[:2] == _GZIP_MAGIC


def read_text_header(file: BinaryIO, end: re.Pattern[bytes], name: str) -> bytes:
    """Return the text at the start of a file up to the end of the first match; the whole file without a match.

    Raises:
        ImageError: "corrupt" if there is no match in the first MiB.
    """
    head = b""
    while (match := end.search(head)) is None:
        block = file.read(1 << 14)
        if not block:
            return head
        head += block
        if len(head) > 1 << 20:
            raise ImageError("corrupt", f"{name}: its header is longer than 1 MiB")
    return head[: match.end()]


def check_data_file(data_file: str, name: str) -> str:
    """Return the name of the file with the values, as a header states it, if it lies in the header's folder or below.

    A header must not lead to other files of this machine or of a store.

    Raises:
        ImageError: "unreadable".
    """
    parts = data_file.split("/")
    if not data_file.strip() or parts[0] == "" or ".." in parts or re.search(r"[\\:\0]", data_file):
        raise ImageError(
            "unreadable", f"{name} keeps its data in {data_file!r:.200}; the data file must lie in the same folder"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def place(vectors: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return the affine (4, 4) of a volume of two or three axes, towards right, front and head.

    Args:
        vectors: (2 or 3, 2 or 3) the step along each stored axis in millimetres, towards left, back and head, as in
            DICOM and ITK. Without directions the axes are those of the body, with steps of 1 mm.
        origin: (2 or 3,) the centre of the first voxel in the same coordinates.
    """
    affine = np.eye(4)
    num_axes, num_dimensions = vectors.shape
    affine[:num_dimensions, :num_axes] = vectors.T
    if num_axes == 2 and num_dimensions == 3:
        normal = np.cross(*vectors)
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    if not has_directions(affine):
        affine = np.eye(4)
    affine[: len(origin), 3] = np.where(np.isfinite(origin), origin, 0)
    flipped: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return flipped


def header_for_masks(grid: VolumeGrid, is_flat: bool, step: float = 1.0, begin: float = 0.0) -> Any:
    """Return a NIfTI header with the shape and the place of a volume file of another format.

    Args:
        grid: of the file.
        is_flat: whether the file holds images, without a third axis.
        step: spacing of the fourth axis.
        begin: origin of the fourth axis.
    """
    header = (nib.Nifti1Header if max(grid.shape, default=1) <= MAX_NIFTI1_SIDE else nib.Nifti2Header)()
    shape = (*grid.shape, grid.num_volumes)
    header.set_data_shape(shape if grid.num_volumes > 1 else shape[: 2 if is_flat else 3])
    header.set_sform(grid.affine, _SCANNER)
    header.set_qform(grid.affine, _SCANNER)
    header["pixdim"][4], header["toffset"] = step, begin
    header.set_xyzt_units("mm")
    return header
