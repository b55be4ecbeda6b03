"""Reads the JSON export of Label Studio.

The rules:

- A task without annotations was not reviewed. A task whose annotations were all skipped is rejected.
- Of several annotations of a task, the one that is marked as ground truth counts, else the latest one.
- Regions of brushes and polygons count; boxes, ellipses and other regions are no masks: the image is refused.
- A region with several labels belongs to each of them.
- A task of our own export names its image and its prompts. Any other one is found by the link of its image.
"""

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlsm.errors import ManifestError
from vlsm.labels.reviews import Brush, Outline, Review, Shape, dict_of, list_of, size_of, text_of

_UPLOAD = re.compile(r"(?:^|/)upload/(?:\d+/)?[0-9a-f]{8}-([^/]+)$")  # Label Studio puts a digest before the name
_MASKS = ("brush", "brushlabels", "magicwand", "polygon", "polygonlabels")
_OTHERS = ("rectangle", "ellipse", "keypoint", "vector", "bitmask", "cuboid")  # beginnings of other regions

Item = dict[str, Any]


def read_tasks(content: Any, where: str) -> Iterator[Review]:
    """Yield the review of each task that has annotations.

    Args:
        content: the value of the JSON file.
        where: the file, for messages.

    Raises:
        ManifestError: it is not the JSON export of Label Studio.
    """
    tasks = content if isinstance(content, list) else [content]
    for number, task in enumerate(tasks, start=1):
        place = f"{where}, task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise ManifestError(f"{place} has no data; export the project as JSON, not as JSON-MIN")
        annotations = task.get("annotations", task.get("completions"))
        is_list = isinstance(annotations, list) and all(isinstance(each, dict) for each in annotations)
        if annotations is not None and not is_list:
            review = _read_task(task["data"], [], place)
            review.is_rejected, review.problem = False, "its annotations are no list of objects"
            yield review
        elif annotations:
            yield _read_task(task["data"], annotations, place)


def _read_task(data: Item, annotations: list[Item], where: str) -> Review:
    uri, selector = text_of(data.get("image_uri")), text_of(data.get("selector"))
    links = [
        _name_of(value) for name, value in data.items() if name not in ("image_uri", "image_id") and _is_link(value)
    ]
    stated = [text for name in ("image_id", "image_uri") if (text := text_of(data.get(name)))]
    prompts = data.get("prompts")
    review = Review(
        where,
        tuple(stated or links),
        key=(uri, selector) if uri else None,
        prompts=tuple(map(str, prompts)) if isinstance(prompts, list) else None,
    )
    valid = [each for each in annotations if not (each.get("was_cancelled") or each.get("skipped"))]
    if not valid:
        review.is_rejected = True
        return review
    result = max(enumerate(valid), key=_rank)[1].get("result")
    try:
        if not isinstance(result, list) or not all(isinstance(item, dict) for item in result):
            raise ManifestError("its result is no list of regions")
        _add_regions(result, review)
    except (ManifestError, ValueError, TypeError) as error:
        review.problem = str(error)
    return review


def _rank(numbered: tuple[int, Item]) -> tuple[bool, str, int]:
    """Return what orders the annotations of a task: times in ISO 8601 have the order of their texts."""
    number, annotation = numbered
    time = text_of(annotation.get("updated_at")) or text_of(annotation.get("created_at")) or ""
    return annotation.get("ground_truth") is True, time, number


def _is_link(value: Any) -> bool:
    return isinstance(value, str) and "/" in value


def _name_of(link: str) -> str:
    """Return the name of an image in a link: the path of a local file, or that of an upload without its digest."""
    path, _, query = link.partition("?")
    local = urllib.parse.parse_qs(query).get("d", [""])[0]
    is_url = "://" in link or link.startswith("/data/")
    name = local or (urllib.parse.unquote(path) if is_url else link)
    return found[1] if (found := _UPLOAD.search(name)) else name


def _add_regions(result: list[Any], review: Review) -> None:
    """Add the regions of an annotation to a review.

    Raises:
        ManifestError, ValueError, TypeError: a region is damaged or is no mask.
    """
    labels: dict[Any, list[str]] = {}  # by the id of a region: a region and its labels may be items of their own
    regions: dict[Any, Shape] = {}
    for number, item in enumerate(map(dict_of, result)):
        kind, value = str(item.get("type", "")).lower(), dict_of(item.get("value"))
        key = item.get("id") if isinstance(item.get("id"), str) else number
        for name in (kind, "labels"):
            labels.setdefault(key, []).extend(map(str, list_of(value.get(name))))
        if kind in _MASKS:
            regions[key] = _read_region(item, value, review)
        elif kind.startswith(_OTHERS):
            raise ManifestError(f"a region is a {kind!r}; only brushes and polygons are masks")
    for key, shape in regions.items():
        if not labels[key]:
            raise ManifestError("a region has no label")
        for label in dict.fromkeys(labels[key]):
            review.shapes.setdefault(label, []).append(shape)


def _read_region(item: Item, value: Item, review: Review) -> Shape:
    size = size_of(item.get("original_height"), item.get("original_width"))
    if size is None or review.size not in (None, size):
        raise ManifestError("a region states no size of the image, or another one than the region before it")
    if item.get("image_rotation"):
        raise ManifestError("the image was rotated in Label Studio; rotate it back and submit it again")
    if item.get("item_index"):
        raise ManifestError("the task has several images; only tasks with one image are read")
    review.size = size
    if "points" in value:
        points = np.array(value["points"], np.float64)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ManifestError("the corners of a polygon are no pairs of numbers")
        return Outline(((points * (size[1], size[0]) / 100).ravel().tolist(),))
    if value.get("format") != "rle" or not isinstance(value.get("rle"), list):
        raise ManifestError("the mask of a brush has no run lengths")
    return Brush(bytes(value["rle"]))
