"""COCO files as datasets: one record per image and category, with the category's name as its prompt.

The rules:

- Annotations of one category in one image are joined, crowds too. Categories of the same name are one category.
- A category without annotations in an image makes no record, unless `data.absent_classes` is "empty". So images without
  annotations are left out; a line of the log counts them.
- An annotation with a box but without a segmentation is an error: a box is no mask.
- The split is a word of _SPLITS in the name of the file (`instances_train2017.json`), or else the name of its folder
  (`valid/_annotations.coco.json`). Otherwise it is empty.
- `file_name` is a path below one folder of images, the same for all images of a file. It never leads out of the folder.
  `_folders` lists the candidates. Ten images are looked for, and the folder with the most of them is chosen.

Source: https://cocodataset.org/#format-data.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vlsm import storage
from vlsm.datasets.coco_shapes import encode_segmentation, join
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.documents import parse_json
from vlsm.errors import ImageError, ManifestError
from vlsm.images.fetch import read_image_bytes
from vlsm.images.formats import file_name

logger = logging.getLogger("vlsm")

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAMES = ("_annotations.coco.json", "annotations.json", "coco.json")  # of Roboflow, of others, of our own export
_NUM_PROBED = 10  # images that are looked for in the candidate folders

Item = dict[str, Any]
Key = int | str


@dataclass(frozen=True)
class CocoFile:
    """A COCO file of a dataset.

    Attributes:
        uri: its location.
        root: the folder of the dataset.
    """

    uri: str
    root: str

    @property
    def split(self) -> str:
        """The split that its name or the name of its folder states; empty if there is not exactly one."""
        found = {_SPLITS[word] for word in re.findall("[a-z]+", _stem(self.uri).lower()) if word in _SPLITS}
        if len(found) == 1:
            return found.pop()
        return _SPLITS.get(storage.parent(self.uri).rpartition("/")[2].lower(), "")


@dataclass
class _Image:
    """An image, and the run lengths of its annotations by the name of their category."""

    name: str
    size: tuple[int, int]
    shapes: dict[str, list[Item]] = field(default_factory=dict)


def find_coco(uri: str) -> list[CocoFile]:
    """Return the COCO files of a dataset, or an empty list if it is another one.

    Args:
        uri: a JSON file, or a folder. In a folder, the first of these count that are there:
            `annotations/instances*.json`; files of `annotations/` with a split in their names;
            `_annotations.coco.json`, `annotations.json` or `coco.json` in folders with the name of a split; these files
            in the folder itself.
    """
    if file_name(uri).endswith(".json"):
        folder = storage.parent(uri)
        root = folder.rpartition("/")[0] if folder.endswith("/annotations") else folder
        return [CocoFile(uri, root)] if storage.exists(uri) else []
    listed = [name for name in storage.list_names(storage.join(uri, "annotations")) if name.endswith(".json")]
    files = [CocoFile(storage.join(uri, "annotations", name), uri) for name in listed]
    instances = [file for file in files if _stem(file.uri).startswith("instances")]
    return (
        instances
        or [file for file in files if file.split]
        or [file for split in _SPLITS for file in _files_in(storage.join(uri, split), uri)]
        or _files_in(uri, uri)
    )


def _files_in(folder: str, root: str) -> list[CocoFile]:
    """Return the COCO file in a folder, if there is one."""
    uris = (storage.join(folder, name) for name in _NAMES)
    return [CocoFile(uri, root) for uri in uris if storage.exists(uri)][:1]


def read_coco(
    name: str, files: list[CocoFile], settings: DatasetSettings | None = None
) -> Iterator[Record | ManifestError]:
    """Yield the record of each image and category, and the error of each invalid image or annotation.

    Args:
        name: name of the dataset.
        files: as found by `find_coco`.
        settings: of the dataset; None for the defaults.

    Raises:
        ManifestError: a file cannot be read, is not in the format of COCO, or its images are in none of the folders.
    """
    for file in files:
        yield from _read_file(name, file, settings or DatasetSettings())


def _read_file(name: str, file: CocoFile, settings: DatasetSettings) -> Iterator[Record | ManifestError]:
    content = _load(file.uri, settings)
    problems: list[ManifestError] = []
    categories = _read_categories(content["categories"], file.uri, problems)
    images = _read_images(content["images"], file.uri, settings.max_pixels, problems)
    _add_annotations(content["annotations"], images, categories, file.uri, problems)
    yield from problems
    if not images:
        return
    folder = _choose_folder(file, [image.name for image in images.values()], settings.image_folders.get(name))
    names = list(dict.fromkeys(categories.values()))
    is_empty_kept = settings.absent_classes == "empty"
    for key, image in images.items():
        for category in names if is_empty_kept else [known for known in names if known in image.shapes]:
            yield Record(
                name,
                file.split,
                f"{file.uri}, image {key}, category {category!r}",
                storage.join(folder, image.name),
                file.uri,
                {"p1": (category,)},
                mask_rle=join(image.shapes.get(category, []), image.size),
                mask_size=image.size,
            )
    if num_bare := sum(not image.shapes for image in images.values()):
        used = (
            "are examples with empty masks" if is_empty_kept else "are left out (data.absent_classes=empty keeps them)"
        )
        logger.info("%s: %d of %d images have no annotations; they %s", file.uri, num_bare, len(images), used)


def _load(uri: str, settings: DatasetSettings) -> dict[str, list[Any]]:
    """Return the three lists of a COCO file."""
    try:
        data = read_image_bytes(uri, None, settings.max_image_bytes, allow=settings.allow)
    except ImageError as error:
        raise ManifestError(f"{uri} cannot be read: {error}") from error
    content = parse_json(data, uri, ManifestError)
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ManifestError(f"{uri} is not in the format of COCO: it has no list of {' and '.join(missing)}")
    return {key: content[key] for key in lists}


def _read_categories(items: list[Any], uri: str, problems: list[ManifestError]) -> dict[Key, str]:
    """Return the name of each category by its id."""
    categories: dict[Key, str] = {}
    for number, item in enumerate(items, start=1):
        key, category = _fields(item, "id", "name")
        if _is_key(key) and _is_text(category) and key not in categories:
            categories[key] = category
        else:
            problems.append(ManifestError(f"{uri}, category {number}: it needs an id of its own and a name"))
    return categories


def _read_images(items: list[Any], uri: str, max_pixels: int, problems: list[ManifestError]) -> dict[Key, _Image]:
    images: dict[Key, _Image] = {}
    for number, item in enumerate(items, start=1):
        where = f"{uri}, image {number}"
        key, name, height, width = _fields(item, "id", "file_name", "height", "width")
        try:
            if not _is_key(key) or key in images:
                raise ManifestError(f"{where}: its id is {key!r:.80}; every image needs an id of its own")
            if type(height) is not int or type(width) is not int or not 0 < height * width <= max_pixels or height < 0:
                raise ManifestError(
                    f"{where}: its height and width are {height!r:.20} and {width!r:.20}; they must be pixels, "
                    f"at most data.max_pixels ({max_pixels:,}) together"
                )
            images[key] = _Image(_file_name(name, where), (height, width))
        except ManifestError as error:
            problems.append(error)
    return images


def _add_annotations(
    items: list[Any], images: dict[Key, _Image], categories: dict[Key, str], uri: str, problems: list[ManifestError]
) -> None:
    """Give each image the run lengths of its annotations."""
    boxes = []
    for number, item in enumerate(items, start=1):
        where = f"{uri}, annotation {number}"
        image_id, category_id, segmentation, box = _fields(item, "image_id", "category_id", "segmentation", "bbox")
        image = images.get(image_id) if _is_key(image_id) else None
        category = categories.get(category_id) if _is_key(category_id) else None
        if image is None or category is None:
            problem = f"image_id is {image_id!r:.80}" if image is None else f"category_id is {category_id!r:.80}"
            problems.append(ManifestError(f"{where}: {problem}; there is no valid one of this id"))
        elif not segmentation and box:
            boxes.append(number)
        else:
            try:
                rle = encode_segmentation(segmentation, image.size, where)
                image.shapes.setdefault(category, []).append(rle)
            except ManifestError as error:
                problems.append(error)
    if boxes:
        described = f"{len(boxes):,} of {len(items):,} annotations have a box but no segmentation"
        problems.append(ManifestError(f"{uri}: {described}, the first is number {boxes[0]}; a box is no mask"))


def _fields(item: Any, *names: str) -> list[Any]:
    """Return values of an object; None for those that it lacks, and if it is no object."""
    return [item.get(name) if isinstance(item, dict) else None for name in names]


def _is_key(value: Any) -> bool:
    return type(value) in (int, str)


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that can be written as UTF-8, and not blank."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff\0]", value)


def _file_name(name: Any, where: str) -> str:
    """Return the path of an image below the folder of images. A path that leaves it is an error."""
    if not _is_text(name):
        raise ManifestError(f"{where}: file_name is {name!r:.80}; it must name a file")
    parts = PurePosixPath(name.replace("\\", "/")).parts  # Windows writes backslashes
    if parts[:1] in ((), ("/",), ("//",)) or ".." in parts or "://" in name or re.match("[A-Za-z]:", name):
        raise ManifestError(f"{where}: file_name is {name!r:.200}; it must be a path below the folder of the images")
    return "/".join(parts)


def _choose_folder(file: CocoFile, names: list[str], chosen: str | None) -> str:
    """Return the folder that the file names start from.

    Raises:
        ManifestError: none of the probed images is in any candidate.
    """
    if chosen is not None:
        return storage.absolute(chosen)
    probed = names[:: -(-len(names) // _NUM_PROBED)]
    counts: dict[str, int] = {}
    for folder in _folders(file):
        counts[folder] = sum(storage.exists(storage.join(folder, name)) for name in probed)
        if counts[folder] == len(probed):
            break
    best = max(counts, key=lambda folder: counts[folder])
    if not counts[best]:
        looked = ", ".join(counts)
        raise ManifestError(
            f"{file.uri}: its images, such as {probed[0]!r}, are in none of the folders {looked}; "
            "data.image_folders names their folder"
        )
    return best


def _folders(file: CocoFile) -> list[str]:
    """Return the folders where the images of a file may be, the usual ones first.

    These are the file's folder, the dataset's folder, and its folders `images` and `data`. Then come folders in the
    dataset's folder and in `images`: with the file's name without "instances_" (train2017), or a word for its split.
    """
    folders = [storage.parent(file.uri), file.root, *(storage.join(file.root, name) for name in ("images", "data"))]
    subset = re.sub("^instances_", "", _stem(file.uri))
    words = [subset, *(word for word, split in _SPLITS.items() if split == file.split)]
    return list(dict.fromkeys([*folders, *(storage.join(folder, word) for word in words for folder in folders[1:3])]))


def _stem(uri: str) -> str:
    return storage.without_query(uri).rpartition("/")[2].rpartition(".")[0]
