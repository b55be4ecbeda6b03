"""Reads the headers of MetaImage files (`.mha`, and `.mhd` with a `.raw` or `.zraw`).

The first three axes are x, y and z; further axes and channels count volumes, but three or four unsigned bytes are a
colour. Values are shown as stored, as ITK gives them.

Source: https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vlsm.errors import ImageError
from vlsm.images.volume_slices import VolumeImages, make_openers
from vlsm.images.volumes import (
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

Fields = dict[str, str]

_END = re.compile(rb"(?m)^[ \t]*ElementDataFile[ \t]*[=:][^\n]*\n")
_TYPES = {
    "CHAR": "i1",
    "UCHAR": "u1",
    "SHORT": "i2",
    "USHORT": "u2",
    "INT": "i4",
    "UINT": "u4",
    "LONG": "i4",
    "ULONG": "u4",
    "LONG_LONG": "i8",
    "ULONG_LONG": "u8",
    "FLOAT": "f4",
    "DOUBLE": "f8",
}


def read_header(file: BinaryIO, name: str, axis: str) -> VolumeHeader:
    """Return the header of a file; arguments and errors as for `vlsm.images.nifti.read_header`.

    Raises:
        ImageError: also "unreadable", for a data file in another folder and for several data files.
    """
    text = read_text_header(file, _END, name)
    try:
        header = _describe(_parse(text), axis, name)
    except ImageError:
        raise
    except Exception as error:  # damage causes errors of any type
        raise ImageError("corrupt", f"{name}: its MetaImage header is damaged ({type(error).__name__})") from None
    if header.data_file is None:
        header = replace(header, start=len(text))
    header.check(None if header.data_file else file.seek(0, io.SEEK_END), name)
    return header


def _parse(text: bytes) -> Fields:
    fields = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        key, separator, value = line.partition("=" if "=" in line else ":")
        if separator:
            fields[key.strip()] = value.strip()
    return fields


def _describe(fields: Fields, axis: str, name: str) -> VolumeHeader:
    """Return the header without the position of the values in a file with header."""
    if fields.get("ObjectType", "Image") != "Image":
        raise ImageError("unreadable", f"{name} holds another object than an image")
    sizes = [int(size) for size in fields["DimSize"].split()]
    num_axes = int(fields["NDims"])
    if len(sizes) != num_axes or not 2 <= num_axes <= 10 or min(sizes) < 1:
        raise ImageError("corrupt", f"{name} has the sizes {sizes}; there must be 2 to 10 of 1 or more")
    num_channels = int(fields.get("ElementNumberOfChannels", 1))
    dtype = _dtype(fields, name)
    if dtype == np.uint8 and num_channels in COLOURS:
        dtype, num_channels = COLOURS[num_channels], 1
    has_channels = num_channels != 1
    x, y, z = (*sizes, 1)[:3]
    affine, step, begin = _geometry(fields, num_axes)
    grid = VolumeGrid((x, y, z), num_channels * math.prod(sizes[3:]), affine, axis)
    if grid.num_volumes < 1:
        raise ImageError("corrupt", f"{name} has {num_channels} channels; there must be 1 or more")
    skip = int(fields.get("HeaderSize", 0))
    return VolumeHeader(
        grid,
        (num_channels, *sizes) if has_channels else tuple(sizes),
        (*range(1, min(num_axes, 3) + 1), 0, *range(4, num_axes + 1)) if has_channels else tuple(range(num_axes)),
        dtype,
        header_for_masks(grid, num_axes == 2, step, begin),
        start=None if skip < 0 else skip,
        encoding=_encoding(fields),
        data_file=_data_file(fields, name),
    )


def _dtype(fields: Fields, name: str) -> np.dtype[Any]:
    code = _TYPES.get(fields["ElementType"].removeprefix("MET_").removesuffix("_ARRAY"))
    if code is None:
        raise ImageError("unreadable", f"{name} has the type {fields['ElementType']!r:.50}, which is not read")
    order = fields.get("ElementByteOrderMSB", fields.get("BinaryDataByteOrderMSB", "False"))
    return np.dtype(f"{'>' if _is_true(order) else '<'}{code}")


def _encoding(fields: Fields) -> str:
    if _is_true(fields.get("CompressedData", "False")):
        return GZIP
    return RAW if _is_true(fields.get("BinaryData", "True")) else TEXT


def _is_true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")


def _geometry(fields: Fields, num_axes: int) -> tuple[np.ndarray, float, float]:
    """Return the affine (4, 4), and the spacing and the origin of the fourth axis."""

    def read(keys: Sequence[str], default: np.ndarray) -> np.ndarray:
        text = next((fields[key] for key in keys if key in fields), None)
        values = default if text is None else np.array(text.split(), np.float64)
        return values.reshape(default.shape)

    steps = read(("ElementSpacing", "ElementSize"), np.ones(num_axes))
    steps = np.where(np.isfinite(steps) & (steps != 0), steps, 1)
    origin = read(("Offset", "Position", "Origin"), np.zeros(num_axes))
    directions = read(("TransformMatrix", "Rotation", "Orientation"), np.eye(num_axes))
    count = min(num_axes, 3)
    affine = place((directions * steps[:, None])[:count, :count], origin[:count])
    return affine, *((steps[3], origin[3]) if num_axes > 3 else (1.0, 0.0))


def _data_file(fields: Fields, name: str) -> str | None:
    data_file = fields["ElementDataFile"]
    if data_file.upper() == "LOCAL":
        return None
    if re.match(r"LIST\b|.*%\d*d", data_file):
        raise ImageError("unreadable", f"{name} keeps its data in several files; only a single data file is read")
    return check_data_file(data_file, name)


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
