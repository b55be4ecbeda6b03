"""Reads the headers of NRRD files (`.nrrd`, and `.nhdr` with a data file).

The first three axes of space are x, y and z. Axes of other kinds (list, vector, time) and further axes count volumes,
but three or four unsigned bytes per voxel that come first are a colour, and two floats of the kind "complex" a number.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import nrrd
import numpy as np

from vlsm.errors import ImageError
from vlsm.images.volume_slices import VolumeImages, make_openers
from vlsm.images.volumes import (
    BZIP2,
    COLOURS,
    GZIP,
    RAW,
    TEXT,
    VolumeGrid,
    VolumeHeader,
    check_data_file,
    header_for_masks,
    place,
    read_text_header,
)

if TYPE_CHECKING:
    from vlsm.config import SegmentSettings
    from vlsm.images.formats import Look

Fields = dict[str, Any]

_END = re.compile(rb"\r?\n\r?\n")
_ENCODINGS = {
    "raw": RAW,
    **dict.fromkeys(("gzip", "gz"), GZIP),
    **dict.fromkeys(("bzip2", "bz2"), BZIP2),
    **dict.fromkeys(("txt", "text", "ascii"), TEXT),
}
_C_TYPES = {"char": "i1", "short": "i2", "int": "i4", "longlong": "i8", "float": "f4", "double": "f8"}
_IN_SPACE = ("domain", "space", "???", "none")  # kinds of axes
_NAME = re.compile(rb"^[^:]*")  # of a field, in any case
_PAIR_OR_COMMENT = re.compile(rb"#|[^:]*:=")
_MANY_FILES = re.compile(rb"(?mi)^data ?file:\s*(LIST\b|.*%[\d ]*d)")
# which axes of a space run against left, back, head; other spaces are read as ITK does, as if they were this one
_FLIPS = {
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}


def read_header(file: BinaryIO, name: str, axis: str) -> VolumeHeader:
    """Return the header of a file; arguments and errors as for `vlsm.images.nifti.read_header`.

    Raises:
        ImageError: also "unreadable", for a data file in another folder and for several data files.
    """
    text = read_text_header(file, _END, name)
    if _MANY_FILES.search(text):
        raise ImageError("unreadable", f"{name} keeps its data in several files; only a single data file is read")
    try:
        header = _describe(_parse(text), axis, name)
    except ImageError:
        raise
    except Exception as error:  # damage causes errors of any type
        raise ImageError("corrupt", f"{name}: its NRRD header is damaged ({type(error).__name__})") from None
    if header.data_file is None:
        header = replace(header, start=None if header.start is None else len(text))
    header.check(None if header.data_file else file.seek(0, io.SEEK_END), name)
    return header


def _parse(text: bytes) -> Fields:
    """Return the fields of a header, without blanks in their names. Key/value pairs are for other programs."""
    magic, *lines = text.splitlines(keepends=True)
    fields = [_NAME.sub(lambda name: name[0].lower(), line) for line in lines if not _PAIR_OR_COMMENT.match(line)]
    return {key.replace(" ", ""): value for key, value in nrrd.read_header([magic, *fields]).items()}


def _describe(fields: Fields, axis: str, name: str) -> VolumeHeader:
    """Return the header without the position of the values in the file."""
    sizes = [int(size) for size in fields["sizes"]]
    if len(sizes) != fields["dimension"] or min(sizes) < 1:
        raise ImageError("corrupt", f"{name} has the sizes {sizes}; there must be {fields['dimension']} of 1 or more")
    if (encoding := _ENCODINGS.get(fields["encoding"].lower())) is None:
        raise ImageError("unreadable", f"{name} has the encoding {fields['encoding']!r:.50}, which is not read")
    if int(fields.get("lineskip", 0)):
        raise ImageError("unreadable", f"{name} skips lines before its values, which is not read")
    dtype = _dtype(fields, name)
    in_space = _axes_of_space(fields, len(sizes))
    if (merged := _merge_first(fields, sizes, dtype, in_space)) is not None:
        dtype, sizes, in_space = merged, sizes[1:], [number - 1 for number in in_space]
    if len(in_space) < 2:
        raise ImageError("unreadable", f"{name} has fewer than two axes of space; it holds no image")
    others = [number for number in range(len(sizes)) if number not in in_space]
    x, y, z = (*(sizes[number] for number in in_space), 1)[:3]
    num_volumes = math.prod(sizes[number] for number in others)
    grid = VolumeGrid((x, y, z), num_volumes, _affine(fields, in_space, len(fields["sizes"]) - len(sizes)), axis)
    skip = int(fields.get("byteskip", 0))
    return VolumeHeader(
        grid,
        tuple(sizes),
        (*in_space, *others),
        dtype,
        header_for_masks(grid, len(in_space) == 2, *_fourth_axis(fields)),
        start=None if skip < 0 and encoding == RAW else 0,
        encoding=encoding,
        offset=max(skip, 0),
        data_file=_data_file(fields, name),
    )


def _dtype(fields: Fields, name: str) -> np.dtype[Any]:
    words = fields["type"].lower().removesuffix("_t").replace("long long", "longlong").split()
    base = " ".join(word for word in words if word not in ("signed", "unsigned")) or "int"
    base = base.removesuffix(" int")
    is_unsigned = base.startswith("u") or "unsigned" in words
    base = base.removeprefix("u")
    code = _C_TYPES.get(base) or (f"i{int(base[3:]) // 8}" if base in ("int8", "int16", "int32", "int64") else None)
    if code is None:
        raise ImageError("unreadable", f"{name} has values of the type {fields['type']!r:.50}, which is not read")
    dtype = np.dtype(code.replace("i", "u") if is_unsigned else code)
    endian = fields.get("endian", "").lower()
    if dtype.itemsize > 1 and _ENCODINGS.get(fields["encoding"].lower()) != TEXT and endian not in ("big", "little"):
        raise ImageError("corrupt", f"{name} states no byte order; its endian must be little or big")
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _axes_of_space(fields: Fields, num_axes: int) -> list[int]:
    """Return the numbers of the first three axes of space."""
    kinds = fields.get("kinds") or ["???"] * num_axes
    directions = fields.get("spacedirections")
    without = [False] * num_axes if directions is None else np.isnan(directions).any(axis=1)
    axes = range(num_axes)
    return [number for number in axes if kinds[number].lower() in _IN_SPACE and not without[number]][:3]


def _merge_first(fields: Fields, sizes: list[int], dtype: np.dtype[Any], in_space: list[int]) -> np.dtype[Any] | None:
    """Return the type of a voxel if its components are a colour or a complex number, else None."""
    kind = (fields.get("kinds") or ["???"])[0].lower()
    if 0 in in_space or kind in ("list", "time"):
        return None
    if dtype == np.uint8:
        return COLOURS.get(sizes[0])
    is_complex = kind == "complex" and sizes[0] == 2 and dtype.kind == "f"
    return np.dtype(f"{dtype.byteorder}c{2 * dtype.itemsize}") if is_complex else None


def _affine(fields: Fields, in_space: list[int], num_merged: int) -> np.ndarray:
    """Return the affine (4, 4); `in_space` counts without the merged axis."""
    axes = [number + num_merged for number in in_space]
    directions = fields.get("spacedirections")
    if directions is not None:
        vectors = np.asarray(directions, np.float64)[axes, :3]
        flips = np.asarray(_FLIPS.get(fields.get("space", "").lower().removesuffix("-time"), (1, 1, 1)))
        flips = flips[: vectors.shape[1]]
        origin = np.asarray(fields.get("spaceorigin", np.zeros(len(flips))), np.float64)[:3]
        return place(vectors * flips, origin * flips)
    spacings = np.asarray(fields.get("spacings", np.ones(max(axes) + 1)), np.float64)[axes]
    steps = np.where(np.isfinite(spacings) & (spacings != 0), spacings, 1)
    return place(np.diag(steps), _origin_by_axis(fields, axes))


def _fourth_axis(fields: Fields) -> tuple[float, float]:
    """Return the spacing and the origin of the fourth axis, as ITK reads them, if it has any."""
    directions, origin = np.asarray(fields.get("spacedirections", np.eye(3)), np.float64), fields.get("spaceorigin")
    if directions.shape[0] > 3 and directions.shape[1] > 3 and origin is not None:
        return float(np.linalg.norm(directions[3])), float(origin[3])
    spacing = float([*fields.get("spacings", ()), 1, 1, 1, 1][3])
    return spacing if np.isfinite(spacing) and spacing > 0 else 1.0, 0.0


def _origin_by_axis(fields: Fields, axes: list[int]) -> np.ndarray:
    """Return the centre of the first voxel from the lower end of each axis; zeros if an axis lacks it."""
    num_axes = len(fields["sizes"])
    unknown = [np.nan] * num_axes
    lowest, highest, steps = (
        np.asarray(fields.get(key, unknown), np.float64)[axes] for key in ("axismins", "axismaxs", "spacings")
    )
    centers = fields.get("centerings") or fields.get("centers", "cell " * num_axes).split()
    is_node = np.array([centers[number].lower() == "node" for number in axes])
    counts = np.maximum(np.asarray(fields["sizes"], np.float64)[axes] - is_node, 1)
    origin = lowest + np.where(is_node, 0, np.where(np.isfinite(steps), steps, (highest - lowest) / counts) / 2)
    return origin if np.isfinite(origin).all() else np.zeros(len(axes))


def _data_file(fields: Fields, name: str) -> str | None:
    data_file = fields.get("datafile")
    return None if data_file is None else check_data_file(data_file, name)


def data_files(header: bytes, name: str) -> Sequence[str]:
    """Return the name of the data file, if there is one; see `vlsm.images.formats.PairedModule`."""
    data_file = read_header(io.BytesIO(header), name, "axial").data_file
    return () if data_file is None else (data_file,)


def list_images(file: BinaryIO, name: str, size_bytes: int | None, look: "Look") -> tuple[list[str], tuple[int, int]]:
    """The slices of the file's volumes, and their size; see `vlsm.images.formats.FormatModule`."""
    grid = read_header(file, name, look.axis).grid
    return grid.selectors(), grid.slice_shape


def _open(data: bytes, name: str, settings: "SegmentSettings", values: bytes | None) -> VolumeImages:
    header = read_header(io.BytesIO(data), name, settings.slices)
    return VolumeImages(header, data if values is None else values, name, settings)


open_images, open_labels = make_openers(_open)
