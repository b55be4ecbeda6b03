"""Export masks as GeoJSON for QuPath: one file per image, with the masks as annotations."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.links import carried_values, read_images
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.images.overlays import prompt_colors
from vlsm.images.polygons import Ring, drop_straight, trace_edges
from vlsm.runs.results import decode_ok_row

Row = dict[str, Any]


def export_qupath(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write `DIR/IMAGE_ID.geojson` for each image, and `DIR/index.csv`.

    A mask that is not empty is one annotation: a MultiPolygon along the edges of its pixels, with holes, in pixels. Its
    class is the prompt, its measurement the confidence. Its metadata are the columns of the list, as texts. An image
    without foreground has a file without annotations. Arguments and errors are as for `export_labels`.

    Returns:
        Number of written files.
    """
    numbering = Numbering(read_settings(output))
    with open_folder(directory) as folder:
        for rows in read_images(output, filters, limit):
            with folder.file(rows[0] | {"prompt": "", "kind": ""}, ".geojson", rows) as path:
                features = [_feature(row, numbering) for row in rows]
                collection = {"type": "FeatureCollection", "features": [each for each in features if each]}
                path.write_text(json.dumps(collection, allow_nan=False) + "\n", encoding="utf-8")
        return folder.num_written


def _feature(row: Row, numbering: Numbering) -> Row | None:
    """Return the annotation of a row, or None for an empty mask.

    Raises:
        ImageError: the mask is damaged.
    """
    color = prompt_colors(numbering[row["prompt"]])[-1]
    polygons = [[_close(ring) for ring in polygon] for polygon in trace_edges(decode_ok_row(row))]
    if not polygons:
        return None
    properties: Row = {
        "objectType": "annotation",
        "classification": {"name": row["prompt"], "color": list(color)},
        "isLocked": False,
    }
    confidence = row["confidence"]
    if confidence is not None and math.isfinite(confidence):
        # a list, because QuPath before 0.4 reads no other form
        properties["measurements"] = [{"name": "confidence", "value": confidence}]
    if metadata := {name: str(value) for name, value in carried_values(row).items() if value is not None}:
        properties["metadata"] = metadata
    # equal for each export of a run
    name = uuid.uuid5(uuid.NAMESPACE_URL, repr((row["image_uri"], row["selector"], row["prompt"], row["kind"])))
    geometry = {"type": "MultiPolygon", "coordinates": polygons}
    return {"type": "Feature", "id": str(name), "geometry": geometry, "properties": properties}


def _close(ring: Ring) -> list[list[int]]:
    """Return the corners of a ring with the first one repeated, as GeoJSON has it."""
    corners: list[list[int]] = drop_straight(ring).tolist()
    return [*corners, corners[0]]
