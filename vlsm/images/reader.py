"""Planned images as pixels, wherever they are: in a file of their own, in a tar or zip, or one of many in a file."""

import functools
import gzip
import hashlib
import itertools
import queue
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.containers import check_zip_member, is_compressed_tar, list_images
from vlsm.images.fetch import check_size, image_errors, read_image_bytes, read_patiently
from vlsm.images.formats import (
    FORMATS,
    HEAD_BYTES,
    UNNAMED,
    Decode,
    Look,
    is_archive,
    kind_of,
    sniff_kind,
    split_selector,
)

_BLOCK = 1 << 20  # bytes that are asked of a store at once, of an archive that is read in order
_FEWEST_KEPT, _MOST_BYTES_KEPT = 2, 1 << 28  # of files of which several images are wanted: they follow each other


class Content:
    """The bytes of a file or of an archive's member, of which one image is wanted or several.

    Attributes:
        data: the bytes.
        name: what messages call it.
        kind: of file, as `kind_of` tells it.
        sha256: of the bytes.
    """

    def __init__(self, data: bytes, name: str, kind: str | None, settings: SegmentSettings) -> None:
        self.data, self.name, self.kind, self._settings = data, name, kind, settings
        self.sha256 = hashlib.sha256(data).hexdigest()

    def digest(self, frame: str | None) -> str:
        """What is equal for equal images: the SHA-256 of the bytes, or of that and the frame."""
        return self.sha256 if frame is None else hashlib.sha256(f"{self.sha256}#{frame}".encode()).hexdigest()

    def decode(self, frame: str | None) -> np.ndarray:
        """One image as `decode_image` gives it, (H, W, 3) uint8.

        Args:
            frame: such as "frame=3"; None where the file holds just one.

        Raises:
            ImageError: it cannot be decoded.
        """
        return self._decode(frame)

    @functools.cached_property
    def _decode(self) -> Decode:
        return FORMATS[self.kind or "image"].load().open_images(self.data, self.name, self._settings)


class Reader:
    """Reads the images of planned rows, an archive or a file that holds several of them once.

    Threads may share it.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        self._settings = settings
        self._contents: dict[tuple[str, str | None], Future[Content]] = {}  # of files with several images
        self._contents_lock, self._archive_lock = threading.Lock(), threading.Lock()
        self._archive: tuple[str, Any] | None = None

    def open(self, row: Mapping[str, Any]) -> tuple[Content, str | None]:
        """What holds the image of a row of the plan or of the result, and which one of it.

        Raises:
            ImageError: it cannot be read.
            StorageError: its store was away for longer than `run.outage_patience_s`.
        """
        if row.get("problem"):
            reason, _, message = row["problem"].partition(": ")
            raise ImageError(reason, message)
        member, frame = split_selector(row["image_uri"], row["selector"])
        if frame is None:
            return self._read(row, member), None
        return self._share((row["image_uri"], member), lambda: self._read(row, member)), frame

    def _share(self, key: tuple[str, str | None], read: Callable[[], Content]) -> Content:
        """What the first thread that asks for it reads, for all of them."""
        with self._contents_lock:
            if is_first := key not in self._contents:
                self._contents[key] = Future()
            future = self._contents[key]
        if is_first:
            try:
                future.set_result(read())
            except BaseException as error:  # whatever it is, the others wait for it
                future.set_exception(error)
            self._forget()
        return future.result()

    def _forget(self) -> None:
        """Let go of the oldest, but for the last few."""
        with self._contents_lock:
            done = [key for key, future in self._contents.items() if future.done()]
            sizes = {key: _size(self._contents[key]) for key in done}
            while len(done) > _FEWEST_KEPT and sum(sizes[key] for key in done) > _MOST_BYTES_KEPT:
                del self._contents[done.pop(0)]

    def _read(self, row: Mapping[str, Any], member: str | None) -> Content:
        uri, settings = row["image_uri"], self._settings
        limits = settings.max_image_bytes, settings.run.image_timeout_s, settings.run.outage_patience_s
        if member is None:
            data = read_image_bytes(uri, row.get("size_bytes"), *limits)
        elif not is_compressed_tar(uri) and kind_of(uri) == "tar":
            data = read_image_bytes(uri, row.get("size_bytes"), *limits, _span(row, settings.slices))
        else:
            with self._archive_lock:
                data = read_patiently(lambda: self._read_in_order(row, member), uri, settings.run.outage_patience_s)
        name = uri if member is None else f"{uri}#{member}"
        kind = kind_of(member or uri)
        if kind == UNNAMED:
            kind = sniff_kind(data[:HEAD_BYTES])
        return Content(data, name, kind, settings)

    def _read_in_order(self, row: Mapping[str, Any], member: str) -> bytes:
        """A member of an archive that has to be unpacked."""
        patience_s = min(storage.QUICK_S, self._settings.run.outage_patience_s)
        with image_errors(row["image_uri"]):
            return storage.with_retries(lambda: self._unpack(row, member), row["image_uri"], patience_s)

    def _unpack(self, row: Mapping[str, Any], member: str) -> bytes:
        uri, name = row["image_uri"], f"{row['image_uri']}#{member}"
        try:
            archive = self._open_archive(uri)
            if isinstance(archive, zipfile.ZipFile):
                data = _unzip(archive, member, name, self._settings.max_image_bytes)
            else:
                offset, length = _span(row, self._settings.slices)
                check_size(name, length, self._settings.max_image_bytes)
                archive.seek(offset)
                if len(data := archive.read(length)) < length:
                    raise EOFError("it breaks off")
        except ImageError:
            raise
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError) as error:
            self._archive = None
            raise ImageError("corrupt", f"{name}: {error}") from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in a way of its own
            raise ImageError("unreadable", f"{name}: {error}") from error
        except Exception:
            self._archive = None  # the next try opens it anew
            raise
        return data

    def _open_archive(self, uri: str) -> Any:
        if self._archive is None or self._archive[0] != uri:
            file = _open(uri)
            opened = zipfile.ZipFile(file) if kind_of(uri) == "zip" else gzip.GzipFile(fileobj=file)
            self._archive = uri, opened
        return self._archive[1]


Opening = Callable[[], tuple[Content, str | None]]


def open_images(
    rows: Sequence[Mapping[str, Any]], settings: SegmentSettings, one_by_one: bool = False
) -> Iterator[tuple[int, Opening]]:
    """The images of planned rows, each as soon as it is read, while others are being read.

    Args:
        rows: of the plan.
        settings: `run.fetch_threads` of them are read, or wait to be taken: so many files, and one more, are in memory.
        one_by_one: read each only when it is asked for.

    Yields:
        The number of a row, and what gives its image or raises as `Reader.open` does. Their order is any.
    """
    reader = Reader(settings)
    openings = [functools.partial(reader.open, row) for row in rows]
    if one_by_one or _is_read_in_order(rows):
        yield from enumerate(openings)
        return
    waiting, opened = iter(enumerate(openings)), queue.SimpleQueue[tuple[int, Future[tuple[Content, str | None]]]]()
    pool = ThreadPoolExecutor(settings.run.fetch_threads)

    def put(number: int, future: Future[tuple[Content, str | None]]) -> None:
        opened.put((number, future))

    def begin(count: int) -> None:
        for number, opening in itertools.islice(waiting, count):
            pool.submit(opening).add_done_callback(functools.partial(put, number))

    try:
        begin(settings.run.fetch_threads)
        for _ in openings:
            number, future = opened.get()
            begin(1)
            yield number, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def _is_read_in_order(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether several threads would only get into each other's way: the images are in archives that have no index."""
    return any(
        is_archive(uri := row["image_uri"]) and (kind_of(uri) == "zip" or is_compressed_tar(uri)) for row in rows
    )


def _unzip(archive: zipfile.ZipFile, member: str, name: str, max_bytes: int) -> bytes:
    info = archive.getinfo(member)
    check_zip_member(name, info)
    check_size(name, info.file_size, max_bytes)
    with archive.open(info) as file:
        data = file.read(info.file_size)
    if len(data) < info.file_size:
        raise EOFError("it breaks off")
    return data


def _size(future: Future[Content]) -> int:
    return 0 if future.exception() else len(future.result().data)


def _open(uri: str) -> Any:
    fs, path = storage.open_uri(uri)
    return fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")


def _span(row: Mapping[str, Any], axis: str) -> tuple[int, int]:
    """Where a tar has a member's bytes: the plan tells; rows of a result have to look."""
    if row.get("offset") is not None:
        return row["offset"], row["length"]
    found = _members(row["image_uri"], axis).get(split_selector(row["image_uri"], row["selector"])[0])
    if found is None:
        raise ImageError("missing", f"there is no {row['selector']} in {row['image_uri']}")
    return found


@functools.lru_cache(maxsize=2)
def _members(uri: str, axis: str) -> dict[str | None, tuple[int, int]]:
    fs, path = storage.open_uri(uri)
    images = list_images(
        lambda: fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead"), uri, Look(axis), Counter()
    )
    return {
        split_selector(uri, inside.selector and storage.spell_out(inside.selector))[0]: (
            inside.offset or 0,
            inside.length or 0,
        )
        for inside in images
    }
