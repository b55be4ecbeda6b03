"""Export masks as tasks of Label Studio with predictions, and the labelling interface that the tasks need."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TextIO
from xml.sax.saxutils import quoteattr

from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.links import ImageLinks, LinkPrefix, carried_values, read_images
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.images.brush_rle import encode_brush
from vlsm.images.overlays import prompt_colors
from vlsm.images.polygons import drop_straight, join_rings, trace_edges
from vlsm.runs.results import decode_ok_row
from vlsm.shown import escape

INTERFACE_NAME = "labeling_interface.xml"
_TASKS_BYTES = 100_000_000  # of a file; Label Studio refuses uploads of more than 250 MB
_DATA = ("image", "image_id", "image_uri", "selector", "prompts")  # names in the data of a task

Row = dict[str, Any]


def export_label_studio(  # noqa: PLR0913 - the options of the command
    output: str,
    directory: str | Path | ExportFolder,
    filters: Filters = None,
    limit: int | None = None,
    prefixes: Sequence[LinkPrefix] = (),
    polygons: bool = False,
) -> int:
    """Write `DIR/tasks-00000.json` and further files, `DIR/labeling_interface.xml` and `DIR/index.csv`.

    An image is a task with one prediction. The prediction has a region for each mask that is not empty, with the prompt
    as its label and the confidence as its score; the score of the prediction is the lowest of these. `data` of a task
    has the link to the image, its id and location, and its columns of a list. A file has about 100 MB. If one mask of
    an image is damaged, the image has no task.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.
        prefixes: other beginnings of the links to the images.
        polygons: write polygons along the edges of pixels, one for each region, in place of brush masks. A hole becomes
            a channel without width.

    Returns:
        Number of tasks.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    numbering, links = Numbering(read_settings(output)), ImageLinks(output, prefixes)
    describe = _describe_polygons if polygons else _describe_brush
    num_tasks = 0
    with open_folder(directory) as folder, _TaskFiles(folder) as files:
        for rows in read_images(output, filters, limit, ["model"]):
            with folder.attempt(rows):
                _, link = links.name(rows[0])
                regions: list[Row] = []
                for row in rows:
                    numbering[row["prompt"]]  # noqa: B018 - prompts are numbered as they occur
                    for value in describe(row):
                        regions.append(_region(row, value, len(regions)))
                name = files.write({"data": _data(rows, link), "predictions": [_prediction(rows, regions)]})
                for row in rows:
                    folder.note(name, row)
                num_tasks += 1
        links.report()
        if num_tasks:
            interface = make_interface(list(numbering.numbers))
            Path(folder, INTERFACE_NAME).write_text(interface, encoding="utf-8")
    return num_tasks


def make_interface(prompts: Sequence[str]) -> str:
    """Return the labelling interface (XML) for tasks with these prompts: brush and polygons in the same colours."""
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in prompt_colors(len(prompts))]
    labels = [
        f"    <Label value={quoteattr(escape(prompt))} background={quoteattr(color)}/>"
        for prompt, color in zip(prompts, colors, strict=True)
    ]
    tags = [("BrushLabels", "brush"), ("PolygonLabels", "polygon")]
    groups = [[f'  <{tag} name="{name}" toName="image">', *labels, f"  </{tag}>"] for tag, name in tags]
    image = '  <Image name="image" value="$image" zoom="true" zoomControl="true"/>'
    return "\n".join(["<View>", image, *(line for group in groups for line in group), "</View>", ""])


def _data(rows: list[Row], link: str) -> Row:
    """Return what a task says about its image. `vlsm.labels` finds image and prompts by it."""
    row = rows[0]
    known = {"image": link, "image_id": row["image_id"], "image_uri": row["image_uri"]}
    known |= {"selector": row["selector"]} if row["selector"] is not None else {}
    return known | {"prompts": [each["prompt"] for each in rows]} | carried_values(row, _DATA)


def _prediction(rows: list[Row], regions: list[Row]) -> Row:
    scores = [region["score"] for region in regions if "score" in region]
    return {"model_version": rows[0]["model"], "result": regions} | ({"score": min(scores)} if scores else {})


def _region(row: Row, value: Row, number: int) -> Row:
    """Return one region of a prediction."""
    kind = "polygon" if "points" in value else "brush"
    region = {
        "id": f"region{number}",
        "from_name": kind,
        "to_name": "image",
        "type": f"{kind}labels",
        "original_width": row["width"],
        "original_height": row["height"],
        "image_rotation": 0,
        "value": value | {f"{kind}labels": [escape(row["prompt"])]},
    }
    confidence = row["confidence"]
    return region | ({"score": confidence} if confidence is not None and math.isfinite(confidence) else {})


def _describe_brush(row: Row) -> list[Row]:
    """Return the brush mask of a row, or nothing if the mask is empty.

    Raises:
        ImageError: the mask is damaged.
    """
    mask = decode_ok_row(row)
    return [{"format": "rle", "rle": list(encode_brush(mask))}] if mask.any() else []


def _describe_polygons(row: Row) -> list[Row]:
    """Return a polygon for each region of the mask of a row; its corners are in per cent of the image's sides."""
    mask = decode_ok_row(row)
    rings = [drop_straight(join_rings(polygon)) for polygon in trace_edges(mask)]
    return [{"points": (ring / (row["width"], row["height"]) * 100).tolist(), "closed": True} for ring in rings]


class _TaskFiles:
    """Writes tasks to files of limited size, each a JSON list."""

    def __init__(self, folder: ExportFolder) -> None:
        self._folder, self._number, self._size = folder, 0, 0
        self._file: TextIO | None = None
        self._is_first = True

    def write(self, task: Row) -> str:
        """Write a task. Return the name of its file."""
        text = json.dumps(task, allow_nan=False)
        if self._file is not None and self._size + len(text) > _TASKS_BYTES:
            self._end()
            self._number += 1
        name = f"tasks-{self._number:05d}.json"
        if self._is_first:  # not before: an export without masks makes no folder
            self._folder.new(INTERFACE_NAME)
            self._is_first = False
        if self._file is None:
            self._file, self._size = self._folder.new(name).open("w", encoding="utf-8"), 0
        self._size += self._file.write(("[\n" if not self._size else ",\n") + text)
        return name

    def _end(self) -> None:
        if self._file is not None:
            self._file.write("\n]\n")
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
