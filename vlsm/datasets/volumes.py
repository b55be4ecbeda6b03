"""Volumes with label volumes (NIfTI, NRRD, MetaImage): the record of a volume becomes records of its slices.

The rules:

- The label must have the voxels of its image. It may be stored in another orientation: slices follow the directions of
  the body (see `vlsm.images.volumes`), so equal numbers are equal places. The corners of both may be apart by a quarter
  of a voxel, because headers round. A label that was resampled is an error.
- `record.labels` are the values of the class. Without them, every value except 0 is foreground; `data.mask_threshold`
  does not count.
- A slice without the class is left out, unless `data.absent_classes` is "empty".
- Of an image with several channels or times, the first is used, unless the label has as many.
- Slices of one image are a group: they must not be in several splits.

A label file is read once, when the dataset is read. Of an image, only the header is read.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsm import storage
from vlsm.config import RunSettings
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ImageError, ManifestError, StorageError
from vlsm.images.fetch import image_errors
from vlsm.images.formats import FORMATS, UNNAMED, kind_of
from vlsm.images.reader import Reader

if TYPE_CHECKING:  # it needs nibabel, which takes a second to import
    from vlsm.images.volumes import VolumeGrid

logger = logging.getLogger("vlsm")

_KINDS = ("nifti", "nrrd", "metaimage")
DICOM = ("dicom", UNNAMED)  # DICOM files often have no ending
_THREADS = 4  # label files in memory at a time
_UNREAD = "every slice"
_MAX_VALUES = 1000  # more different values are no classes
_TOLERANCE = 0.25  # of a voxel; a grid that is half a voxel off is another grid


@dataclass(frozen=True, eq=False)
class LabelVolume:
    """A label file.

    Attributes:
        grid: where its voxels are.
        values: the values in each slice, by selector, without 0.
    """

    grid: "VolumeGrid"
    values: dict[str, frozenset[int]]

    @property
    def foreground(self) -> tuple[int, ...]:
        """All values of the file, without 0."""
        return tuple(sorted(frozenset[int]().union(*self.values.values())))


def expand_volumes(
    records: Iterable[Record | ManifestError], settings: DatasetSettings
) -> Iterator[Record | ManifestError]:
    """Yield the records of the slices for each record of a volume, and the other records as they are.

    Args:
        records: of a dataset, and errors, which are passed on. Records with a selector or with a mask of their own are
            not volumes.
        settings: of the dataset: limits, the direction of slices, and `absent_classes`.

    Yields:
        Records, and an error for each volume that does not fit its label. The record of a damaged file stays, with a
        selector of no slice: reading it gives the ImageError, as for a damaged picture.

    Raises:
        StorageError: the store was unavailable for too long.
    """
    items = list(records)
    pairs = [item for item in items if isinstance(item, Record) and is_volume_pair(item)]
    files = dict.fromkeys((record.image_uri, *mask_uris(record)) for record in pairs)
    pool, counts, problems = ThreadPoolExecutor(_THREADS), Counter[str](), set[str]()
    try:
        opened = _open_all([uris for uris in files if all(map(is_volume, uris))], settings, pool)
        for record in items:
            if isinstance(record, ManifestError) or not is_volume_pair(record):
                yield record
                continue
            try:
                yield from _slices(record, opened, settings, counts)
            except ImageError as error:
                if error.reason in ("unavailable", "timeout"):
                    raise StorageError(str(error)) from error
                yield replace(record, mask_selector=_UNREAD)
            except ManifestError as error:
                if str(error) not in problems:  # records of several classes share their files
                    problems.add(str(error))
                    yield ManifestError(f"{record.where}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    _report(counts, settings)
    if counts["slices"] and not counts["used"]:
        yield ManifestError(f"none of the {counts['slices']:,} slices of the label volumes holds a class")


def is_volume(uri: str) -> bool:
    """Return whether a file has the name of a volume."""
    return kind_of(uri) in _KINDS


def is_volume_pair(record: Record) -> bool:
    """Return whether a record is of a volume or a label volume as a whole."""
    return _is_whole(record) and any(map(is_volume, (record.image_uri, *mask_uris(record))))


def may_be_dicom_pair(record: Record) -> bool:
    """Return whether a record may have a DICOM mask, or be a DICOM image with a label volume, by the names of files."""
    if not _is_whole(record):
        return False
    if record.is_negative:
        return kind_of(record.image_uri.rstrip("/")) in DICOM
    image, mask = (kind_of(uri.rstrip("/")) for uri in (record.image_uri, record.mask_uri))
    return mask in DICOM or (mask in _KINDS and image in DICOM)


def _is_whole(record: Record) -> bool:
    return record.image_selector is None and record.mask_selector is None and record.mask_rle is None


def mask_uris(record: Record) -> tuple[str, ...]:
    """Return the locations of all masks of a record."""
    return record.mask_uris


Opened = tuple[dict[str, "Future[VolumeGrid]"], dict[str, Future[LabelVolume]]]


def _open_all(files: list[tuple[str, ...]], settings: DatasetSettings, pool: ThreadPoolExecutor) -> Opened:
    """Begin to read the headers of the images and the contents of the labels, in their order."""
    images, labels = dict[str, "Future[VolumeGrid]"](), dict[str, Future[LabelVolume]]()
    for image, *masks in files:
        if image not in images:
            images[image] = pool.submit(read_grid, image, settings)
        for mask in masks:
            if mask not in labels:
                labels[mask] = pool.submit(read_labels, mask, settings)
    return images, labels


def read_grid(uri: str, settings: DatasetSettings) -> "VolumeGrid":
    """Return where the voxels of a volume file are, from its header.

    Raises:
        ImageError: it cannot be read.
    """
    module: Any = FORMATS[kind_of(uri) or ""].load()

    def read() -> "VolumeGrid":
        fs, path = storage.open_uri(uri, settings.allow)
        with fs.open(path, "rb") as file:
            grid: VolumeGrid = module.read_header(file, uri, settings.slices).grid
            return grid

    with image_errors(uri):
        return storage.with_retries(read, uri, storage.QUICK_S)


def read_labels(uri: str, settings: DatasetSettings) -> LabelVolume:
    """Return what a label file holds.

    Raises:
        ImageError: it cannot be read.
        ManifestError: its values are no labels.
    """
    grid = read_grid(uri, settings)
    selectors = grid.selectors()
    content, _ = Reader(settings.reading(RunSettings())).open({"image_uri": uri, "selector": selectors[0]})
    values = {selector: values_of(content.labels(selector), uri) for selector in selectors}
    volume = LabelVolume(grid, values)
    if len(volume.foreground) > _MAX_VALUES:
        raise ManifestError(f"{uri} has more than {_MAX_VALUES:,} different values; it is no label volume")
    return volume


def values_of(labels: np.ndarray, uri: str) -> frozenset[int]:
    """Return the values in an array of labels, without 0.

    Raises:
        ManifestError: there are others than whole numbers, or too many.
    """
    found = np.unique(labels[labels != 0])
    if found.dtype.kind == "f" and not (np.isfinite(found).all() and (found == np.rint(found)).all()):
        raise ManifestError(f"{uri} has values that are not whole numbers; it is no label volume")
    if len(found) > _MAX_VALUES:
        raise ManifestError(f"{uri} has more than {_MAX_VALUES:,} different values; it is no label volume")
    return frozenset(int(value) for value in found)


def _slices(
    record: Record, opened: Opened, settings: DatasetSettings, counts: Counter[str]
) -> Iterator[Record | ManifestError]:
    """Yield the records of a volume's slices."""
    masks = mask_uris(record)
    if record.is_negative:
        yield from _negative_slices(record, opened[0][record.image_uri].result())
        return
    if others := [uri for uri in (record.image_uri, *masks) if not is_volume(uri)]:
        volume = next(uri for uri in (record.image_uri, *masks) if is_volume(uri))
        raise ManifestError(f"{volume} is a volume and {others[0]} is not; both must be volumes")
    image, labels = opened[0][record.image_uri].result(), [opened[1][uri].result() for uri in masks]
    for uri, label in zip(masks, labels, strict=True):
        check_grids(image, record.image_uri, label.grid, uri)
    classes = record.labels or tuple(sorted({value for label in labels for value in label.foreground}))
    counts["without classes"] += not record.labels
    has_more = image.num_volumes > labels[0].grid.num_volumes
    counts["with channels"] += has_more
    for selector in labels[0].grid.selectors():
        is_present = any(value in label.values[selector] for label in labels for value in classes)
        counts["slices"] += 1
        counts["used"] += is_present
        if is_present or settings.absent_classes == "empty":
            yield replace(
                record,
                where=f"{record.where}, {selector}",
                image_selector=f"volume=0,{selector}" if has_more else selector,
                mask_selector=selector,
                labels=classes,
                group=record.group or record.image_uri,
            )


def _negative_slices(record: Record, image: "VolumeGrid") -> Iterator[Record]:
    """Yield the records of all slices of a volume that does not show the finding; of several channels the first."""
    from vlsm.images.volumes import parse_selector

    for selector in image.selectors():
        if parse_selector(selector)[0] == 0:
            yield replace(
                record,
                where=f"{record.where}, {selector}",
                image_selector=selector,
                group=record.group or record.image_uri,
            )


def check_grids(image: "VolumeGrid", image_uri: str, label: "VolumeGrid", label_uri: str) -> None:
    """Raise a ManifestError unless a label has the voxels of its image, in any orientation."""
    (shape, affine), (label_shape, label_affine) = image.canonical, label.canonical
    if shape != label_shape or label.num_volumes not in (1, image.num_volumes):
        sizes = [
            " x ".join(map(str, (*shape, *[grid.num_volumes] * (grid.num_volumes > 1))))
            for shape, grid in ((shape, image), (label_shape, label))
        ]
        raise ManifestError(
            f"{label_uri} has {sizes[1]} voxels, from left to right, back to front and feet to head; its image "
            f"{image_uri} has {sizes[0]}; resample the label to the image"
        )
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, side - 1) for side in shape))])
    apart = np.linalg.norm(((affine - label_affine) @ corners.T)[:3], axis=0).max()
    voxel = np.linalg.norm(affine[:3, :3], axis=0).min()
    if not apart <= _TOLERANCE * voxel:
        raise ManifestError(
            f"{label_uri} is up to {apart:.3g} mm away from its image {image_uri}, whose voxels have {voxel:.3g} mm; "
            "resample the label to the image, or correct the header that is wrong"
        )


def _report(counts: Counter[str], settings: DatasetSettings) -> None:
    if not counts["slices"]:
        return
    fate = (
        "have empty masks"
        if settings.absent_classes == "empty"
        else "are left out (data.absent_classes=empty keeps them)"
    )
    logger.info(
        "%d of %d slices of classes in volumes show the class; the others %s", counts["used"], counts["slices"], fate
    )
    if counts["without classes"]:
        logger.info("%d label volumes have no classes: every value except 0 is foreground", counts["without classes"])
    if counts["with channels"]:
        logger.info("%d image volumes have several channels or times; only the first is used", counts["with channels"])
