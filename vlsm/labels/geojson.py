"""Reads GeoJSON files of QuPath: one file per image, named after the image.

The rules:

- Each file counts as reviewed: without an object of a class, the mask of this prompt is empty.
- Objects of one class are joined, annotations and detections alike. The class is the prompt. An object without a class
  is refused, unless the run has one prompt only: `label` is None then.
- Polygons and multi-polygons count; lines, points and others are no masks: the image is refused.
- The files do not state the size of an image. Corners far outside of it are refused.
"""

import re
from collections.abc import Iterator
from typing import Any

from vlsm.errors import ManifestError
from vlsm.labels.reviews import Outline, Review, dict_of, list_of, text_of

ENDING = re.compile(r"\.(?:geo)?json$", re.IGNORECASE)
UNLABELLED = ""  # label of an object without a class

Item = dict[str, Any]


def read_geojson(content: Any, where: str, name: str) -> Iterator[Review]:
    """Yield the review of the image of a file.

    Args:
        content: the value of the JSON file.
        where: the file, for messages.
        name: path of the file below the folder of all files.

    Raises:
        ManifestError: it is no GeoJSON.
    """
    kind = dict_of(content).get("type")
    features = (
        content
        if isinstance(content, list)
        else [content]
        if kind == "Feature"
        else content["features"]
        if (kind == "FeatureCollection" and isinstance(content.get("features"), list))
        else None
    )
    if features is None:
        raise ManifestError(f"{where} is no GeoJSON: it is no FeatureCollection, no Feature and no list of them")
    review = Review(where, (ENDING.sub("", name),))
    try:
        for number, feature in enumerate(map(dict_of, features), start=1):
            for outline in _read_outlines(dict_of(feature.get("geometry")), f"object {number}"):
                review.shapes.setdefault(_label(dict_of(feature.get("properties"))), []).append(outline)
    except ManifestError as error:
        review.problem = str(error)
    yield review


def _label(properties: Item) -> str:
    """Return the class of an object: its name, or its parts as QuPath shows them."""
    classification = dict_of(properties.get("classification"))
    names = [text for value in list_of(classification.get("names")) if (text := text_of(value))]
    return text_of(classification.get("name")) or ": ".join(names) or UNLABELLED


def _read_outlines(geometry: Item, where: str) -> list[Outline]:
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    polygons = {"Polygon": [coordinates], "MultiPolygon": coordinates}.get(str(kind))
    if not isinstance(polygons, list):
        raise ManifestError(f"{where} is a {str(kind)[:40]!r}; only polygons are masks")
    return [Outline(tuple(_flatten(ring, where) for ring in _rings(polygon, where))) for polygon in polygons]


def _rings(polygon: Any, where: str) -> list[Any]:
    if not list_of(polygon):
        raise ManifestError(f"{where} has a polygon without corners")
    return list_of(polygon)


def _flatten(ring: Any, where: str) -> list[Any]:
    """Return x and y of the corners of a ring in turn, without the last one, which repeats the first."""
    corners = list_of(ring)
    if not all(isinstance(corner, list) and len(corner) >= 2 for corner in corners):
        raise ManifestError(f"{where} has corners that are no pairs of numbers")
    if len(corners) > 1 and corners[0] == corners[-1]:
        corners = corners[:-1]
    return [number for corner in corners for number in corner[:2]]
