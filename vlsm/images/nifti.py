"""Reads the headers of NIfTI files, and of Analyze and NIfTI pairs (`.hdr` with `.img`).

The orientation is the first of sform (if it has a code), qform (if it has a code) and the voxel sizes that gives every
axis a direction. Voxel sizes of 0 count as 1. Neither is an error: nibabel and ITK read such files alike.
"""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from vlsm.errors import ImageError
from vlsm.images.gunzip import open_gzip
from vlsm.images.volume_slices import VolumeImages, make_openers
from vlsm.images.volumes import AXES, COLOURS, GZIP, RAW, VolumeGrid, VolumeHeader, has_directions, is_gzip

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it names no file; what matters is an error here

_HEADERS = {
    b"n+1": nib.Nifti1Header,
    b"ni1": nib.nifti1.Nifti1PairHeader,
    b"n+2": nib.Nifti2Header,
    b"ni2": nib.nifti2.Nifti2PairHeader,
}
_MAX_HEADER_BYTES = 540  # of NIfTI-2
_HDR = (".hdr", ".hdr.gz")
_LABEL = 1002  # intent code of NIfTI
_OTHER_HDR = (b"#?", b"ENVI")  # Radiance pictures and ENVI headers are also called .hdr


def read_header(file: BinaryIO, name: str, axis: str) -> VolumeHeader:
    """Return the header of a `.nii`, `.nii.gz`, `.hdr` or `.hdr.gz` file.

    Args:
        file: at its start.
        name: the file's name in error messages.
        axis: the slices are "axial", "coronal" or "sagittal".

    Raises:
        ImageError: "corrupt", or "too_large" if there are more than 1,000,000 slices.
    """
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}; known axes: {', '.join(AXES)}")
    try:
        block = _read_block(file)
        raw = _parse(block, name)
        header = _describe(raw, axis, name)
    except ImageError:
        raise
    except Exception as error:  # damage causes errors of any type; their texts may quote header values
        raise ImageError("corrupt", f"{name}: its NIfTI header is damaged ({type(error).__name__})") from None
    file.seek(0)
    header = replace(header, encoding=GZIP if is_gzip(file.read(2)) else RAW)
    header.check(None if header.data_file else file.seek(0, io.SEEK_END), name)
    return header


def _read_block(file: BinaryIO) -> bytes:
    """Return the first 540 unpacked bytes of a file."""
    is_packed = is_gzip(file.read(2))
    file.seek(0)
    return bytes((open_gzip(file) if is_packed else file).read(_MAX_HEADER_BYTES))


def _parse(block: bytes, name: str) -> Any:
    """Return nibabel's header of the type that the first bytes of a file state.

    Raises:
        Exception: of any type, for damage.
    """
    # the first number is the size of the header, in either byte order
    sizes = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")} & {348, 540}
    size = min(sizes, default=0)
    header_class = _HEADERS.get(block[4:7] if size == 540 else block[344:347])
    is_hdr = name.lower().endswith(_HDR)
    if header_class is None and is_hdr and size == 348:
        header_class = nib.spm2analyze.Spm2AnalyzeHeader
    if header_class is None or header_class.sizeof_hdr != size:
        raise ImageError("corrupt", f"{name} has no NIfTI header")
    if not _is_single(header_class) and not is_hdr:
        raise ImageError("corrupt", f"{name} is the header of a pair; its name must end with .hdr")
    return header_class(block[:size], check=False)


def _is_single(header: Any) -> bool:
    """Return whether the values are in the file of the header; `header` is a header of nibabel or its class."""
    return getattr(header, "is_single", False)  # Analyze headers lack it


def _describe(raw: Any, axis: str, name: str) -> VolumeHeader:
    shape = [int(side) for side in raw.get_data_shape()]
    if not 2 <= len(shape) <= 7 or min(shape) < 1:
        raise ImageError("corrupt", f"{name} has the shape {shape}; a volume has 2 to 7 axes of 1 or more")
    offset = int(raw.get_data_offset())
    if offset < (raw.sizeof_hdr if _is_single(raw) else 0):
        raise ImageError("corrupt", f"{name}: its data begin inside the header")
    slope, intercept = raw.get_slope_inter()
    x, y, z = (*shape, 1)[:3]
    affine = next((affine for affine in _affines(raw) if has_directions(affine)), None)
    if affine is None:
        raise ImageError("corrupt", f"{name}: an axis has no direction")
    return VolumeHeader(
        VolumeGrid((x, y, z), math.prod(shape[3:]), affine, axis),
        tuple(shape),
        tuple(range(len(shape))),
        _dtype(raw, name),
        _mask_header(raw),
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        display_range=_display_range(raw),
        data_file=None if _is_single(raw) else _names_of_data(name)[0],
    )


def _display_range(raw: Any) -> tuple[float, float] | None:
    black, white = float(raw["cal_min"]), float(raw["cal_max"])
    return (black, white) if white > black else None


def _dtype(raw: Any, name: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(raw.get_data_dtype())
    except (HeaderDataError, KeyError):
        dtype = np.dtype("V")
    if dtype.kind not in "iufc" and dtype.names not in [colour.names for colour in COLOURS.values()]:
        raise ImageError("unreadable", f"{name} has values of the data type {int(raw['datatype'])}, which is not read")
    return dtype


def _affines(raw: Any) -> Iterator[np.ndarray]:
    """Yield the affines that a header states, the preferred one first."""
    header = raw.copy()
    steps = np.abs(header["pixdim"][1:4])
    header["pixdim"][1:4] = np.where(np.isfinite(steps) & (steps > 0), steps, 1)
    if isinstance(header, nib.Nifti1Header):
        if header["sform_code"] > 0:
            yield header.get_sform()
        if header["qform_code"] > 0 and (affine := _qform(header)) is not None:
            yield affine
        yield header.get_base_affine()
    else:
        yield header.get_best_affine()


def _qform(header: Any) -> np.ndarray | None:
    try:
        return np.asarray(header.get_qform())
    except (ValueError, HeaderDataError):  # the quaternion is no rotation
        return None


def _mask_header(raw: Any) -> Any:
    """Return a copy of a header, as that of a single file, for masks.

    Intent and scaling become those of labels. With several values per voxel (a fifth axis) the intent stays, because it
    says what the fifth axis is. An Analyze header gives its shape and its voxel sizes.
    """
    is_nifti = isinstance(raw, nib.Nifti1Header)
    header = (nib.Nifti2Header if isinstance(raw, nib.Nifti2Header) else nib.Nifti1Header)()
    for field in set(raw.keys()) & set(header.keys()) if is_nifti else ("dim", "pixdim"):
        header[field] = raw[field]
    header["magic"], header["vox_offset"] = header.single_magic, 0
    if raw["dim"][0] < 5:
        header["intent_code"], header["intent_name"] = _LABEL, b""
        header["intent_p1"] = header["intent_p2"] = header["intent_p3"] = 0
    header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = 1, 0, 0, 0
    header["aux_file"] = b""
    return header


def data_files(header: bytes, name: str) -> Sequence[str]:
    """Return the possible names of the `.img` file of a pair; see `vlsm.images.formats.PairedModule`."""
    if not name.lower().endswith(_HDR):
        return ()
    return _names_of_data(name) if read_header(io.BytesIO(header), name, "axial").data_file else ()


def _names_of_data(name: str) -> tuple[str, str]:
    base = name.rsplit("/", 1)[-1]
    is_packed = base.lower().endswith(".gz")
    stem = base[:-3] if is_packed else base
    plain = stem[:-4] + (".IMG" if stem.endswith(".HDR") else ".img")
    return (f"{plain}.gz", plain) if is_packed else (plain, f"{plain}.gz")


def list_images(file: BinaryIO, name: str, size_bytes: int | None, look: "Look") -> tuple[list[str], tuple[int, int]]:
    """The slices of the file's volumes, and their size; see `vlsm.images.formats.FormatModule`."""
    if name.lower().endswith(_HDR) and file.read(4).startswith(_OTHER_HDR):
        return [], (0, 0)
    file.seek(0)
    grid = read_header(file, name, look.axis).grid
    return grid.selectors(), grid.slice_shape


def _open(data: bytes, name: str, settings: "SegmentSettings", values: bytes | None) -> VolumeImages:
    header = read_header(io.BytesIO(data), name, settings.slices)
    if values is not None:
        data, header = values, replace(header, encoding=GZIP if is_gzip(values) else RAW)
    return VolumeImages(header, data, name, settings)


open_images, open_labels = make_openers(_open)
