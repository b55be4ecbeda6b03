"""Export the masks of a run as PNGs, overlays or probability maps, and the table of all export formats."""

import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlsm.errors import ImageError, optional_packages
from vlsm.export.coco import export_coco
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.origins import Filters, read_settings
from vlsm.images.overlays import draw_legend, draw_outlines, draw_overlay
from vlsm.images.reader import Reader
from vlsm.runs.locations import Locations
from vlsm.runs.results import decode_ok_row, read_ok_rows
from vlsm.segmentation.masks import decode_png
from vlsm.words import count

logger = logging.getLogger("vlsm")

Directory = str | Path | ExportFolder
Exporter = Callable[..., int]


def export_masks(output: str, directory: Directory, filters: Filters = None, limit: int | None = None) -> int:
    """Write every mask as a PNG with values 0 and 255, at `DIR/IMAGE_ID.PROMPT.png`, and `DIR/index.csv`.

    `naming` describes the names of the files, `ExportFolder` the index. A row that cannot be exported is noted in the
    index, with the reason, and in the log.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value): [("confidence", "<", 0.6)].
        limit: maximum number of rows.

    Returns:
        Number of written files. Failed rows have no mask and are skipped.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    with open_folder(directory) as folder:
        for row in read_ok_rows(output, filters, limit):
            with folder.file(row) as path:
                Image.fromarray(decode_ok_row(row) * 255).save(path)
        return folder.num_written


def export_overlays(
    output: str,
    directory: Directory,
    filters: Filters = None,
    limit: int | None = None,
    is_together: bool = False,
) -> int:
    """Write every mask, drawn on its image, as a PNG; arguments, result and errors as for `export_masks`.

    The function reads the images again from their original location. An unreadable image is a row that fails.

    Args:
        output: as for `export_masks`.
        directory: as for `export_masks`.
        filters: as for `export_masks`.
        limit: as for `export_masks`.
        is_together: write one picture per image, `DIR/IMAGE_ID.png`, with all its masks: each prompt has its colour,
            and a legend below the image names it. If one mask of an image is damaged, the image has no picture.
    """
    with open_folder(directory) as folder:
        reader = Reader(read_settings(output), Locations(output, folder.allow))
        if is_together:
            rows = read_ok_rows(output, filters, limit)
            # different images may have the same image_id in a list
            for _, image_rows in itertools.groupby(rows, key=lambda row: (row["image_uri"], row["selector"])):
                members = list(image_rows)
                with folder.file(members[0] | {"prompt": "", "kind": ""}, rows=members) as path:
                    Image.fromarray(_draw_together(members, reader)).save(path)
            return folder.num_written
        for row in read_ok_rows(output, filters, limit):
            with folder.file(row) as path:
                image, (mask,) = _read([row], reader)
                Image.fromarray(draw_overlay(image, mask)).save(path)
        return folder.num_written


def _read(rows: Sequence[dict[str, Any]], reader: Reader) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the image of some rows, (H, W, 3) uint8, and the mask of each.

    Raises:
        ImageError: the image cannot be read, a mask is damaged, or their sizes differ.
    """
    content, frame = reader.open(rows[0])
    image, masks = content.decode(frame).pixels, [decode_ok_row(row) for row in rows]
    if any(image.shape[:2] != mask.shape for mask in masks):
        raise ImageError("corrupt", f"the size of {rows[0]['image_uri']} changed after segmentation")
    return image, masks


def _draw_together(rows: Sequence[dict[str, Any]], reader: Reader) -> np.ndarray:
    """Return the image of some rows with the outlines of all their masks, and a legend."""
    image, masks = _read(rows, reader)
    picture = draw_outlines(image, masks, max(2, round(min(image.shape[:2]) / 150)))
    kinds = ["" if row["kind"] == "mask" else f", {row['kind']}" for row in rows]
    empty = ["" if mask.any() else " (empty)" for mask in masks]
    return draw_legend(
        picture, [row["prompt"] + more + none for row, more, none in zip(rows, kinds, empty, strict=True)]
    )


def export_probability(output: str, directory: Directory, filters: Filters = None, limit: int | None = None) -> int:
    """Write the probability map of every mask as a PNG of the image's size: 0 to 255 stand for 0 to 1.

    The files have the names of `export_masks`; arguments, result and errors are as there. Only a run with the setting
    `probability_maps` has maps. A warning counts the rows without a map.
    """
    num_without = 0
    with open_folder(directory) as folder:
        for row in read_ok_rows(output, filters, limit, ["probability_map"]):
            if row["probability_map"] is None:
                num_without += 1
                continue
            with folder.file(row) as path:
                decode_png(row["probability_map"], (row["height"], row["width"]))  # raises an error for a damaged one
                path.write_bytes(row["probability_map"])
        if num_without:
            logger.warning(
                "no probability map in %s; segment with --set probability_maps=all (or review) to keep them",
                count(num_without, "row"),
            )
        return folder.num_written


def _import_later(module: str, function: str, extra: str = "all") -> Exporter:
    """Return an exporter that imports its module, and so its libraries, only when it is called.

    Args:
        module: the module.
        function: its exporter.
        extra: the extra of vlsm that installs the libraries.
    """

    def export(*args: Any, **options: Any) -> int:
        with optional_packages(extra):
            home = importlib.import_module(module)
        return int(getattr(home, function)(*args, **options))

    return export


FORMATS: dict[str, Exporter] = {
    "masks": export_masks,
    "overlays": export_overlays,
    "probability": export_probability,
    "coco": export_coco,
    "labels": _import_later("vlsm.export.labels", "export_labels"),
    "label-studio": _import_later("vlsm.export.label_studio", "export_label_studio"),
    "cvat": _import_later("vlsm.export.coco_tools", "export_cvat"),
    "fiftyone": _import_later("vlsm.export.coco_tools", "export_fiftyone"),
    "yolo": _import_later("vlsm.export.yolo", "export_yolo"),
    "voc": _import_later("vlsm.export.voc", "export_voc"),
    "qupath": _import_later("vlsm.export.qupath", "export_qupath"),
    "nifti": _import_later("vlsm.export.volumes", "export_nifti"),
    "dicom-seg": _import_later("vlsm.export.dicom_seg", "export_dicom_seg", extra="dicom-seg"),
    "dicom-seg-series": _import_later("vlsm.export.dicom_seg", "export_dicom_seg_series", extra="dicom-seg"),
    "rtstruct": _import_later("vlsm.export.rtstruct", "export_rtstruct", extra="rtstruct"),
}
