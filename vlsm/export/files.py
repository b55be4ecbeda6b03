"""Export the masks of a run as PNGs, overlays or COCO JSON, and the table of all export formats."""

import importlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from vlsm.errors import ImageError, optional_packages
from vlsm.export.naming import file_path
from vlsm.export.origins import read_settings
from vlsm.export.overlays import draw_overlay
from vlsm.images.reader import Reader
from vlsm.runs.results import choose_rows, open_results, read_ok_masks

logger = logging.getLogger("vlsm")

Filters = list[tuple[str, str, Any]] | None
Exporter = Callable[..., int]


def export_masks(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write every mask as a PNG with values 0 and 255, at `DIR/IMAGE_ID.PROMPT.png`.

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
    return sum(
        _write_png(file_path(directory, row), row["mask"] * 255) for row in read_ok_masks(output, filters, limit)
    )


def export_overlays(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write every mask, drawn on its image, as a PNG; arguments, result and errors as for `export_masks`.

    The function reads the images again from their original location. It skips an unreadable image with a warning.
    """
    num_written, reader = 0, Reader(read_settings(output))
    for row in read_ok_masks(output, filters, limit):
        try:
            content, frame = reader.open(row)
            image = content.decode(frame).pixels
        except ImageError as error:
            logger.warning("no overlay: %s", error)
            continue
        if image.shape[:2] != row["mask"].shape:
            logger.warning("no overlay: the size of %s changed after segmentation", row["image_id"])
            continue
        num_written += _write_png(file_path(directory, row), draw_overlay(image, row["mask"]))
    return num_written


def export_coco(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write `DIR/coco.json`: one category per prompt, one annotation per mask that is not empty; return their number.

    The field `score` is the confidence. Arguments and errors are as for `export_masks`. The function streams the rows,
    so that its use of memory does not grow with the archive.
    """
    columns = ["image_id", "prompt", "height", "width", "mask_rle", "area_px", "bbox", "confidence"]
    prompts: dict[str, int] = {}
    Path(directory).mkdir(parents=True, exist_ok=True)

    def images() -> Iterator[dict[str, Any]]:
        rows = itertools.islice(_read_rows(output, filters, columns), limit)
        by_image = itertools.groupby(rows, key=lambda row: row["image_id"])
        for number, (image_id, image_rows) in enumerate(by_image, start=1):
            first = next(image_rows)
            yield {"id": number, "file_name": image_id, "height": first["height"], "width": first["width"]}

    def annotations() -> Iterator[dict[str, Any]]:
        rows = itertools.islice(_read_rows(output, filters, columns), limit)
        by_image = itertools.groupby(rows, key=lambda row: row["image_id"])
        numbers = itertools.count(1)
        for image_number, (_, image_rows) in enumerate(by_image, start=1):
            for row in image_rows:
                category = prompts.setdefault(row["prompt"], len(prompts) + 1)
                if row["area_px"]:
                    yield {
                        "id": next(numbers),
                        "image_id": image_number,
                        "category_id": category,
                        "segmentation": {"size": [row["height"], row["width"]], "counts": row["mask_rle"]},
                        "area": row["area_px"],
                        "bbox": row["bbox"],
                        "iscrowd": 0,
                        "score": row["confidence"],
                    }

    with Path(directory, "coco.json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        _write_items(file, images())
        file.write('], "annotations": [')
        num_written = _write_items(file, annotations())
        categories = [{"id": number, "name": prompt} for prompt, number in prompts.items()]
        file.write(f'], "categories": {json.dumps(categories)}}}\n')
    return num_written


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
    "coco": export_coco,
    "labels": _import_later("vlsm.export.labels", "export_labels"),
    "nifti": _import_later("vlsm.export.volumes", "export_nifti"),
    "dicom-seg": _import_later("vlsm.export.dicom_seg", "export_dicom_seg", extra="dicom-seg"),
    "dicom-seg-series": _import_later("vlsm.export.dicom_seg", "export_dicom_seg_series", extra="dicom-seg"),
    "rtstruct": _import_later("vlsm.export.rtstruct", "export_rtstruct", extra="rtstruct"),
}


def _read_rows(output: str, filters: Filters, columns: list[str]) -> Iterator[dict[str, Any]]:
    expression = pq.filters_to_expression(choose_rows(filters, ("mask",)))
    for batch in open_results(output).to_batches(columns=columns, filter=expression, batch_size=1024):
        yield from batch.to_pylist()


def _write_items(file: io.TextIOBase, items: Iterable[dict[str, Any]]) -> int:
    """Write the items of a JSON list, without its brackets; return their number."""
    count = 0
    for item in items:
        file.write(("\n" if not count else ",\n") + json.dumps(item))
        count += 1
    return count


def _write_png(path: Path, picture: np.ndarray) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return 1
