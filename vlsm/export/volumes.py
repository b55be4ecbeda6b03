"""Export masks as NIfTI files. Masks of the slices of a volume file become a volume at the same place.

The header of a NIfTI file is copied with all that states its place: shape, qform, sform, their codes, voxel sizes,
units and time step. So nibabel and ITK, which prefer different parts of it, find the mask where they find the image.
"""

import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vlsm.errors import ImageError
from vlsm.export.labels import decode_labels
from vlsm.export.naming import file_path
from vlsm.export.origins import (
    MAX_EXPORT_BYTES,
    Filters,
    Row,
    SourceFile,
    file_id,
    group_by_source,
    read_settings,
    source_of,
)
from vlsm.images.formats import FORMATS
from vlsm.images.reader import Reader
from vlsm.images.volumes import MAX_NIFTI1_SIDE, VolumeHeader
from vlsm.runs.results import ALL_KINDS, read_ok_masks

logger = logging.getLogger("vlsm")


def export_nifti(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write masks as `DIR/FILE.PROMPT.nii.gz`, uint8 (uint16 for label maps of more than 255 prompts).

    Masks of the slices of a volume file (NIfTI, Analyze, NRRD, MetaImage) become one volume per prompt and one per
    label map, with the shape and the place of the source file. Slices without a mask are 0, and a warning counts them.

    Any other mask becomes a volume of one slice: voxel (x, y, 0) is the pixel in column x and row y, and the affine is
    the identity. A reader of (z, y, x) arrays, such as SimpleITK, then shows the image unchanged.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written files. A volume file that cannot be read again has no volumes, and a warning names it.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    settings = read_settings(output)
    num_written, reader = 0, Reader(settings)

    def read(chosen: Filters) -> Iterator[Row]:
        return read_ok_masks(output, chosen, limit, ["label_map"], ALL_KINDS)

    for source, rows in group_by_source(read, filters):
        if "slice=" in (source_of(rows[0])[1] or ""):
            try:
                header = _read_header(source, reader, settings.slices)
            except ImageError as error:
                logger.warning("no volume: %s", error)
                continue
            num_written += _write_volumes(header, rows, source, directory)
        else:
            for row in rows:
                num_written += _write_nifti(_decode(row).T[:, :, None], None, directory, row)
    return num_written


def _read_header(source: SourceFile, reader: Reader, axis: str) -> VolumeHeader:
    content = source.open(reader)
    format_of_source = FORMATS[content.kind or "image"]
    if "slice=" not in format_of_source.selector:
        raise ImageError("corrupt", f"{source.name} is no volume")
    module: Any = format_of_source.load()
    header: VolumeHeader = module.read_header(io.BytesIO(content.data), source.name, axis)
    if math.prod(header.grid.shape) * header.grid.num_volumes > MAX_EXPORT_BYTES:
        raise ImageError("too_large", f"{source.name} has more than {MAX_EXPORT_BYTES:,} voxels")
    return header


def _write_volumes(header: VolumeHeader, rows: list[dict[str, Any]], source: SourceFile, directory: str | Path) -> int:
    """Write one file per prompt and kind of the rows of one volume file. Return the number of files."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["kind"]), []).append(row)
    return sum(_write_volume(header, group, source, directory) for group in groups.values())


def _write_volume(header: VolumeHeader, rows: list[dict[str, Any]], source: SourceFile, directory: str | Path) -> int:
    """Write one volume from its slices. Return 1, or 0 if the shape of the source file has changed."""
    dtype = np.uint16 if any(_decode(row).dtype == np.uint16 for row in rows) else np.uint8
    grid = header.grid
    volumes = np.zeros((*grid.shape, grid.num_volumes), dtype, order="F")
    num_slices = len(grid.selectors())
    try:
        for row in rows:
            volume_slice, values = grid.slice_of(volumes, source_of(row)[1] or ""), _decode(row)
            if volume_slice.shape != values.shape:
                raise LookupError
            volume_slice[...] = values
    except LookupError:
        logger.warning("no volume: %s changed its shape after segmentation", source.name)
        return 0
    if len(rows) < num_slices:
        num_missing, prompt = num_slices - len(rows), rows[0]["prompt"]
        logger.warning(
            "%s: %d of %d slices have no mask of %r; they are 0", source.name, num_missing, num_slices, prompt
        )
    volume = volumes.reshape(header.mask_header.get_data_shape(), order="F")
    return _write_nifti(volume, header.mask_header, directory, rows[0] | {"image_id": file_id(rows[0])})


def _decode(row: dict[str, Any]) -> np.ndarray:
    """Return the label map or the mask of a row, (H, W) uint8 or uint16."""
    return decode_labels(row["label_map"]) if row["kind"] == "labels" else np.asarray(row["mask"])


def _write_nifti(volume: np.ndarray, header: Any, directory: str | Path, row: dict[str, Any]) -> int:
    """Write one NIfTI file and return 1, the number of files. Without a header, the affine is the identity."""
    is_large = isinstance(header, nib.Nifti2Header) or max(volume.shape) > MAX_NIFTI1_SIDE
    # Without an affine, nibabel leaves that of the header alone. A new one would become the sform, and the qform 0.
    affine = np.eye(4) if header is None else None
    image = (nib.Nifti2Image if is_large else nib.Nifti1Image)(volume, affine, header, dtype=volume.dtype)
    if header is None:
        image.header.set_xyzt_units("mm")
    path = file_path(directory, row, ".nii.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return 1
