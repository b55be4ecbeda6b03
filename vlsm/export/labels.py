"""Export label maps: one PNG per image, in which 0 is background and k is the k-th class."""

import io
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from vlsm.errors import ConfigError
from vlsm.export.naming import file_path
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.runs.results import open_results, read_ok_masks

logger = logging.getLogger("vlsm")


def export_labels(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write one label map per image, and `DIR/labels.json`, which names the values.

    If the run has label maps (rows whose `kind` is "labels"), the function writes them unchanged. Otherwise it builds
    them from the masks. The values are 1 to n in the order of the prompts. Where masks overlap, the mask with the
    higher confidence is used.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written label maps.

    Raises:
        ConfigError: OUTPUT has no masks, or it has more than 255 prompts.
    """
    label_filters = [("kind", "==", "labels"), *(filters or [])]
    has_labels = open_results(output).count_rows(filter=pq.filters_to_expression(label_filters)) > 0
    names: dict[str, int] = {}
    if has_labels:
        label_maps = _read_label_maps(output, label_filters, limit, names)
    else:
        label_maps = _build_label_maps(output, filters, limit, names)
    Path(directory).mkdir(parents=True, exist_ok=True)
    num_written = 0
    for row, png in label_maps:
        path = file_path(directory, row | {"prompt": "", "kind": "labels"})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        num_written += 1
    values = {"0": "background"} | {str(number): name for name, number in names.items()}
    Path(directory, "labels.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return num_written


def decode_labels(png: bytes) -> np.ndarray:
    """Return a stored label map as (H, W) uint8, or uint16 if it has more than 255 prompts."""
    labels = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def class_names(row: dict[str, Any]) -> list[str]:
    """Return the class names of a row of kind "labels", in the order of their values from 1."""
    return [str(name) for name in json.loads(row["prompt"])]


def _read_label_maps(
    output: str, filters: Filters, limit: int | None, names: dict[str, int]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the rows and the stored label maps as PNG; fill `names` with the value of each class."""
    for row in read_ok_masks(output, filters, limit, ["label_map"]):
        row_names = {name: number for number, name in enumerate(class_names(row), start=1)}
        if names and row_names != names:
            logger.warning(
                "the classes of %s differ from those of earlier images; labels.json does not describe it",
                row["image_id"],
            )
        elif not names:
            names.update(row_names)
        yield row, row["label_map"]


def _build_label_maps(
    output: str, filters: Filters, limit: int | None, names: dict[str, int]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield one row per image and the label map of its masks as PNG; fill `names` with the value of each prompt."""
    numbering = Numbering(read_settings(output))
    mask_filters = [("kind", "==", "mask"), *(filters or [])]
    rows = read_ok_masks(output, mask_filters, limit, ["confidence"])
    for _, image_rows in itertools.groupby(rows, key=lambda row: row["image_id"]):
        numbered = [(row["confidence"] or 0.0, -numbering[row["prompt"]], row) for row in image_rows]
        if len(numbering.numbers) > 255:
            raise ConfigError(
                f"there are {len(numbering.numbers)} prompts; a label map can hold 255; choose fewer with --filter"
            )
        labels = np.zeros(numbered[0][2]["mask"].shape, np.uint8)
        # Ascending order: the mask with the highest confidence is painted last. If equal, the first prompt is last.
        for _, negative, row in sorted(numbered, key=lambda item: item[:2]):
            labels[row["mask"] > 0] = -negative
        sink = io.BytesIO()
        Image.fromarray(labels).save(sink, "PNG")
        yield numbered[0][2], sink.getvalue()
    names.update(numbering.numbers)
