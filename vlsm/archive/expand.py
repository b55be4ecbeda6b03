"""Expands container files into one row per image while the listing continues."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from PIL import Image

from vlsm import storage
from vlsm.archive.carried import Carried
from vlsm.archive.embedded import list_rows
from vlsm.errors import ImageError, StorageError
from vlsm.images.containers import list_images
from vlsm.images.fetch import WatchedFile, image_errors
from vlsm.images.formats import (
    UNNAMED,
    Inside,
    Look,
    data_uris,
    header_of,
    is_archive,
    is_header,
    kind_of,
    split_selector,
)
from vlsm.words import count

logger = logging.getLogger("vlsm")

_AHEAD = 32  # files whose headers are read in parallel, because stores answer slowly
_ARCHIVES_AHEAD = 4  # fewer for tar and zip: each may hold a hundred thousand images
_SHOWN_FIELDS = 5  # that a message names
_ARCHIVE_BLOCK, _HEADER_BLOCK = 1 << 20, 1 << 16  # bytes per request to a store
_MAX_HEADER_BYTES = 1 << 20  # of a file whose values are in a second file

Row = dict[str, Any]
Found = tuple[list[Inside], Counter[str]]  # the images in a file, and its skipped members


def expand_rows(
    rows: Iterable[Row], look: Look, skipped: Counter[str], is_list: bool = False, carried: Carried | None = None
) -> Iterator[Row]:
    """Yield rows of images, with `selector`, `offset`, `length` and `problem`, from rows of files in the same order.

    Args:
        rows: rows of files, with the other columns of PLAN_SCHEMA.
        look: options for listing the images in a file.
        skipped: counter of skipped files and members, by description; this function adds to it.
        is_list: whether a manifest names every file. A file without images then gives a row, which fails later. A row
            with a selector stands for this image of the file.
        carried: further columns of Parquet files with images. Each row has their values in `carried`.

    Raises:
        StorageError: a store does not answer.
    """
    Image.MAX_IMAGE_PIXELS = None  # only headers are read here; decode_image applies the setting max_pixels
    waiting: deque[tuple[Row, Future[Found] | None]] = deque()
    pool = ThreadPoolExecutor(_AHEAD)
    weight, num_unnamed = 0, 0
    told: set[str] = set()
    last: tuple[str, Future[Found]] | None = None  # rows of one file that follow each other share its listing
    try:
        for row in map(_name_header, rows) if is_list else rows:
            kind = kind_of(row["image_uri"])
            num_unnamed += kind == UNNAMED
            is_plain = kind is None or (kind == "image" and look.tile.size is None)
            if not is_plain and (last is None or last[0] != row["image_uri"] or row.get("selector") is None):
                last = row["image_uri"], pool.submit(_look_into, row, look, carried)
            waiting.append((row, None if is_plain or last is None else last[1]))
            weight += _weight(row)
            # Yield rows that need no header as soon as all rows before them are done.
            while waiting and (waiting[0][1] is None or weight > _AHEAD):
                weight -= _weight(waiting[0][0])
                yield from _images_of(*waiting.popleft(), skipped, is_list, told)
        while waiting:
            yield from _images_of(*waiting.popleft(), skipped, is_list, told)
        if num_unnamed:
            logger.info("looked into %s whose name states no format", count(num_unnamed, "file"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _name_header(row: Row) -> Row:
    """Return the row of a pair by its header: a list may name either of its files."""
    header = header_of(row["image_uri"])
    return row if header is None else row | {"image_uri": header, "size_bytes": None}


def _weight(row: Row) -> int:
    """Return how many of the _AHEAD places a file takes while it waits."""
    return _AHEAD // _ARCHIVES_AHEAD if is_archive(row["image_uri"]) else 1


def _look_into(row: Row, look: Look, carried: Carried | None) -> Found:
    """Return the images in a file and its skipped members. A file that cannot be read gives an item with a problem."""
    uri, size_bytes = row["image_uri"], row.get("size_bytes")
    options: dict[str, Any] = {"block_size": _ARCHIVE_BLOCK if is_archive(uri) else _HEADER_BLOCK}
    skipped = Counter[str]()

    def list_them() -> list[Inside]:
        skipped.clear()
        opened: list[WatchedFile] = []

        def open_file() -> Any:
            fs, path = storage.open_uri(uri, look.allow)
            remote = {"cache_type": "readahead"} | ({"size": size_bytes} if size_bytes else {})
            opened.append(WatchedFile(fs.open(path, "rb", **options, **({} if storage.is_local(fs) else remote))))
            return opened[-1]

        try:
            if kind_of(uri) == "parquet":
                with open_file() as file:
                    return list_rows(file, uri, look, skipped, carried)
            images = list_images(open_file, uri, look, skipped, size_bytes)
            return _check_pair(images, open_file, uri, look.allow) if is_header(uri) else images
        finally:  # a decoder may report an error of the store as damage of the file
            if error := next((file.error for file in opened if file.error), None):
                raise error

    try:
        with image_errors(uri):
            return storage.with_retries(list_them, uri, storage.PATIENT_S), skipped
    except ImageError as error:
        if error.reason == "unavailable":
            raise StorageError(str(error)) from error
        return [Inside(problem=str(error))], skipped


def _check_pair(images: list[Inside], open_file: Callable[[], Any], uri: str, allow: tuple[str, ...]) -> list[Inside]:
    """Return the images of a header, or a problem if its second file is missing: one row instead of one per slice."""
    if not images:
        return []
    with open_file() as file:
        uris = data_uris(file.read(_MAX_HEADER_BYTES), uri)
    if uris and not any(storage.exists(data_uri, allow) for data_uri in uris):
        return [Inside(problem=f"missing: there is no file {uris[0]}")]
    return images


def _images_of(
    row: Row, listing: Future[Found] | None, skipped: Counter[str], is_list: bool, told: set[str]
) -> Iterator[Row]:
    """Yield the rows of the images in a file; `listing` is None for a file that is one image."""
    images, others = ([Inside()], Counter[str]()) if listing is None else listing.result()
    if row.get("selector") is not None:
        yield _choose_image(row, images)
        return
    if is_list and not images:
        is_empty = is_archive(row["image_uri"])
        images, others = [Inside(problem=f"empty: {row['image_uri']} holds no images" if is_empty else None)], Counter()
    skipped.update(others)
    if len(images) > 1 and not told:
        _tell_fields(row["image_uri"], images, told)
    for image in images:
        selector = image.selector and storage.spell_out(image.selector)
        details = {"offset": image.offset, "length": image.length, "problem": image.problem}
        details |= {"image_id": _name(row, selector, image), "selector": selector, "num_windows": image.num_windows}
        yield row | details | {key: image.stated[key] for key in ("prompts", "carried") if key in image.stated}


def _choose_image(row: Row, images: list[Inside]) -> Row:
    """Return the row of the image that a list names by its selector; the list states its image_id and prompts."""
    uri, selector = row["image_uri"], row["selector"]
    whole = [image for image in images if image.selector is None and image.problem]  # the file cannot be read
    missing = Inside(problem=f"missing: {uri} has no image {selector}; its selectors are as in the rows of a run")
    chosen = (image for image in images if image.selector and storage.spell_out(image.selector) == selector)
    image = next(chosen, whole[0] if whole else missing)
    details = {"offset": image.offset, "length": image.length, "problem": image.problem}
    return row | details | {"num_windows": image.num_windows}


def _tell_fields(uri: str, images: list[Inside], told: set[str]) -> None:
    """Warn of samples with several images, once for all files; `told` has the first file with such samples."""
    fields = Counter(image.sample_field for image in images if image.sample_field)
    if fields:
        told.add(uri)
        names = [str(field) for field, _ in fields.most_common(_SHOWN_FIELDS)]
        logger.warning(
            "%s: samples have several images, with the fields %s: all are segmented; --set 'fields=[%s]' chooses",
            uri, ", ".join(names) + (", ..." if len(fields) > len(names) else ""), names[0],
        )  # fmt: skip


def _name(row: Row, selector: str | None, image: Inside) -> str:
    """Return the image_id: that of the file and the selector, or the one that the file states and the frame."""
    if (stated := image.stated.get("image_id")) is not None:
        frame = split_selector(row["image_uri"], selector)[1]
        return f"{stated}#{frame}" if frame else str(stated)
    return str(row["image_id"]) if selector is None else f"{row['image_id']}#{selector}"
