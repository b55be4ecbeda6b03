"""Planned images as pixels, wherever they are: in a file of their own, in a tar or zip, or one of many in a file."""

import functools
import gzip
import hashlib
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.fetch import check_size, image_errors, read_image_bytes, read_patiently
from vlsm.formats.containers import Look, is_archive, is_compressed_tar, kind_of, list_images, split_selector
from vlsm.images import decode_image

_BLOCK = 1 << 20  # bytes that are asked of a store at once, of an archive that is read in order
_KEPT = 2  # files of which several images are wanted: they follow each other


class Content:
    """The bytes of a file or of an archive's member, of which one image is wanted or several.

    Attributes:
        data: the bytes.
        sha256: of them.
    """

    def __init__(self, data: bytes, name: str, kind: str | None, settings: SegmentSettings) -> None:
        self.data, self._name, self._kind, self._settings = data, name, kind, settings
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
        if self._kind == "nifti":
            return self._volume.decode(frame or "slice=0")
        number = int(frame.partition("=")[2]) if frame else 0
        if self._kind == "dicom":
            return self._dicom.decode(number)
        return decode_image(self.data, self._name, self._settings.max_pixels, number)

    @functools.cached_property
    def _volume(self) -> Any:
        from vlsm.formats.nifti import NiftiImages

        settings = self._settings
        how = settings.window, settings.slices, settings.max_image_bytes
        return NiftiImages(self.data, self._name, settings.max_pixels, *how)

    @functools.cached_property
    def _dicom(self) -> Any:
        from vlsm.formats.dicom import DicomImages

        return DicomImages(self.data, self._name, self._settings.max_pixels, self._settings.window)


class Reader:
    """Reads the images of planned rows, an archive or a file that holds several of them once.

    Threads may share it.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        self._settings = settings
        self._contents: OrderedDict[tuple[str, str | None], Content | ImageError] = OrderedDict()
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
        member, frame = split_selector(row["selector"])
        if frame is None:
            return self._read(row, member), None
        with self._contents_lock:
            return self._keep((row["image_uri"], member), lambda: self._read(row, member)), frame

    def _keep(self, key: tuple[str, str | None], read: Callable[[], Content]) -> Content:
        if key not in self._contents:
            try:
                self._contents[key] = read()
            except ImageError as error:
                self._contents[key] = error
            while len(self._contents) > _KEPT:
                self._contents.popitem(last=False)
        if isinstance(content := self._contents[key], ImageError):
            raise content
        return content

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
        if kind == "dicom?":
            from vlsm.formats.dicom import is_dicom

            kind = "dicom" if is_dicom(data[:132]) else None
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
                info = archive.getinfo(member)
                check_size(name, info.file_size, self._settings.max_image_bytes)
                data = archive.read(info)
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


def is_read_in_order(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether several threads would only get into each other's way: the images are in archives that have no index."""
    return any(
        is_archive(uri := row["image_uri"]) and (kind_of(uri) == "zip" or is_compressed_tar(uri)) for row in rows
    )


def _open(uri: str) -> Any:
    fs, path = storage.open_uri(uri)
    return fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead")


def _span(row: Mapping[str, Any], axis: str) -> tuple[int, int]:
    """Where a tar has a member's bytes: the plan tells; rows of a result have to look."""
    if row.get("offset") is not None:
        return row["offset"], row["length"]
    found = _members(row["image_uri"], axis).get(row["selector"])
    if found is None:
        raise ImageError("missing", f"there is no {row['selector']} in {row['image_uri']}")
    return found


@functools.lru_cache(maxsize=2)
def _members(uri: str, axis: str) -> dict[str | None, tuple[int, int]]:
    fs, path = storage.open_uri(uri)
    images = list_images(
        lambda: fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead"), uri, Look(axis), Counter()
    )
    return {inside.selector: (inside.offset or 0, inside.length or 0) for inside in images}
