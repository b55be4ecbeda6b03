"""What labels need of DICOM headers: the frames of images, and what each frame of a segmentation shows."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from pydicom.dataset import Dataset

from vlsm import storage
from vlsm.config import RunSettings
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ImageError
from vlsm.images.dicom import PIXEL_DATA_TAGS, damage, is_dicom, open_labels
from vlsm.images.dicom_form import HeaderError, read_number, read_numbers
from vlsm.images.dicom_header import read_header
from vlsm.images.fetch import WatchedFile, image_errors, read_image_bytes
from vlsm.images.formats import Labels
from vlsm.limits import MAX_LISTED_BYTES

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_TAGS = [
    *(0x00080016, 0x00080018, 0x00081115, 0x0020000E),  # class, instance, referenced series, series
    *(0x00200032, 0x00200037, 0x00280030),  # position, orientation, spacing
    *(0x00280008, 0x00280010, 0x00280011),  # frames, rows, columns
    *(0x00620001, 0x00620002, 0x0062000E),  # segmentation type, segments, largest fractional value
    *(0x52009229, 0x52009230),  # functional groups of all frames, and of each
]
_THREADS = 16
_MAX_FRAMES = 1_000_000
_MAX_FILES = 20_000  # of a series
_TOLERANCE = 0.25  # of a pixel, as for volumes


@dataclass(frozen=True)
class Plane:
    """Position of a frame in the patient, in mm, towards left, back and head.

    Attributes:
        position: of the centre of the first pixel.
        orientation: the directions of a row and of a column, two unit vectors.
        spacing: distance between rows, and between columns.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]

    def is_same(self, other: "Plane") -> bool:
        """Return whether another plane is at the same position, up to a quarter of a pixel."""
        is_near = math.dist(self.position, other.position) <= _TOLERANCE * min(*self.spacing, *other.spacing)
        return is_near and np.allclose(self.orientation, other.orientation, rtol=0, atol=0.01)


@dataclass(frozen=True)
class Frame:
    """A frame of a DICOM image.

    Attributes:
        uri: its file.
        selector: such as "frame=3"; None if it is the only frame of its file.
        number: in its file, from 1, as DICOM counts.
        instance, series: the UIDs of the file and of its series.
        size: (height, width) in pixels.
        plane: its position; None if the header does not state it.
    """

    uri: str
    selector: str | None
    number: int
    instance: str
    series: str
    size: tuple[int, int]
    plane: Plane | None


@dataclass(frozen=True)
class SegmentFrame:
    """A frame of a DICOM segmentation.

    Attributes:
        selector: such as "frame=3".
        segments: the numbers of the segments of which it shows at least one pixel.
        sources: UID and frame number (from 1; None if not stated) of each image that it refers to.
        size, plane: as for `Frame`.
    """

    selector: str
    segments: frozenset[int]
    sources: tuple[tuple[str, int | None], ...]
    size: tuple[int, int]
    plane: Plane | None


@dataclass(frozen=True)
class Segmentation:
    """A DICOM segmentation.

    Attributes:
        labels: the label of each segment, by its number.
        values: the stored values that are foreground, for each segment.
        series: the UIDs of the series that it refers to.
        frames: its frames.
    """

    labels: dict[int, str]
    values: dict[int, tuple[int, ...]]
    series: frozenset[str]
    frames: tuple[SegmentFrame, ...]


def read_frames(uri: str, settings: DatasetSettings) -> list[Frame]:
    """Return the frames of a DICOM image, or of all images in a folder, in the order of their names.

    Other files of a folder do not count: other formats, segmentations and files without pixels.

    Raises:
        ImageError: a file cannot be read or has no UIDs, the folder has too many files, or two files have one UID.
    """
    with image_errors(uri):
        fs, path = storage.open_uri(uri, settings.allow)
        is_folder = storage.with_retries(lambda: fs.isdir(path), uri, storage.QUICK_S)
    uris = [storage.join(uri, name) for name in storage.list_names(uri)] if is_folder else [uri]
    if len(uris) > _MAX_FILES:
        raise ImageError("too_large", f"{uri} has {len(uris):,} files; a series has at most {_MAX_FILES:,}")
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(lambda one: read_uids(one, settings), uris))
    frames, files = list[Frame](), dict[str, str]()
    for file, header in zip(uris, headers, strict=True):
        with damage(file):
            is_image = header is not None and not _is_segmentation(header) and "Rows" in header
            found = list(_frames(file, header)) if header is not None and is_image else []
        if found and (other := files.setdefault(found[0].instance, file)) != file:
            raise ImageError("corrupt", f"{file} and {other} have the same SOP Instance UID")
        frames += found
    if not frames:
        raise ImageError("missing", f"{uri} holds no DICOM image")
    return frames


def read_uids(uri: str, settings: DatasetSettings) -> Dataset | None:
    """Return the elements of a DICOM header that this module uses, or None for a file of another format.

    Raises:
        ImageError: it cannot be read.
    """

    def read() -> Dataset | None:
        fs, path = storage.open_uri(uri, settings.allow)
        with WatchedFile(fs.open(path, "rb")) as file:
            if not is_dicom(file.read(132)):
                return None
            file.seek(0)
            try:
                with damage(uri):
                    stop, max_bytes = (
                        lambda tag, *_: tag in PIXEL_DATA_TAGS,
                        min(settings.max_image_bytes, MAX_LISTED_BYTES),
                    )
                    return read_header(cast(BinaryIO, file), stop, _TAGS, max_bytes, uri)
            except ImageError as error:
                raise file.error or error from None  # a store that fails is no damage

    with image_errors(uri):
        return storage.with_retries(read, uri, storage.QUICK_S)


def num_frames(header: Dataset) -> int:
    """Return the number of frames that a header states.

    Raises:
        HeaderError: no file has as many.
    """
    number = int(read_number(header, "NumberOfFrames") or 1)
    if not 1 <= number <= _MAX_FRAMES:
        raise HeaderError("its NumberOfFrames is wrong")
    return number


def _is_segmentation(header: Dataset) -> bool:
    return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")) in _SEGMENTATIONS


def _frames(uri: str, header: Dataset) -> Iterator[Frame]:
    instance = header.get("SOPInstanceUID") or header.file_meta.get("MediaStorageSOPInstanceUID")
    if not instance:
        raise ImageError("corrupt", f"{uri} has no SOP Instance UID")
    count = num_frames(header)
    for number in range(1, count + 1):
        selector = f"frame={number - 1}" if count > 1 else None
        series, plane = str(header.get("SeriesInstanceUID") or ""), _plane(header, number)
        yield Frame(uri, selector, number, str(instance), series, _size(header), plane)


def _size(header: Dataset) -> tuple[int, int]:
    return int(header.Rows), int(header.Columns)


def _groups(header: Dataset, number: int) -> list[Dataset]:
    """Return the functional groups of a frame: its own, and those of all frames."""
    own = (header.get("PerFrameFunctionalGroupsSequence") or ())[number - 1 : number]
    return [*own, *(header.get("SharedFunctionalGroupsSequence") or ())[:1]]


def _items(groups: list[Dataset], sequence: str) -> list[Dataset]:
    return [item for group in groups for item in group.get(sequence) or ()]


def _plane(header: Dataset, number: int) -> Plane | None:
    groups = _groups(header, number)
    found = []
    for sequence, keyword, count in (
        ("PlanePositionSequence", "ImagePositionPatient", 3),
        ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        ("PixelMeasuresSequence", "PixelSpacing", 2),
    ):
        homes = [*_items(groups, sequence), header]
        numbers = next((read for home in homes if (read := read_numbers(home, keyword))), [])
        if len(numbers) != count or None in numbers:
            return None
        found.append(tuple(float(value) for value in numbers if value is not None))
    is_valid = min(found[2]) > 0 and np.allclose(_dots(found[1]), np.eye(2), atol=0.01)
    return Plane(*found) if is_valid else None


def _dots(orientation: tuple[float, ...]) -> Any:
    axes = np.reshape(orientation, (2, 3))
    return axes @ axes.T


def read_segmentation(uri: str, settings: DatasetSettings) -> Segmentation | int | None:
    """Return a DICOM segmentation, the number of frames of another DICOM object, or None for a file of another format.

    Raises:
        ImageError: it cannot be read.
    """
    header = read_uids(uri, settings)
    if header is None:
        return None
    with damage(uri):
        if not _is_segmentation(header):
            return num_frames(header)
    data = read_image_bytes(uri, None, settings.max_image_bytes, allow=settings.allow)
    with damage(uri):
        return _parse_segmentation(uri, header, open_labels(data, uri, settings.reading(RunSettings())))


def _parse_segmentation(uri: str, header: Dataset, read: Labels) -> Segmentation:
    labels = {
        int(item.SegmentNumber): str(item.get("SegmentLabel") or "").strip()
        for item in header.get("SegmentSequence") or ()
        if int(item.SegmentNumber)  # 0 is the background of a label map
    }
    kind = str(header.get("SegmentationType") or "BINARY")
    largest = min(int(read_number(header, "MaximumFractionalValue") or 255), 255) if kind == "FRACTIONAL" else 1
    foreground = tuple(range((largest + 1) // 2, largest + 1))  # of a share: half or more
    values = {number: (number,) if kind == "LABELMAP" else foreground for number in labels}
    frames = []
    for number in range(1, num_frames(header) + 1):
        selector, groups = f"frame={number - 1}", _groups(header, number)
        named = {int(item.ReferencedSegmentNumber) for item in _items(groups, "SegmentIdentificationSequence")}
        if kind != "LABELMAP" and not named:
            raise ImageError("unreadable", f"{uri}: its frame {number} does not say which segment it shows")
        shown = set(np.unique(read(selector)).tolist())
        segments = labels.keys() if kind == "LABELMAP" else named & labels.keys()
        present = frozenset(segment for segment in segments if shown & set(values[segment]))
        frames.append(SegmentFrame(selector, present, tuple(_sources(groups)), _size(header), _plane(header, number)))
    series = (item.get("SeriesInstanceUID") for item in header.get("ReferencedSeriesSequence") or ())
    return Segmentation(labels, values, frozenset(str(one) for one in series if one), tuple(frames))


def _sources(groups: list[Dataset]) -> Iterator[tuple[str, int | None]]:
    """Yield the images that a frame of a segmentation was made from."""
    for source in _items(_items(groups, "DerivationImageSequence"), "SourceImageSequence"):
        numbers = read_numbers(source, "ReferencedFrameNumber") or [None]
        for number in numbers:
            yield str(source.ReferencedSOPInstanceUID), None if number is None else int(number)
