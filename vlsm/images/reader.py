"""Read planned images as pixels: from single-image files, tar and zip archives, and files with several images."""

import functools
import gzip
import hashlib
import io
import itertools
import queue
import re
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from PIL import Image

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.containers import check_zip_member, is_compressed_tar, list_images, open_zip, whole_member
from vlsm.images.fetch import check_size, image_errors, read_image_bytes, read_patiently
from vlsm.images.formats import (
    FORMATS,
    HEAD_BYTES,
    ColourModule,
    Decode,
    LabelModule,
    Labels,
    Look,
    NoImages,
    PairedModule,
    data_uris,
    is_archive,
    kind_of,
    sniff_kind,
    split_selector,
)
from vlsm.images.gpu_jpegs import Jpeg, find_jpeg
from vlsm.images.grey_levels import Decoded
from vlsm.images.gunzip import open_gzip
from vlsm.images.parquet import ParquetImages, kind_by_bytes, kind_by_name
from vlsm.images.stored import Stored

_BLOCK = 1 << 20  # bytes per request to a store, for an archive that is read in order
# files with several images stay in memory, because these images follow each other in the plan
_MIN_KEPT_FILES, _MAX_KEPT_BYTES = 2, 1 << 28


class Content:
    """The bytes of a file or of a member of an archive, with one or several images.

    Attributes:
        data: the bytes.
        values: the bytes of the second file, if the file is only a header.
        name: its name in error messages.
        kind: the kind of the file, as for `kind_of`.
        sha256: SHA-256 of the bytes of both files, in hexadecimal.
    """

    def __init__(
        self, data: bytes, name: str, kind: str | None, settings: SegmentSettings, values: bytes | None = None
    ) -> None:
        self.data, self.name, self.kind, self._settings, self.values = data, name, kind, settings, values
        digest = hashlib.sha256(data)
        digest.update(values or b"")
        self.sha256 = digest.hexdigest()

    def digest(self, frame: str | None) -> str:
        """Return a digest that is equal for equal images: the SHA-256 of the bytes, or of that digest and the frame."""
        return self.sha256 if frame is None else hashlib.sha256(f"{self.sha256}#{frame}".encode()).hexdigest()

    def decode(self, frame: str | None) -> Decoded:
        """Return one image.

        Args:
            frame: such as "frame=3"; None if the file has only one image.

        Raises:
            ImageError: the image cannot be decoded.
        """
        decode = self._decode  # a damaged file says so itself
        self._check_frame(frame)
        return decode(frame)

    def jpeg(self, frame: str | None) -> Jpeg | None:
        """Return the image as a JPEG for a GPU, or None if the CPU must decode it. Raises as `find_jpeg` does."""
        is_file = frame is None and self.values is None and self.kind == "image"
        return find_jpeg(self.data, self.name, self._settings.max_pixels) if is_file else None

    def _check_frame(self, frame: str | None) -> None:
        """Raise an ImageError for a selector that images of this format do not have."""
        if frame is not None and not re.fullmatch(FORMATS[self.kind or "image"].selector, frame):
            raise ImageError("corrupt", f"{self.name} has no {frame!r}")

    def labels(self, frame: str | None) -> np.ndarray:
        """Return the labels of one image, (H, W) of the stored type, upright.

        Args:
            frame: as for `decode`.

        Raises:
            ImageError: the labels cannot be read, or files of this format hold none.
        """
        labels = self._labels
        self._check_frame(frame)
        return labels(frame)

    def codes(self, frame: str | None, are_colours: bool) -> np.ndarray:
        """Return what tells the classes of a mask apart, (H, W): numbers, or the colours of `Stored.colours`.

        The number is the entry of the palette where the file has one, and the label elsewhere.

        Args:
            frame: as for `decode`.
            are_colours: whether classes are told by their colours.

        Raises:
            ImageError: as for `labels`, or the format has no colours.
        """
        if self._stored is not None:
            self._check_frame(frame)
            stored = self._stored(frame)
            return stored.colours() if are_colours else stored.codes()
        if are_colours:
            raise ImageError("unreadable", f"{self.name} has the format {self.kind}; its masks have no colours")
        return self.labels(frame)

    @functools.cached_property
    def _stored(self) -> Callable[[str | None], Stored] | None:
        module = FORMATS[self.kind or "image"].load()
        if not hasattr(module, "open_stored"):
            return None
        return cast(ColourModule, module).open_stored(self.data, self.name, self._settings)

    @functools.cached_property
    def _labels(self) -> Labels:
        module = FORMATS[self.kind or "image"].load()
        if not hasattr(module, "open_labels"):
            raise ImageError("unreadable", f"{self.name} has the format {self.kind}; it cannot be a mask")
        with_values = {} if self.values is None else {"values": self.values}
        return cast(LabelModule, module).open_labels(self.data, self.name, self._settings, **with_values)

    def check_single(self) -> None:
        """Raise an ImageError if the file has several images, or none. Its name stands for one image."""
        known = FORMATS[self.kind or "image"]
        look = Look(self._settings.slices, frames=self._settings.frames)
        try:
            selectors, _ = known.load().list_images(io.BytesIO(self.data), self.name, len(self.data), look)
        except NoImages as error:
            raise ImageError("unreadable", f"{self.name}: {error}") from None
        if list(selectors) != [None]:
            raise ImageError(
                "unreadable",
                f"{self.name} holds {len(selectors):,} images in the format {self.kind}; "
                f"its name must end with {known.endings[0]}",
            )

    @functools.cached_property
    def _decode(self) -> Decode:
        module = FORMATS[self.kind or "image"].load()
        if self.values is None:
            return module.open_images(self.data, self.name, self._settings)
        return cast(PairedModule, module).open_images(self.data, self.name, self._settings, self.values)


class Reader:
    """Reads the images of planned rows. A file with several images is read once, an archive in order is opened once.

    Threads may share a Reader.

    Args:
        settings: of the run.
        locate: returns the location to read for the one in a row, if they differ.
    """

    def __init__(self, settings: SegmentSettings, locate: Callable[[str], str] = str) -> None:
        self.locate = locate
        Image.MAX_IMAGE_PIXELS = None  # the setting max_pixels is the limit
        self._settings = settings
        self._contents: dict[tuple[str, str | None], Future[Content]] = {}  # of files with several images
        self._contents_lock, self._archive_lock = threading.Lock(), threading.Lock()
        self._archive: tuple[str, Any] | None = None

    def open(self, row: Mapping[str, Any]) -> tuple[Content, str | None]:
        """Return the content with the image of a row, and the frame in it, or None if it has only one image.

        Args:
            row: of the plan or of the results.

        Raises:
            ImageError: the image cannot be read.
            StorageError: the store was unavailable for longer than `run.outage_patience_s`.
        """
        if row.get("problem"):
            reason, _, message = row["problem"].partition(": ")
            raise ImageError(reason, message)
        if (uri := self.locate(row["image_uri"])) != row["image_uri"]:
            row = {**row, "image_uri": uri}
        member, frame = split_selector(row["image_uri"], row["selector"])
        if frame is None:
            content = self._read(row, member)
            if kind_of(member or row["image_uri"]) in ("image", None) and content.kind != "image":
                content.check_single()  # the listing did not open it
            return content, None
        return self._share((row["image_uri"], member), lambda: self._read(row, member)), frame

    def _share(self, key: tuple[str, str | None], read: Callable[[], Content]) -> Content:
        """Return the content of this key. The first thread that asks for it reads it for all threads."""
        with self._contents_lock:
            if is_first := key not in self._contents:
                self._contents[key] = Future()
            future = self._contents[key]
        if is_first:
            try:
                future.set_result(read())
            except BaseException as error:  # every type of error: the other threads wait for the result
                future.set_exception(error)
            self._forget()
        return future.result()

    def _forget(self) -> None:
        """Drop the oldest contents, except the last _MIN_KEPT_FILES, until _MAX_KEPT_BYTES suffice."""
        with self._contents_lock:
            done = [key for key, future in self._contents.items() if future.done()]
            sizes = {key: _size(self._contents[key]) for key in done}
            while len(done) > _MIN_KEPT_FILES and sum(sizes[key] for key in done) > _MAX_KEPT_BYTES:
                del self._contents[done.pop(0)]

    def _read(self, row: Mapping[str, Any], member: str | None) -> Content:
        uri, settings = row["image_uri"], self._settings
        limits, allow = _limits(settings), settings.run.allow
        kind = kind_of(member or uri)
        if member is None and is_archive(uri):  # the failed row of an archive that could not be listed
            raise ImageError("unreadable", f"{uri} is an archive; the row does not say which image of it is meant")
        if member is None:
            data = read_image_bytes(uri, row.get("size_bytes"), *limits, allow=allow)
        elif not is_compressed_tar(uri) and kind_of(uri) == "tar":
            data = read_image_bytes(uri, row.get("size_bytes"), *limits, _span(row, settings), allow)
        else:
            with self._archive_lock:
                data, kind = read_patiently(
                    lambda: self._read_in_order(row, member), uri, settings.run.outage_patience_s
                )
        name = uri if member is None else f"{uri}#{member}"
        if kind_of(uri) != "parquet":  # there the row may state the format
            kind = sniff_kind(data[:HEAD_BYTES], member or uri)
        return Content(data, name, kind, settings, self._read_values(data, uri, member))

    def _read_values(self, data: bytes, uri: str, member: str | None) -> bytes | None:
        """Return the content of the second file of a file, or None if the file is whole."""
        settings, uris = self._settings, data_uris(data, member or uri)
        if uris and member is not None:
            raise ImageError("unreadable", f"{uri}#{whole_member(member)}")
        errors = []
        for data_uri in uris:
            try:
                return read_image_bytes(data_uri, None, *_limits(settings), allow=settings.run.allow)
            except ImageError as error:
                errors.append(error)
                if error.reason != "missing":
                    raise
        if errors:
            raise errors[0]
        return None

    def _read_in_order(self, row: Mapping[str, Any], member: str) -> tuple[bytes, str | None]:
        """Return the bytes and the kind of a member of a zip or compressed tar, or of a row of a Parquet file."""
        patience_s = min(storage.QUICK_S, self._settings.run.outage_patience_s)
        with image_errors(row["image_uri"]):
            return storage.with_retries(lambda: self._unpack(row, member), row["image_uri"], patience_s)

    def _unpack(self, row: Mapping[str, Any], member: str) -> tuple[bytes, str | None]:
        uri, name = row["image_uri"], f"{row['image_uri']}#{member}"
        kind = kind_of(member)
        try:
            archive = self._open_archive(uri)
            if isinstance(archive, ParquetImages):
                data, kind = _read_row(archive, member, name)
                check_size(name, len(data), self._settings.max_image_bytes)
            elif isinstance(archive, zipfile.ZipFile):
                data = _unzip(archive, member, name, self._settings.max_image_bytes)
            else:
                offset, length = _span(row, self._settings)
                check_size(name, length, self._settings.max_image_bytes)
                archive.seek(offset)
                if len(data := archive.read(length)) < length:
                    raise EOFError(f"the archive ends after {len(data):,} of its {length:,} bytes")
        except ImageError:
            raise
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError) as error:
            self._archive = None
            raise ImageError("corrupt", f"{name}: {error}") from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed by an unsupported method
            raise ImageError("unreadable", f"{name}: {error}") from error
        except Exception:
            self._archive = None  # the next attempt opens it again
            raise
        return data, kind

    def _open_archive(self, uri: str) -> Any:
        if self._archive is None or self._archive[0] != uri:
            file = _open(uri, self._settings.run.allow)
            if kind_of(uri) == "parquet":
                opened: Any = ParquetImages(file, self._settings.columns.get("image"))
            else:
                opened = open_zip(file) if kind_of(uri) == "zip" else open_gzip(file)
            self._archive = uri, opened
        return self._archive[1]


Opening = Callable[[], tuple[Content, str | None]]


def open_images(
    rows: Sequence[Mapping[str, Any]], settings: SegmentSettings, one_by_one: bool = False
) -> Iterator[tuple[int, Opening]]:
    """Yield the images of planned rows as soon as each is read, while threads read others.

    Args:
        rows: of the plan.
        settings: of the run. At most `run.fetch_threads` images are being read or wait for the caller. So at most one
            file more than that is in memory.
        one_by_one: read each image only when its function is called.

    Yields:
        The number of a row, and a function that returns the same as `Reader.open`, or raises the same. The rows come in
        any order.
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
    """Return whether one thread must read the images in order: in zips, compressed tars and Parquet files."""
    return any(
        is_archive(uri := row["image_uri"]) and (kind_of(uri) != "tar" or is_compressed_tar(uri)) for row in rows
    )


def _read_row(images: ParquetImages, member: str, name: str) -> tuple[bytes, str]:
    """Return the bytes and the kind of the image in a row of a Parquet file; `member` is such as "row=17"."""
    number = member.removeprefix("row=")
    if not number.isdecimal():
        raise ImageError("missing", f"there is no {name}; rows are named as row=17")
    data, path = images.read(int(number), name)
    return data, kind_by_name(images.column, path) or kind_by_bytes(data, name)


def _unzip(archive: zipfile.ZipFile, member: str, name: str, max_bytes: int) -> bytes:
    info = archive.getinfo(member)
    check_zip_member(name, info, archive)
    check_size(name, info.file_size, max_bytes)
    with archive.open(info) as file:
        data = file.read(info.file_size)
    if len(data) < info.file_size:
        raise EOFError(f"the member ends after {len(data):,} of its {info.file_size:,} bytes")
    return data


def _size(future: Future[Content]) -> int:
    if future.exception():
        return 0
    content = future.result()
    return len(content.data) + len(content.values or b"")


def _limits(settings: SegmentSettings) -> tuple[int, float, float]:
    return settings.max_image_bytes, settings.run.image_timeout_s, settings.run.outage_patience_s


def _open(uri: str, allow: tuple[str, ...]) -> Any:
    fs, path = storage.open_uri(uri, allow)
    return fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")


def _span(row: Mapping[str, Any], settings: SegmentSettings) -> tuple[int, int]:
    """Return the offset and length of a member's bytes in a tar.

    Rows of the plan state them. For rows of the results the tar is searched.
    """
    if row.get("offset") is not None:
        return row["offset"], row["length"]
    span = _spans(row["image_uri"], settings.slices, settings.fields, settings.run.allow).get(
        split_selector(row["image_uri"], row["selector"])[0]
    )
    if span is None:
        raise ImageError("missing", f"there is no {row['selector']} in {row['image_uri']}")
    return span


@functools.lru_cache(maxsize=2)
def _spans(uri: str, axis: str, fields: tuple[str, ...], allow: tuple[str, ...]) -> dict[str | None, tuple[int, int]]:
    """Return the offset and length of each member of a tar, by the member's name."""
    look = Look(axis, fields=fields)
    images = list_images(lambda: _open(uri, allow), uri, look, Counter())
    return {
        split_selector(uri, inside.selector and storage.spell_out(inside.selector))[0]: (
            inside.offset or 0,
            inside.length or 0,
        )
        for inside in images
    }
