"""Export label maps: one PNG per image, in which 0 is background and k is the k-th class."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlsm.documents import parse_json
from vlsm.errors import ConfigError, ImageError, ResultError
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.images.overlays import prompt_colors
from vlsm.runs.results import choose_rows, decode_ok_row, read_ok_rows, read_rows
from vlsm.segmentation.masks import decode_png

logger = logging.getLogger("vlsm")


def export_labels(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write one label map per image, `DIR/labels.json`, which names the values, and `DIR/index.csv`.

    The PNGs have a palette, so that a viewer shows the classes in colours; the value of a pixel is its entry:
    `np.asarray(Image.open(FILE))`. OpenCV and scikit-image return the colours instead. A label map with more than 255
    classes has 16 bits and no palette.

    If the run has label maps (rows whose `kind` is "labels"), the function writes their values. Otherwise it builds
    them from the masks. The values are 1 to n in the order of the prompts. Where masks overlap, the mask with the
    higher confidence is used. If one mask of an image is damaged, the image has no label map.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written label maps.

    Raises:
        ConfigError: OUTPUT has no masks, it has more than 255 prompts, or a filter names an unknown column.
    """
    label_filters = [("kind", "==", "labels"), *(filters or [])]
    has_labels = next(read_rows(output, choose_rows(label_filters, None), ["kind"]), None) is not None
    with open_folder(directory) as folder:
        listed = folder.new("labels.json")
        if has_labels:
            names = _write_label_maps(output, folder, label_filters, limit)
        else:
            names = _build_label_maps(output, folder, filters, limit)
        values = {"0": "background"} | {str(number): name for name, number in names.items()}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        listed.write_text(text, encoding="utf-8")
        return folder.num_written


def decode_labels(row: dict[str, Any]) -> np.ndarray:
    """Return the stored label map of a row as (H, W) uint8, or uint16 if it has more than 255 prompts.

    Raises:
        ImageError: there is none.
        Exception: of any type, for other damage.
    """
    if row["label_map"] is None:
        raise ImageError("corrupt", "the row has no label map")
    labels = decode_png(row["label_map"], (row["height"], row["width"]))
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def class_names(row: dict[str, Any]) -> list[str]:
    """Return the class names of a row of kind "labels", in the order of their values from 1.

    Raises:
        ImageError: the row has none.
    """
    try:
        return [str(name) for name in parse_json(row["prompt"], "the prompt of the label map", ResultError)]
    except (ResultError, TypeError) as error:
        raise ImageError("corrupt", str(error)) from error


def _write_label_maps(output: str, folder: ExportFolder, filters: Filters, limit: int | None) -> dict[str, int]:
    """Write the stored label maps. Return the value of each class."""
    names: dict[str, int] = {}
    for row in read_ok_rows(output, filters, limit, ["label_map"]):
        with folder.file(row | {"prompt": ""}, rows=[row]) as path:
            row_names = {name: number for number, name in enumerate(class_names(row), start=1)}
            if names and row_names != names:
                logger.warning(
                    "the classes of %s differ from those of earlier images; labels.json does not describe it",
                    row["image_id"],
                )
            save_labels(decode_labels(row), path)
            names = names or row_names
    return names


def _build_label_maps(output: str, folder: ExportFolder, filters: Filters, limit: int | None) -> dict[str, int]:
    """Write one label map per image, from its masks. Return the value of each prompt."""
    numbering = Numbering(read_settings(output))
    mask_filters = [("kind", "==", "mask"), *(filters or [])]
    rows = read_ok_rows(output, mask_filters, limit, ["confidence"])
    # different images may have the same image_id in a list
    for _, image_rows in itertools.groupby(rows, key=lambda row: (row["image_uri"], row["selector"])):
        members = list(image_rows)
        with folder.file(members[0] | {"prompt": "", "kind": "labels"}, rows=members) as path:
            save_labels(paint_labels(members, numbering), path)
    return numbering.numbers


def save_labels(labels: np.ndarray, path: Path) -> None:
    """Write a label map, (H, W) uint8 with the palette, or uint16 as it is."""
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        colors = [(0, 0, 0), *prompt_colors(255)]
        picture.putpalette([level for color in colors for level in color])  # the values become entries of the palette
    picture.save(path, "PNG")


def paint_labels(rows: list[dict[str, Any]], numbering: Numbering) -> np.ndarray:
    """Return the label map of the masks of one image, (H, W) uint8.

    Raises:
        ConfigError: there are more than 255 prompts.
        ImageError: a mask is damaged, or its size differs.
    """
    # Ascending order: the mask with the highest confidence is painted last. If equal, the first prompt is last.
    numbered = [(row["confidence"] or 0.0, -numbering[row["prompt"]], decode_ok_row(row)) for row in rows]
    if len(numbering.numbers) > 255:
        raise ConfigError(
            f"there are {len(numbering.numbers)} prompts; a label map can hold 255; choose fewer with --filter"
        )
    labels = np.zeros((rows[0]["height"], rows[0]["width"]), np.uint8)
    for _, negative, mask in sorted(numbered, key=lambda item: item[:2]):
        if mask.shape != labels.shape:
            raise ImageError("corrupt", "a mask of the image has another size than the first one")
        labels[mask > 0] = -negative
    return labels
