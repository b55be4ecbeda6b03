"""Label maps: one PNG per image, 0 for background and k for the k-th class."""

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
    """Write a label map per image, and `DIR/labels.json`, which names the values.

    Where the run has label maps of its own (rows whose `kind` is "labels"), they are written as they are. Otherwise
    they are made of its masks: 1 to n in the order of its prompts, the more confident one where masks overlap.

    Args:
        output: OUTPUT of a segment run, local or on an object store.
        directory: a local folder; it is made where it does not exist.
        filters: which rows, as a list of (column, operator, value).
        limit: rows at most.

    Returns:
        How many label maps were written.

    Raises:
        ConfigError: there are no masks at OUTPUT, or more than 255 prompts.
    """
    of_labels = [("kind", "==", "labels"), *(filters or [])]
    has_labels = open_results(output).count_rows(filter=pq.filters_to_expression(of_labels)) > 0
    names: dict[str, int] = {}
    pictures = _stored(output, of_labels, limit, names) if has_labels else _made(output, filters, limit, names)
    Path(directory).mkdir(parents=True, exist_ok=True)
    num_written = 0
    for row, png in pictures:
        path = file_path(directory, row | {"prompt": "", "kind": "labels"})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        num_written += 1
    values = {"0": "background"} | {str(number): name for name, number in names.items()}
    Path(directory, "labels.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return num_written


def decode_labels(png: bytes) -> np.ndarray:
    """A stored label map as (H, W) uint8, or uint16 where it tells more than 255 prompts apart."""
    labels = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def class_names(row: dict[str, Any]) -> list[str]:
    """The classes of a row of kind "labels", the first one's value 1."""
    return [str(name) for name in json.loads(row["prompt"])]


def _stored(
    output: str, filters: Filters, limit: int | None, names: dict[str, int]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    for row in read_ok_masks(output, filters, limit, ["label_map"]):
        found = {name: number for number, name in enumerate(class_names(row), start=1)}
        if names and found != names:
            logger.warning("%s has other classes than those before it; labels.json is not its", row["image_id"])
        elif not names:
            names.update(found)
        yield row, row["label_map"]


def _made(
    output: str, filters: Filters, limit: int | None, names: dict[str, int]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    numbering = Numbering(read_settings(output))
    of_masks = [("kind", "==", "mask"), *(filters or [])]
    rows = read_ok_masks(output, of_masks, limit, ["confidence"])
    for _, same in itertools.groupby(rows, key=lambda row: row["image_id"]):
        numbered = [(row["confidence"] or 0.0, -numbering[row["prompt"]], row) for row in same]
        if len(numbering.numbers) > 255:
            raise ConfigError(f"there are {len(numbering.numbers)} prompts; a label map tells 255 apart: use --filter")
        labels = np.zeros(numbered[0][2]["mask"].shape, np.uint8)
        for _, negative, row in sorted(numbered, key=lambda item: item[:2]):  # the more confident is painted last
            labels[row["mask"] > 0] = -negative
        sink = io.BytesIO()
        Image.fromarray(labels).save(sink, "PNG")
        yield numbered[0][2], sink.getvalue()
    names.update(numbering.numbers)
