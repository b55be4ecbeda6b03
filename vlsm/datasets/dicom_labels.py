"""DICOM images with labels: the record of an image, or of a folder with a series, becomes records of frames.

The label is one of these:

- **A DICOM segmentation.** Each segment and each frame of the image is a record. The prompt is the segment's label. If
  the record has a prompt of its own and the segmentation has several segments, only the segment of this name is used;
  of a single segment, the record's prompt is kept. A frame of the segmentation belongs to the frame of the image that
  it refers to (ReferencedSOPInstanceUID and ReferencedFrameNumber), or, without a reference, to that at its position.
- **Another DICOM object** with as many frames as the image: its stored values are the labels.
- **A volume** (NIfTI, NRRD, MetaImage) for the slices of a series, which may come in any order and orientation. The
  rules of `vlsm.datasets.volumes` apply. The records hold their masks, because a series is no volume file.

A frame without the class is left out, unless `data.absent_classes` is "empty".
"""

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

import nibabel as nib
import numpy as np
from pycocotools import mask as coco

from vlsm.config import RunSettings
from vlsm.datasets.coco_shapes import join
from vlsm.datasets.dicom_frames import Frame, Segmentation, SegmentFrame, read_frames, read_segmentation
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.volumes import DICOM, check_grids, is_volume, mask_uris, may_be_dicom_pair, read_grid, values_of
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import kind_of
from vlsm.images.reader import Reader
from vlsm.images.volumes import AXES, VolumeGrid, place

logger = logging.getLogger("vlsm")

T = TypeVar("T")

_THREADS = 4  # segmentations and label volumes in memory at a time


def expand_dicom(records: Iterable[Record], settings: DatasetSettings) -> Iterator[Record | ManifestError]:
    """Yield the records of the frames for each record of DICOM files, and the other records as they are.

    Args:
        records: of a dataset.
        settings: of the dataset: limits, and `absent_classes`.

    Yields:
        Records, and an error for each image that does not fit its label.
    """
    labels, num_left_out = _Labels(settings), list[int]()

    def expand(record: Record) -> list[Record] | list[ManifestError]:
        if not may_be_dicom_pair(record):
            return [record]
        try:
            found = list(labels.expand(record))
        except (ManifestError, ImageError) as error:
            return [ManifestError(f"{record.where}: {error}")]
        kept = [one for one in found if settings.absent_classes == "empty" or not _is_empty(one)]
        num_left_out.append(len(found) - len(kept))
        return kept

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from itertools.chain.from_iterable(pool.map(expand, records))
    if any(num_left_out):
        logger.info(
            "%d pairs of a DICOM frame and a class are left out, because the frame does not show the class "
            "(data.absent_classes=empty keeps them)",
            sum(num_left_out),
        )


def _is_empty(record: Record) -> bool:
    return record.mask_size is not None and record.mask_rle == join([], record.mask_size)


class _Once(Generic[T]):
    """Calls a function once for each location. Threads that need the same location wait for the first one."""

    def __init__(self, read: Callable[[str], T]) -> None:
        self._read, self._results, self._lock = read, dict[str, Future[T]](), threading.Lock()

    def __call__(self, uri: str) -> T:
        with self._lock:
            if is_first := uri not in self._results:
                self._results[uri] = Future()
        if is_first:
            try:
                self._results[uri].set_result(self._read(uri))
            except Exception as error:  # the other threads raise it too
                self._results[uri].set_exception(error)
        return self._results[uri].result()


class _Labels:
    """Expands records. Records can share an image or a segmentation, which is read once."""

    def __init__(self, settings: DatasetSettings) -> None:
        self._settings = settings
        self._open = _Once(functools.partial(read_segmentation, settings=settings))
        self._frames = _Once(functools.partial(read_frames, settings=settings))

    def expand(self, record: Record) -> Iterator[Record]:
        """Yield the records of the frames of a record.

        Raises:
            ImageError: a file cannot be read.
            ManifestError: the label does not fit the image.
        """
        record = replace(record, image_uri=record.image_uri.rstrip("/"))
        if record.is_negative:
            yield from self._of_negative(record)
            return
        if is_volume(record.mask_uri):
            yield from _of_volume(record, self._frames(record.image_uri), self._settings)
            return
        opened = {uri: self._open(uri) for uri in mask_uris(record)}
        counts = [label for label in opened.values() if isinstance(label, int)]
        if not all(isinstance(label, Segmentation) for label in opened.values()):
            yield from self._of_plain(record, counts) if counts else [record]
            return
        frames = self._frames(record.image_uri)
        for uri, label in opened.items():
            if isinstance(label, Segmentation):
                yield from _of_segmentation(replace(record, mask_uri=uri, more_masks=()), frames, label)

    def _of_negative(self, record: Record) -> Iterator[Record]:
        """Yield the records of the frames of a file or series that does not show the finding."""
        frames = list[Frame]()
        with contextlib.suppress(ImageError):  # a picture without an ending; what is broken says so when it is read
            frames = self._frames(record.image_uri)
        is_single = len(frames) == 1 and frames[0].uri == record.image_uri
        yield from [record] if is_single or not frames else (_record_of(record, frame) for frame in frames)

    def _of_plain(self, record: Record, counts: list[int]) -> Iterator[Record]:
        """Yield the records of an image whose masks are DICOM objects with stored values."""
        is_dicom = kind_of(record.image_uri) in DICOM
        frames = self._frames(record.image_uri) if is_dicom or max(counts) > 1 else []
        if len(frames) <= 1 and set(counts) == {1}:
            yield record
            return
        if {len(frames)} != set(counts) or len({frame.uri for frame in frames}) > 1:
            raise ManifestError(
                f"{record.mask_uri} has {counts[0]} frames and its image {record.image_uri} has {len(frames)}; "
                "both must be one file with equally many frames"
            )
        for frame in frames:
            yield _record_of(record, frame, mask_selector=frame.selector)


def _record_of(record: Record, frame: Frame, what: str = "", **fields: object) -> Record:
    """Return the record of a frame. All frames of a series are a group; so are the images of one segmentation."""
    place_name = frame.selector or frame.uri.rpartition("/")[2]
    is_whole = frame.selector is None and frame.uri == record.image_uri
    return replace(
        record,
        where=f"{record.where}, {what}{place_name}",
        image_uri=frame.uri,
        image_selector=frame.selector,
        group=record.group or (record.mask_uri if is_whole and not record.is_negative else record.image_uri),
        **fields,  # type: ignore[arg-type]
    )


def _of_segmentation(record: Record, frames: list[Frame], label: Segmentation) -> Iterator[Record]:
    """Yield the record of each frame of an image and each chosen segment; without pixels of it, with an empty mask."""
    chosen = _choose_segments(record, label)
    shown = _match(record, frames, label)
    for frame in frames:
        for number, prompts in chosen.items():
            found = [one for one in shown.get((frame.instance, frame.number), ()) if number in one.segments]
            what = f"segment {label.labels[number]!r}, "
            named = replace(record, prompts=prompts)
            if len(found) > 1:
                raise ManifestError(f"{record.mask_uri} has {len(found)} frames of {what}for {frame.uri}")
            if found:
                yield _record_of(named, frame, what, mask_selector=found[0].selector, labels=label.values[number])
            else:
                yield _record_of(named, frame, what, mask_rle=join([], frame.size), mask_size=frame.size)


def _choose_segments(record: Record, label: Segmentation) -> dict[int, dict[str, tuple[str, ...]]]:
    """Return the prompts of each segment that makes records."""
    unnamed = [number for number, text in label.labels.items() if not text]
    if not label.labels or (unnamed and not record.prompts):
        raise ManifestError(f"{record.mask_uri} has no segments with a label")
    if not record.prompts:
        return {number: {"p1": (text,)} for number, text in label.labels.items()}
    if len(label.labels) == 1:
        return dict.fromkeys(label.labels, record.prompts)
    wanted = {text.strip().lower() for texts in record.prompts.values() for text in texts}
    chosen = [number for number, text in label.labels.items() if text.lower() in wanted]
    if not chosen:
        known = ", ".join(map(repr, label.labels.values()))
        raise ManifestError(f"{record.mask_uri} has the segments {known:.300}; none is a prompt of the record")
    return dict.fromkeys(chosen, record.prompts)


def _match(record: Record, frames: list[Frame], label: Segmentation) -> dict[tuple[str, int], list[SegmentFrame]]:
    """Return the frames of a segmentation for each frame of the image, by its UID and number."""
    by_instance = {
        instance: list(group) for instance, group in itertools.groupby(frames, key=lambda frame: frame.instance)
    }
    shown: dict[tuple[str, int], list[SegmentFrame]] = {}
    num_lone = 0
    for one in label.frames:
        matches = _frames_of(one, frames, by_instance)
        num_lone += not matches
        if len(matches) > 1:
            raise ManifestError(f"{record.mask_uri}: {one.selector} belongs to {len(matches)} frames of its image")
        for match in matches:
            if one.size != match.size or (one.plane and match.plane and not one.plane.is_same(match.plane)):
                raise ManifestError(
                    f"{record.mask_uri}: the pixels of {one.selector} are at other places than those of {match.uri}; "
                    "the segmentation must have the pixels of its image"
                )
            shown.setdefault((match.instance, match.number), []).append(one)
    series = {frame.series for frame in frames}
    if not shown and label.frames and not (label.series & series):
        raise ManifestError(f"{record.mask_uri} is a segmentation of other images than {record.image_uri}")
    if num_lone and frames[0].uri != record.image_uri:  # a folder should have all images
        logger.warning(
            "%s: %d of %d frames are of images that are not in %s; they are left out",
            *(record.mask_uri, num_lone, len(label.frames), record.image_uri),
        )
    return shown


def _frames_of(one: SegmentFrame, frames: list[Frame], by_instance: dict[str, list[Frame]]) -> list[Frame]:
    """Return the frames of an image that a frame of a segmentation belongs to."""
    found, vague = dict[Frame, None](), [] if one.sources else frames
    for instance, number in one.sources:
        candidates = by_instance.get(instance, [])
        if number is not None or len(candidates) == 1:
            found.update(dict.fromkeys(frame for frame in candidates if number in (None, frame.number)))
        else:
            vague = [*vague, *candidates]  # a file with several frames, of which it does not say which
    if one.plane:
        found.update(dict.fromkeys(frame for frame in vague if frame.plane and frame.plane.is_same(one.plane)))
    return list(found)


def _of_volume(record: Record, frames: list[Frame], settings: DatasetSettings) -> Iterator[Record]:
    """Yield the records of the slices of a series with a label volume."""
    if record.more_masks:
        raise ManifestError(f"{record.image_uri} is DICOM and has several label volumes; join them into one")
    frames, grid = _stack(record.image_uri, frames, settings)
    stored = _read_turned(record, grid, settings)
    values = [values_of(stored[:, :, number], record.mask_uri) for number in range(len(frames))]
    classes = record.labels or tuple(sorted(frozenset[int]().union(*values)))
    if not record.labels:
        logger.info("%s: every value except 0 is foreground", record.mask_uri)
    for number, frame in enumerate(frames):
        mask = np.isin(stored[:, :, number].T, classes)
        counts = coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode("ascii")
        yield _record_of(record, frame, mask_rle=counts, mask_size=frame.size)


def _stack(uri: str, frames: list[Frame], settings: DatasetSettings) -> tuple[list[Frame], VolumeGrid]:
    """Return the frames of a series in the order of their positions, and the grid of (columns, rows, frames)."""
    planes = [frame.plane for frame in frames if frame.plane]
    kinds = {(frame.series, frame.size) for frame in frames}
    if len(planes) < len(frames) or len(kinds) > 1:
        raise ManifestError(f"{uri} must hold one series of equal size with positions to have a label volume")
    first = planes[0]
    axes = np.reshape(first.orientation, (2, 3))
    normal = np.cross(*axes)
    order = np.argsort([np.dot(normal, plane.position) for plane in planes], kind="stable")
    positions = np.array([planes[number].position for number in order])
    steps = np.diff(positions, axis=0)
    is_even = all(np.allclose(plane.orientation, first.orientation, atol=0.01) for plane in planes)
    is_even = is_even and all(np.allclose(plane.spacing, first.spacing, rtol=0.01) for plane in planes)
    if len(steps) and not (is_even and np.linalg.norm(steps[0]) > 0 and np.allclose(steps, steps.mean(0), atol=0.05)):
        raise ManifestError(f"{uri}: its slices are not parallel at equal distances; a label volume does not fit them")
    step = steps.mean(0) if len(steps) else normal
    (height, width), (between_rows, between_columns) = frames[0].size, first.spacing
    vectors = np.array([axes[0] * between_columns, axes[1] * between_rows, step])
    grid = VolumeGrid((width, height, len(frames)), 1, place(vectors, positions[0]), settings.slices)
    return [frames[number] for number in order], grid


def _read_turned(record: Record, grid: VolumeGrid, settings: DatasetSettings) -> np.ndarray:
    """Return the labels of a volume file with the axes of a grid, (X, Y, Z) of the stored type."""
    uri, label = record.mask_uri, read_grid(record.mask_uri, settings)
    check_grids(grid, record.image_uri, label, uri)
    selectors = label.selectors()
    content, _ = Reader(settings.reading(RunSettings())).open({"image_uri": uri, "selector": selectors[0]})
    planes = [content.labels(selector)[::-1, ::-1].T for selector in selectors]  # as `VolumeGrid.slice_of`, reversed
    canonical = np.moveaxis(np.stack(planes), 0, AXES[label.axis])
    body = np.array([[0, 1], [1, 1], [2, 1]])
    turned: np.ndarray = nib.apply_orientation(
        canonical, nib.orientations.ornt_transform(body, nib.io_orientation(grid.affine))
    )
    return turned
