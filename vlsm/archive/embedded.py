"""Lists the images inside a Parquet file, with the prompts and the image_id that the file states for each."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from vlsm.archive.columns import Columns, Row
from vlsm.archive.manifest import check_text, read_prompts, read_text
from vlsm.archive.tables import read_partition
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import Inside, Look, describe_other, list_frames
from vlsm.images.parquet import ParquetImages, kind_by_bytes, kind_by_name

_STATED = ("image_id", "prompt", "prompts")  # columns that have the same meaning as in a manifest


def list_rows(file: BinaryIO, uri: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    """Return the images of a Parquet file, in the order of its rows. A file without images has none.

    Their bytes are read only where they decide the number of images or windows: a row with a TIFF, DICOM or NIfTI file,
    by its name, and every row if images are cut into windows.

    Args:
        file: the opened file.
        uri: of the file. Folders such as prompt=polyp in it are columns, as in Hive.
        look: options for listing.
        skipped: counter of skipped files, by description; this function adds to it.

    Raises:
        ImageError: the file cannot be read, or it has several columns of images.
        ManifestError: a prompt or an image_id in it cannot be used.
    """
    images = ParquetImages(file, look.columns.get("image"))
    if images.column is None:
        skipped[f"{describe_other(uri)} without images"] += 1
        return []
    return [
        image
        for row, path, stated in _read_rows(images, uri, look)
        for image in _list_row(images, row, path, stated, look)
    ]


def _read_rows(images: ParquetImages, uri: str, look: Look) -> Iterator[tuple[int, str | None, Row]]:
    """Yield the number of each row, the path of its image, and the columns of the plan that the row states."""
    columns = Columns(look.columns)
    found = columns.find(images.schema.names, uri)
    names = {known: images.schema.names[found[known]] for known in _STATED if known in found}
    partition = read_partition(uri)
    folder = columns.read(list(partition.values()), columns.find(tuple(partition), uri), uri)
    for known in _STATED:
        if known in look.columns and known not in names and known not in folder:
            raise ManifestError(f"columns.{known} is {look.columns[known]!r}; {uri} has no such column")
    positions = {known: position for position, known in enumerate(names)}
    for row, (path, cells) in enumerate(images.read_cells(list(names.values()))):
        where = f"{uri}, row {row}"
        values = folder | columns.read(cells, positions, where)
        stated: Row = {}
        if (image_id := read_text(values.get("image_id"))) is not None:
            stated["image_id"] = image_id
        if prompts := read_prompts(values, (), where):
            stated["prompts"] = prompts
        for text in (image_id or "", *prompts):
            check_text(text, where)
        yield row, path, stated
    columns.report(uri)


def _list_row(images: ParquetImages, row: int, path: str | None, stated: Row, look: Look) -> list[Inside]:
    """Return the images in one row. A damaged row gives one item with a problem."""
    selector = f"row={row}"
    kind = kind_by_name(images.column, path)
    if kind in (None, "image") and look.tile.size is None:
        return [Inside(selector, stated=stated)]
    try:
        data, _ = images.read(row, selector)
        opening: Any = lambda: io.BytesIO(data)  # noqa: E731 - the type that list_frames takes
        found = list_frames(opening, selector, len(data), look, kind=kind or kind_by_bytes(data, selector))
    except ImageError as error:
        found = [Inside(problem=str(error))]
    except Exception as error:  # damage of any kind; the file object records the errors of its store
        found = [Inside(problem=str(ImageError("corrupt", f"{selector}: {error or type(error).__name__}")))]
    return [
        replace(image, selector=f"{selector}#{image.selector}" if image.selector else selector, stated=stated)
        for image in found
    ]
