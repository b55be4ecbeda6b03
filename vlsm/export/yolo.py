"""Export masks as labels for YOLO segmentation: one text file per image, with polygons."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.links import ImageLinks, read_images
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.images.polygons import Ring, drop_straight, join_rings, trace_centers
from vlsm.runs.results import decode_ok_row

_MIN_CORNERS = 3  # readers refuse a line with fewer


def export_yolo(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write `DIR/labels/IMAGE.txt` for each image, `DIR/data.yaml`, and `DIR/index.csv`.

    The images belong below `DIR/images`: copy or link the folder that the log names there. A label file has the path of
    its image below this folder, with the ending `.txt`; so two images whose names differ in the ending only cannot both
    be exported.

    A line is one region of a mask: the number of its prompt in `data.yaml`, then x and y of the corners as shares of
    the image's sides. The corners are centers of pixels: a reader that fills a polygon with its outline, as Ultralytics
    does, gets the mask again. YOLO has no holes: a channel inside of the mask leads from a hole to the outline. Readers
    that fill with the outline keep the hole; other readers lose half a pixel at each side. An image without foreground
    has an empty file.

    Arguments and errors are as for `export_labels`.

    Returns:
        Number of written label files.
    """
    numbering, links = Numbering(read_settings(output)), ImageLinks(output)
    with open_folder(directory) as folder:
        description = folder.new("data.yaml")
        for rows in read_images(output, filters, limit):
            name = PurePosixPath("labels", links.name(rows[0])[0]).with_suffix(".txt").as_posix()
            with folder.attempt(rows), folder.file(rows[0], rows=rows, path=folder.claim(name)) as path:
                path.write_text("".join(line for row in rows for line in _lines(row, numbering)), encoding="ascii")
        description.write_text(_describe(numbering, links.names.folder), encoding="utf-8")
        links.report()
        return folder.num_written


def _describe(numbering: Numbering, images: str) -> str:
    """Return data.yaml. JSON texts are YAML."""
    names = [f"  {number - 1}: {json.dumps(prompt)}" for prompt, number in numbering.numbers.items()]
    head = [f"# the images of {json.dumps(images)} belong into the folder images beside this file"]
    return "\n".join([*head, "train: images", "val: images", "names:" if names else "names: {}", *names, ""])


def _lines(row: dict[str, Any], numbering: Numbering) -> list[str]:
    """Return the lines of the mask of a row.

    Raises:
        ImageError: the mask is damaged.
    """
    number, sides = numbering[row["prompt"]] - 1, (row["width"], row["height"])
    rings = [drop_straight(join_rings(polygon)) for polygon in trace_centers(decode_ok_row(row))]
    return [f"{number} {' '.join(f'{share:.6f}' for share in _shares(ring, sides))}\n" for ring in rings]


def _shares(ring: Ring, sides: tuple[int, int]) -> list[float]:
    """Return x and y of the corners in turn, from 0 to 1. A region of one or two pixels repeats its corners."""
    corners = np.resize(ring, (max(len(ring), _MIN_CORNERS), 2))
    shares: list[float] = ((corners + 0.5) / sides).ravel().tolist()
    return shares
