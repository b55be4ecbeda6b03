"""Lists the images inside a Parquet file, with the columns that the file states for each: prompts, image_id, others."""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from vlsm.archive.carried import CARRIED_ROWS, STATED, Carried
from vlsm.archive.columns import CARRIED, Columns, Row
from vlsm.archive.manifest import check_text, read_prompts, read_text
from vlsm.archive.tables import read_partition
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import Inside, Look, describe_other, list_frames
from vlsm.images.parquet import PARQUET_ERRORS, ParquetImages, kind_by_bytes, kind_by_name, read_texts

logger = logging.getLogger("vlsm")


def list_rows(
    file: BinaryIO, uri: str, look: Look, skipped: Counter[str], carried: Carried | None = None
) -> list[Inside]:
    """Return the images of a Parquet file, in the order of its rows. A file without images has none.

    Their bytes are read only where they decide the number of images or windows: a row with a TIFF, DICOM or NIfTI file,
    by its name, and every row if images are cut into windows.

    Args:
        file: the opened file.
        uri: of the file. Folders such as prompt=polyp in it are columns, as in Hive.
        look: options for listing.
        skipped: counter of skipped files, by description; this function adds to it.
        carried: further columns; each image states their values as `carried`, by their names in the results.

    Raises:
        ImageError: the file cannot be read, or it has several columns of images.
        ManifestError: a prompt, an image_id or a further value in it cannot be used.
    """
    images = ParquetImages(file, look.columns.get("image"))
    if images.column is None:
        skipped[f"{describe_other(uri)} without images"] += 1
        return []
    try:
        rows = list(_read_rows(images, uri, look, carried))
    except ImageError as error:
        if carried is None:
            raise
        rows = list(_read_rows(images, uri, look, None))  # it fails too if more than further columns is damaged
        for _, _, stated in rows:
            stated["carried"] = carried.collect({}, uri)
        logger.warning("%s: further columns cannot be read, so its images have none: %s", uri, error)
    return [image for row, path, stated in rows for image in _list_row(images, row, path, stated, look)]


def _read_rows(
    images: ParquetImages, uri: str, look: Look, carried: Carried | None
) -> Iterator[tuple[int, str | None, Row]]:
    """Yield the number of each row, the path of its image, and the columns of the plan that the row states."""
    columns = Columns(look.columns, carried=carried)
    found = columns.find(images.schema.names, uri)
    names = {
        known: images.schema.names[position]
        for known, position in found.items()
        if known in STATED or (known.startswith(CARRIED) and images.schema.names[position] != images.column)
    }
    folder = _read_folders(columns, uri, carried)
    for known in STATED:
        if known in look.columns and known not in names and known not in folder:
            raise ManifestError(f"columns.{known} is {look.columns[known]!r}; {uri} has no such column")
    positions = {known: position for position, known in enumerate(names)}
    convert = partial(_read_cells, list(names.items()), carried, uri)
    batch_rows = 4096 if carried is None else CARRIED_ROWS
    for row, (path, cells) in enumerate(images.read_cells(list(names.values()), convert, batch_rows)):
        where = f"{uri}, row {row}"
        yield row, path, _state(folder | columns.read(cells, positions, where), carried, where)
    columns.report(uri)


def _read_folders(columns: Columns, uri: str, carried: Carried | None) -> Row:
    """Return the columns that the folders of a file state. Columns travel from folders below INPUT only."""
    partition, inner = read_partition(uri), {}
    if carried is not None and uri.startswith(f"{carried.folder.rstrip('/')}/"):
        inner = read_partition(uri, carried.folder)
    found = columns.find(tuple(partition), uri)
    names = list(partition)
    known = {name: place for name, place in found.items() if name in STATED or names[place] in inner}
    return columns.read([inner.get(name, value) for name, value in partition.items()], known, uri)


def _read_cells(
    names: list[tuple[str, str]], carried: Carried | None, uri: str, position: int, column: pa.Array
) -> list[Any]:
    """Return the cells of a column by its position among these (known name, name in the file)."""
    known, name = names[position]
    if carried is None or not known.startswith(CARRIED):
        return read_texts(column)
    try:
        return carried.read(known, column)
    except PARQUET_ERRORS as error:
        hint = "" if "carry=" in str(error) else "; leave it out with the setting carry"
        raise ManifestError(f"{uri}: column {name!r}: {error}{hint}") from error


def _state(values: Row, carried: Carried | None, where: str) -> Row:
    """Return the columns of the plan that a row states, checked."""
    stated: Row = {}
    if (image_id := read_text(values.get("image_id"))) is not None:
        stated["image_id"] = image_id
    if prompts := read_prompts(values, (), where):
        stated["prompts"] = prompts
    for text in (image_id or "", *prompts):
        check_text(text, where)
    if carried is not None:
        stated["carried"] = carried.collect(values, where)
    return stated


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
