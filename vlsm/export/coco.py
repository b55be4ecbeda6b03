"""Export masks as a COCO file, for tools that import it together with the images."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools import mask as coco

from vlsm import storage
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.links import ImageLinks, LinkPrefix
from vlsm.export.origins import Filters, Numbering, read_settings
from vlsm.runs.carried import CARRIED, as_json
from vlsm.runs.record import read_record
from vlsm.runs.results import check_columns, decode_ok_row, open_results, read_ok_rows
from vlsm.version import __version__

Row = dict[str, Any]


def export_coco(
    output: str,
    directory: str | Path | ExportFolder,
    filters: Filters = None,
    limit: int | None = None,
    components: bool = False,
) -> int:
    """Write `DIR/coco.json`: one category per prompt, one annotation per mask that is not empty; return their number.

    `score` is the confidence; `attributes` of an image and of its annotations are its columns of a list. An image whose
    masks are all empty has no annotations. `FileNames` has the rule for `file_name`; the files lie below
    `info.image_folder`. `DIR/index.csv` maps each `file_name` to its image, and lists the rows that cannot be exported.
    The use of memory is about 200 bytes per image.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.
        components: write one annotation for each connected component of a mask. Pixels of a component share sides. All
            components of a mask have its confidence as their score.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    with open_folder(directory) as folder:
        return write_coco(output, folder, filters, limit, components=components)[0]


def write_coco(  # noqa: PLR0913 - the options of all exports as COCO
    output: str,
    folder: ExportFolder,
    filters: Filters,
    limit: int | None,
    name: str = "coco.json",
    components: bool = False,
    use_image: Callable[[str, str], str] = lambda name, link: name,
    prefixes: Sequence[LinkPrefix] = (),
    iscrowd: int = 0,
) -> tuple[int, list[str]]:
    """Write a COCO file; return the number of its annotations, and its prompts.

    Args:
        output: as for `export_coco`.
        folder: the folder of the file.
        filters: as for `export_coco`.
        limit: as for `export_coco`.
        name: name of the file.
        components: as for `export_coco`.
        use_image: is called for each image with its name and its link, and returns its `file_name`.
        prefixes: other beginnings of the links.
        iscrowd: value of this field: 1 makes datumaro, which CVAT uses, keep run lengths when it writes them.

    Raises:
        ConfigError: as for `export_coco`.
    """
    check_columns((column for column, *_ in filters or ()), open_results(output).schema)  # before a file is written
    links, numbering = ImageLinks(output, prefixes), Numbering(read_settings(output))
    with (
        folder.new(name).open("w", encoding="utf-8") as file,
        # the lists of images and of annotations grow together: the second one is collected beside the first
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as collected,
    ):
        images, annotations = _List(file), _List(collected)
        file.write(f'{{"info": {json.dumps(_info(output, links.names.folder))}, "licenses": [], "images": [')
        numbers: dict[bytes, int] = {}
        for row in read_ok_rows(output, filters, limit, ["confidence"]):
            with folder.attempt([row]):
                shapes = _shapes(row, components)
                key = _key(row)
                if key not in numbers:
                    numbers[key] = len(numbers) + 1
                    images.write(_image(numbers[key], use_image(*links.name(row)), row, folder))
                facts = {"image_id": numbers[key], "category_id": numbering[row["prompt"]]} | _score(row)
                facts |= _attributes(row)
                for shape in shapes:
                    annotations.write({"id": annotations.length + 1} | facts | shape | {"iscrowd": iscrowd})
        file.write('], "annotations": [')
        collected.seek(0)
        file.writelines(collected)
        categories = [
            {"id": number, "name": prompt, "supercategory": ""} for prompt, number in numbering.numbers.items()
        ]
        file.write(f'], "categories": {json.dumps(categories)}}}\n')
    links.report()
    return annotations.length, list(numbering.numbers)


class _List:
    """Writes the items of a JSON list, without its brackets, to a file."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.length = file, 0

    def write(self, item: Row) -> None:
        self._file.write(("\n" if not self.length else ",\n") + json.dumps(item, allow_nan=False))
        self.length += 1


def _info(output: str, image_folder: str) -> Row:
    """Return the field `info`. It is equal for each export of a run. pycocotools 2.0.9 and 2.0.10 require it."""
    planned_at = str((read_record(storage.absolute(output)) or {}).get("planned_at") or "")
    return {
        "description": "Masks of a segment run of vlsm",
        "version": __version__,
        "year": int(planned_at[:4]) if planned_at[:4].isdecimal() else "",
        "date_created": planned_at[:10],
        "contributor": "",
        "url": "",
        "image_folder": image_folder,
    }


def _key(row: Row) -> bytes:
    """Return a digest of the image of a row. Different images may have the same image_id in a list."""
    return hashlib.blake2b(repr((row["image_uri"], row["selector"])).encode(), digest_size=16).digest()


def _image(number: int, file_name: str, row: Row, folder: ExportFolder) -> Row:
    """Return an item of `images`, and note it in the index."""
    folder.note(file_name, row | {"prompt": "", "kind": ""})
    size = {"height": row["height"], "width": row["width"]}
    return {"id": number, "file_name": file_name} | size | _attributes(row)


def _attributes(row: Row) -> Row:
    """Return the columns of the list as the field `attributes`, if there are any. JSON has texts for dates."""
    values = {name: as_json(value) for name, value in row[CARRIED].items()}
    return {"attributes": values} if values else {}


def _score(row: Row) -> Row:
    """Return the score of a row, if it has one: JSON cannot express NaN."""
    confidence = row["confidence"]
    return {"score": confidence} if confidence is not None and math.isfinite(confidence) else {}


def _shapes(row: Row, components: bool) -> list[Row]:
    """Return the fields that describe the mask of a row: one item, one per component, or no item for an empty mask.

    Raises:
        ImageError: the mask is damaged.
    """
    mask = decode_ok_row(row)
    if not mask.any():
        return []
    rle = {"size": [row["height"], row["width"]], "counts": row["mask_rle"].encode("ascii")}
    return [_shape(part) for part in (_split_components(mask, rle) if components else [rle])]


def _shape(rle: Row) -> Row:
    return {
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
        "area": int(coco.area(rle)),
        "bbox": [int(edge) for edge in coco.toBbox(rle)],
    }


def _split_components(mask: np.ndarray, rle: Row) -> Iterator[Row]:
    """Yield the run lengths of each connected component, from left to right.

    The time does not depend on the number of components: one mask per component would take too long for noise.

    Args:
        mask: (H, W) uint8 of 0 and 1, column-major in memory, not empty.
        rle: its run lengths.
    """
    from scipy import ndimage

    by_column, count = ndimage.label(mask.T)
    if count == 1:  # most masks
        yield rle
        return
    labels = by_column.ravel()  # the order of run lengths
    inside = np.flatnonzero(labels)
    by_component = inside[np.argsort(labels[inside], kind="stable")]
    ends = np.cumsum(np.bincount(labels[inside])[1:])
    for pixels in np.split(by_component, ends[:-1]):
        last = np.append(np.diff(pixels) > 1, True)  # whether a pixel is the last one of a run
        first = np.append(True, last[:-1])
        edges = np.column_stack([pixels[first], pixels[last] + 1]).ravel()
        counts = np.diff(edges, prepend=0).tolist()
        if edges[-1] < labels.size:
            counts.append(labels.size - int(edges[-1]))
        yield coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
