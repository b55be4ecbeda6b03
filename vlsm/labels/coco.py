"""Reads COCO files of corrected masks: those of CVAT ("COCO 1.0"), and of other tools.

The rules:

- Each image of the file counts as reviewed. Without an annotation of a category, the mask of this prompt is empty.
- Annotations of one category in one image are joined. Polygons and run lengths count; a box alone is no mask: the image
  is refused.
"""

from collections.abc import Iterator
from typing import Any

from vlsm.errors import ManifestError
from vlsm.labels.reviews import Review, Segmentation, dict_of, list_of, size_of, text_of

Item = dict[str, Any]


def read_coco_reviews(content: Any, where: str) -> Iterator[Review]:
    """Yield the review of each image.

    Args:
        content: the value of the JSON file.
        where: the file, for messages.

    Raises:
        ManifestError: it is no COCO file.
    """
    lists = ("images", "annotations", "categories")
    missing = [name for name in lists if not isinstance(dict_of(content).get(name), list)]
    if missing:
        raise ManifestError(f"{where} is not in the format of COCO: it has no list of {' and '.join(missing)}")
    categories = {_key(item): text_of(item.get("name")) for item in map(dict_of, content["categories"])}
    reviews: dict[Any, Review] = {}
    for number, item in enumerate(map(dict_of, content["images"]), start=1):
        place, key, name = f"{where}, image {number}", _key(item), text_of(item.get("file_name"))
        size = size_of(item.get("height"), item.get("width"))
        if key is None or key in reviews or name is None or size is None:
            raise ManifestError(f"{place}: it needs an id of its own, a file_name, a height and a width")
        reviews[key] = Review(place, (name,), size)
    for number, item in enumerate(map(dict_of, content["annotations"]), start=1):
        review, category = reviews.get(_key(item, "image_id")), categories.get(_key(item, "category_id"))
        if review is None:
            raise ManifestError(f"{where}, annotation {number}: there is no image with its image_id")
        segmentation = item.get("segmentation")
        if category is None:
            review.problem = f"annotation {number}: there is no category with its category_id"
        elif not segmentation or (isinstance(segmentation, list) and not all(map(list_of, segmentation))):
            review.problem = f"annotation {number} of {category!r} has no segmentation; a box is no mask"
        else:
            review.shapes.setdefault(category, []).append(Segmentation(segmentation))
    yield from reviews.values()


def _key(item: Item, name: str = "id") -> int | str | None:
    value = item.get(name)
    return value if type(value) in (int, str) else None
