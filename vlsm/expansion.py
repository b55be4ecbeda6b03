"""Rows of files as rows of images: what holds several is looked into while the listing goes on."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlsm import storage
from vlsm.errors import ImageError, StorageError
from vlsm.fetch import image_errors
from vlsm.formats.containers import Inside, Look, is_archive, kind_of, list_images
from vlsm.listing import spell_out

_AHEAD = 32  # files that are looked into at once: their stores answer slowly
_ARCHIVE_BLOCK, _HEADER_BLOCK = 1 << 20, 1 << 16  # bytes that are asked of a store at once

Found = tuple[list[Inside], Counter[str]]


def expand_rows(rows: Iterable[dict[str, Any]], look: Look, skipped: Counter[str] | None) -> Iterator[dict[str, Any]]:
    """Rows of images, each with `selector`, `offset`, `length` and `problem`, from rows of files, in their order.

    Args:
        rows: with the other columns of MANIFEST_SCHEMA.
        look: how files are looked into.
        skipped: takes the count of what turns out to hold no image; None where every row was asked for by name, so that
            it stays and fails.

    Raises:
        StorageError: a store stays away.
    """
    waiting: deque[tuple[dict[str, Any], Future[Found] | None]] = deque()
    pool = ThreadPoolExecutor(_AHEAD)
    try:
        for row in rows:
            kind = kind_of(row["image_uri"])
            is_plain = kind is None or (kind == "image" and look.tile.size is None)
            waiting.append((row, None if is_plain else pool.submit(_look_into, row["image_uri"], look)))
            # a row that need not wait does not, but behind those that must
            while waiting and (waiting[0][1] is None or len(waiting) > _AHEAD):
                yield from _images_of(*waiting.popleft(), skipped)
        while waiting:
            yield from _images_of(*waiting.popleft(), skipped)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _look_into(uri: str, look: Look) -> Found:
    fs, path = storage.open_uri(uri)
    block = _ARCHIVE_BLOCK if is_archive(uri) else _HEADER_BLOCK
    skipped = Counter[str]()

    def list_them() -> list[Inside]:
        skipped.clear()
        return list_images(lambda: fs.open(path, "rb", block_size=block, cache_type="readahead"), uri, look, skipped)

    try:
        with image_errors(uri):
            return storage.with_retries(list_them, uri, storage.PATIENT_S), skipped
    except ImageError as error:
        if error.reason == "unavailable":
            raise StorageError(str(error)) from error
        return [Inside(problem=str(error))], skipped


def _images_of(
    row: dict[str, Any], found: Future[Found] | None, skipped: Counter[str] | None
) -> Iterator[dict[str, Any]]:
    images, others = ([Inside()], Counter[str]()) if found is None else found.result()
    if skipped is not None:
        skipped.update(others)
    elif not images:
        is_empty = is_archive(row["image_uri"])
        images = [Inside(problem=f"empty: {row['image_uri']} holds no images" if is_empty else None)]
    for inside in images:
        selector = inside.selector and spell_out(inside.selector)
        image_id = row["image_id"] if selector is None else f"{row['image_id']}#{selector}"
        place = {"offset": inside.offset, "length": inside.length, "problem": inside.problem}
        place["num_windows"] = inside.num_windows
        yield row | {"image_id": image_id, "selector": selector} | place
