"""Export masks as NIfTI files. Masks of the slices of a volume file become a volume at the same place.

The header of a NIfTI file is copied with all that states its place: shape, qform, sform, their codes, voxel sizes,
units and time step. So nibabel and ITK, which prefer different parts of it, find the mask where they find the image.
"""

import io
import logging
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vlsm.errors import ImageError
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.labels import class_names, decode_labels
from vlsm.export.origins import (
    MAX_EXPORT_BYTES,
    Filters,
    Row,
    SourceFile,
    SourceRows,
    file_id,
    read_settings,
    source_of,
)
from vlsm.images.formats import FORMATS
from vlsm.images.reader import Reader
from vlsm.images.volumes import MAX_NIFTI1_SIDE, VolumeGrid, VolumeHeader
from vlsm.runs.locations import Locations
from vlsm.runs.results import decode_ok_row

logger = logging.getLogger("vlsm")


def export_nifti(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write masks as `DIR/FILE.PROMPT.nii.gz`, uint8 (uint16 for label maps of more than 255 prompts), and the index.

    Masks of the slices of a volume file (NIfTI, Analyze, NRRD, MetaImage) become one volume per prompt and one per
    label map, with the shape and the place of the source file. Slices without a mask are 0, and a warning counts them.

    Masks of members and label maps are written only if a filter names their `kind`.

    Any other mask becomes a volume of one slice: voxel (x, y, 0) is the pixel in column x and row y, and the affine is
    the identity. A reader of (z, y, x) arrays, such as SimpleITK, then shows the image unchanged.

    A row that cannot be exported is noted in `DIR/index.csv`. If a volume file cannot be read again, these are all of
    its rows.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written files.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    settings = read_settings(output)
    with open_folder(directory) as folder:
        reader = Reader(settings, Locations(output, folder.allow))
        for source, rows in SourceRows(output, filters, limit, ["label_map"], ["mask"]):
            if "slice=" in (source_of(rows[0])[1] or ""):
                with folder.attempt(rows):
                    header = _read_header(source, reader, settings.slices)
                    _write_volumes(header, rows, source, folder)
            else:
                for row in rows:
                    with folder.file(row, ".nii.gz") as path:
                        _save(_decode(row).T[:, :, None], None, path)
        return folder.num_written


def _read_header(source: SourceFile, reader: Reader, axis: str) -> VolumeHeader:
    content = source.open(reader)
    format_of_source = FORMATS[content.kind or "image"]
    if "slice=" not in format_of_source.selector:
        raise ImageError("corrupt", f"{source.name} is no volume")
    module: Any = format_of_source.load()
    header: VolumeHeader = module.read_header(io.BytesIO(content.data), source.name, axis)
    return header


def _write_volumes(header: VolumeHeader, rows: list[Row], source: SourceFile, folder: ExportFolder) -> None:
    """Write one file per prompt and kind of the rows of one volume file."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["kind"]), []).append(row)
    for group in groups.values():
        with folder.attempt(group):
            volumes = _allocate(header.grid, group[0], source.name)
            painted = [row for row in group if _paint(row, volumes, header.grid, source, folder)]
            if not painted:
                continue
            _warn_of_missing(painted, header.grid, source)
            with folder.file(group[0] | {"image_id": file_id(group[0])}, ".nii.gz", painted) as path:
                shape = header.mask_header.get_data_shape()
                _save(volumes.reshape(shape, order="F"), header.mask_header, path)


def _allocate(grid: VolumeGrid, row: Row, name: str) -> np.ndarray:
    """Return zeros (X, Y, Z, V) for the masks or label maps of a prompt, uint8 or uint16.

    Raises:
        ImageError: they would have more than MAX_EXPORT_BYTES.
    """
    is_large = row["kind"] == "labels" and len(class_names(row)) > np.iinfo(np.uint8).max
    dtype = np.dtype(np.uint16 if is_large else np.uint8)
    num_bytes = math.prod(grid.shape) * grid.num_volumes * dtype.itemsize
    if num_bytes > MAX_EXPORT_BYTES:
        raise ImageError(
            "too_large", f"the masks of {name} have {num_bytes:,} bytes; the export writes at most {MAX_EXPORT_BYTES:,}"
        )
    return np.zeros((*grid.shape, grid.num_volumes), dtype, order="F")


def _paint(row: Row, volumes: np.ndarray, grid: VolumeGrid, source: SourceFile, folder: ExportFolder) -> bool:
    """Write the mask of a row into its slice of the volumes. Return whether it could be exported."""
    is_painted = False
    with folder.attempt([row]):
        values = _decode(row)
        try:
            volume_slice = grid.slice_of(volumes, source_of(row)[1] or "")
        except LookupError:
            volume_slice = np.empty(0)
        if volume_slice.shape != values.shape:
            raise ImageError("corrupt", f"{source.name} changed its shape after segmentation")
        np.copyto(volume_slice, values, casting="safe")
        is_painted = True
    return is_painted


def _warn_of_missing(rows: list[Row], grid: VolumeGrid, source: SourceFile) -> None:
    num_slices = len(grid.selectors())
    num_missing = num_slices - len({row["selector"] for row in rows})
    if num_missing:
        logger.warning(
            "%s: %d of %d slices have no mask of %r; they are 0",
            source.name,
            num_missing,
            num_slices,
            rows[0]["prompt"],
        )


def _decode(row: Row) -> np.ndarray:
    """Return the label map or the mask of a row, (H, W) uint8 or uint16."""
    return decode_labels(row) if row["kind"] == "labels" else decode_ok_row(row)


def _save(volume: np.ndarray, header: Any, path: Path) -> None:
    """Write one NIfTI file. Without a header, the affine is the identity."""
    is_large = isinstance(header, nib.Nifti2Header) or max(volume.shape) > MAX_NIFTI1_SIDE
    # Without an affine, nibabel leaves that of the header alone. A new one would become the sform, and the qform 0.
    affine = np.eye(4) if header is None else None
    image = (nib.Nifti2Image if is_large else nib.Nifti1Image)(volume, affine, header, dtype=volume.dtype)
    if header is None:
        image.header.set_xyzt_units("mm")
    nib.save(image, path)
