"""Export the masks of a run as PNGs, overlays or probability maps, and the table of all export formats."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from vlsm.errors import ImageError, optional_packages
from vlsm.export.coco import export_coco
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.origins import Filters, read_settings
from vlsm.images.overlays import draw_overlay
from vlsm.images.reader import Reader
from vlsm.runs.locations import Locations
from vlsm.runs.results import decode_ok_row, read_ok_rows
from vlsm.segmentation.masks import decode_png

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


def export_overlays(output: str, directory: Directory, filters: Filters = None, limit: int | None = None) -> int:
    """Write every mask, drawn on its image, as a PNG; arguments, result and errors as for `export_masks`.

    The function reads the images again from their original location. An unreadable image is a row that fails.
    """
    with open_folder(directory) as folder:
        reader = Reader(read_settings(output), Locations(output, folder.allow))
        for row in read_ok_rows(output, filters, limit):
            with folder.file(row) as path:
                content, frame = reader.open(row)
                image, mask = content.decode(frame).pixels, decode_ok_row(row)
                if image.shape[:2] != mask.shape:
                    raise ImageError("corrupt", f"the size of {row['image_uri']} changed after segmentation")
                Image.fromarray(draw_overlay(image, mask)).save(path)
        return folder.num_written


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
                "%d rows have no probability map; segment with --set probability_maps=all (or review) to keep them",
                num_without,
            )
        return folder.num_written


def _import_later(module: str, function: str, extra: str = "all") -> Exporter:
    """Return an exporter that imports its module, and so its libraries, only when it is called.

    Args:
        module: the module.
        function: its exporter.
        extra: the extra of vlsm that installs the libraries.
    """

    def export(*args: Any) -> int:
        with optional_packages(extra):
            home = importlib.import_module(module)
        return int(getattr(home, function)(*args))

    return export


FORMATS: dict[str, Exporter] = {
    "masks": export_masks,
    "overlays": export_overlays,
    "probability": export_probability,
    "coco": export_coco,
    "labels": _import_later("vlsm.export.labels", "export_labels"),
    "nifti": _import_later("vlsm.export.volumes", "export_nifti"),
    "dicom-seg": _import_later("vlsm.export.dicom_seg", "export_dicom_seg", extra="dicom-seg"),
    "dicom-seg-series": _import_later("vlsm.export.dicom_seg", "export_dicom_seg_series", extra="dicom-seg"),
    "rtstruct": _import_later("vlsm.export.rtstruct", "export_rtstruct", extra="rtstruct"),
}
