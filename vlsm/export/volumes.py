"""Masks of a finished run as NIfTI files: those of a NIfTI file's slices put back into its volume."""

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
    Source,
    file_id,
    group_by_source,
    read_settings,
    source_of,
)
from vlsm.images.nifti import NiftiGrid, read_grid
from vlsm.images.reader import Reader
from vlsm.runs.results import ALL_KINDS, read_ok_masks

logger = logging.getLogger("vlsm")

_MAX_NIFTI1_SIDE = 32_767


def export_nifti(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write masks as `DIR/FILE.PROMPT.nii.gz`, uint8 (uint16 for label maps of more than 255 prompts).

    Masks of the slices of a NIfTI file become one volume per prompt (and per label map), with that file's shape and
    affine; slices without a mask are 0 there, and told of. Any other mask is a volume of one slice: its voxel (x, y, 0)
    is the pixel in column x and row y, with the identity as affine, so that what reads (z, y, x) arrays, as SimpleITK
    does, sees the image as it is.

    Args:
        output: OUTPUT of a segment run, local or on an object store.
        directory: a local folder; it is made where it does not exist.
        filters: which rows, as a list of (column, operator, value).
        limit: rows at most.

    Returns:
        How many files were written. A source that is no longer there costs its own, with a warning.

    Raises:
        ConfigError: there are no masks at OUTPUT.
    """
    settings = read_settings(output)
    num_written, reader = 0, Reader(settings)

    def read(chosen: Filters) -> Iterator[Row]:
        return read_ok_masks(output, chosen, limit, ["label_map"], ALL_KINDS)

    for source, rows in group_by_source(read, filters):
        if "slice=" in (source_of(rows[0])[1] or ""):
            try:
                grid = _read_grid(source, reader, settings.slices)
            except ImageError as error:
                logger.warning("no volume: %s", error)
                continue
            num_written += _write_volumes(grid, rows, source, directory)
        else:
            for row in rows:
                num_written += _write(_values(row).T[:, :, None], np.eye(4), directory, row)
    return num_written


def _read_grid(source: Source, reader: Reader, axis: str) -> NiftiGrid:
    grid = read_grid(io.BytesIO(source.read(reader)), source.name, axis)
    if math.prod(grid.shape) * grid.num_volumes > MAX_EXPORT_BYTES:
        raise ImageError("too_large", f"{source.name} has more than {MAX_EXPORT_BYTES:,} voxels")
    return grid


def _write_volumes(grid: NiftiGrid, rows: list[dict[str, Any]], source: Source, directory: str | Path) -> int:
    """One file for each prompt and kind among the rows of one NIfTI file."""
    same: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        same.setdefault((row["prompt"], row["kind"]), []).append(row)
    return sum(_write_volume(grid, one, source, directory) for one in same.values())


def _write_volume(grid: NiftiGrid, rows: list[dict[str, Any]], source: Source, directory: str | Path) -> int:
    dtype = np.uint16 if any(_values(row).dtype == np.uint16 for row in rows) else np.uint8
    volumes = np.zeros((*grid.shape, grid.num_volumes), dtype, order="F")
    num_slices = len(grid.selectors())
    try:
        for row in rows:
            place, values = grid.slice_of(volumes, source_of(row)[1] or ""), _values(row)
            if place.shape != values.shape:
                raise LookupError
            place[...] = values
    except LookupError:
        logger.warning("no volume: %s changed its shape since it was segmented", source.name)
        return 0
    if len(rows) < num_slices:
        missing = num_slices - len(rows)
        prompt = rows[0]["prompt"]
        logger.warning("%s: %d of %d slices have no mask of %r; they are 0", source.name, missing, num_slices, prompt)
    one = volumes[..., 0] if grid.num_volumes == 1 else volumes
    return _write(one, grid.affine, directory, rows[0] | {"image_id": file_id(rows[0])})


def _values(row: dict[str, Any]) -> np.ndarray:
    return decode_labels(row["label_map"]) if row["kind"] == "labels" else np.asarray(row["mask"])


def _write(volume: np.ndarray, affine: np.ndarray, directory: str | Path, row: dict[str, Any]) -> int:
    kind = nib.Nifti1Image if max(volume.shape) <= _MAX_NIFTI1_SIDE else nib.Nifti2Image
    image = kind(volume, affine, dtype=volume.dtype)
    image.header.set_xyzt_units("mm")
    path = file_path(directory, row, ".nii.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return 1
