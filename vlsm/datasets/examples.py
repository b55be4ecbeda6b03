"""The image and the mask of a record, in the image's original size. All jobs read labelled files here."""

from dataclasses import dataclass, field

import numpy as np

from vlsm.config import RunSettings
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.datasets.spacing import read_spacing
from vlsm.errors import ImageError
from vlsm.images.decode import orientation_of
from vlsm.images.reader import Content, Reader
from vlsm.images.run_lengths import decode_run_lengths
from vlsm.images.stored import COLOURS, check_pixels, upright


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask, and what its files say.

    Attributes:
        mask: (H, W) uint8 of 0 and 1.
        stored: the stored values of each mask file, (H, W) of any type; empty if the record holds the mask itself.
        sha256: SHA-256 of the files.
        orientation: the highest EXIF orientation of the files; 1 if none has any.
    """

    mask: np.ndarray
    stored: list[np.ndarray] = field(default_factory=list)
    sha256: str = ""
    orientation: int = 1


@dataclass(frozen=True, eq=False)
class Example:
    """An image with its mask.

    Attributes:
        image: (H, W, 3) uint8, upright.
        image_sha256: SHA-256 of the image file, and of the image's place in it.
        orientation: EXIF orientation of the image file, 1 if it has none.
        target: the mask, turned as the image where it has to be.
        is_turned: whether the mask had to be turned; see `ExampleReader.read`.
    """

    image: np.ndarray
    image_sha256: str
    orientation: int
    target: Mask
    is_turned: bool


class ExampleReader:
    """Reads images and masks. A file with several images is read once for records that follow each other.

    Args:
        settings: the datasets' settings.
        run: how long to wait for a store; None for the defaults.
    """

    def __init__(self, settings: DatasetSettings, run: RunSettings | None = None) -> None:
        self._settings = settings
        reading = settings.reading(run or RunSettings())
        self._images, self._masks = Reader(reading), Reader(reading)

    def read(self, record: Record) -> Example:
        """Return the image and the mask of a record, both upright.

        An image can have an EXIF orientation while its mask has none. If the mask then has the size of the image as it
        is shown, it stays as it is. If it has the size of the image as it is stored, it is turned like the image.

        Raises:
            ImageError: a file cannot be read, or the sizes differ ("size").
            StorageError: the store was unavailable for too long.
        """
        content, frame = self._images.open({"image_uri": record.image_uri, "selector": record.image_selector})
        image = content.decode(frame).pixels
        orientation = _orientation(content)
        target = Mask(np.zeros(image.shape[:2], np.uint8)) if record.is_negative else self.read_mask(record)
        mask, is_turned = target.mask, False
        if mask.shape != image.shape[:2] and orientation > 1 and target.orientation == 1:
            mask, is_turned = upright(mask, orientation), True
        if mask.shape != image.shape[:2]:
            sizes = " and ".join(f"{width} x {height}" for height, width in (image.shape[:2], target.mask.shape))
            names = f"{record.image_uri} and {record.mask_uri}"
            raise ImageError("size", f"{names} are of different sizes, {sizes}; they must be equal")
        turned = Mask(mask, target.stored, target.sha256, target.orientation)
        return Example(image, content.digest(frame), orientation, turned, is_turned)

    def read_mask(self, record: Record) -> Mask:
        """Return the mask of a record as its file holds it; a pixel of any of several masks is foreground.

        The mask of a negative record is empty and has the size of its image, which is read for it.

        Raises:
            ImageError: a file cannot be read, or several masks differ in size ("size").
            StorageError: the store was unavailable for too long.
        """
        if record.is_negative:
            content, frame = self._images.open({"image_uri": record.image_uri, "selector": record.image_selector})
            return Mask(np.zeros(content.decode(frame).pixels.shape[:2], np.uint8))
        if record.mask_rle is not None:
            size = record.mask_size or (0, 0)
            check_pixels(size, record.where, self._settings.max_pixels)
            try:
                return Mask(decode_run_lengths(record.mask_rle, size))
            except ValueError as error:
                raise ImageError("corrupt", f"{record.where}: {error}") from None
        masks = [self._read_mask(record, uri) for uri in (record.mask_uri, *record.more_masks)]
        if len(masks) == 1:
            return masks[0]
        if len({mask.mask.shape for mask in masks}) > 1:
            sizes = ", ".join(f"{mask.mask.shape[1]} x {mask.mask.shape[0]}" for mask in masks)
            raise ImageError("size", f"{record.mask_uri} and the other masks are of different sizes: {sizes}")
        return Mask(
            np.maximum.reduce([mask.mask for mask in masks]),
            [values for mask in masks for values in mask.stored],
            "+".join(mask.sha256 for mask in masks),
            max(mask.orientation for mask in masks),
        )

    def read_spacing(self, record: Record) -> tuple[float, float] | None:
        """Return the distance between rows, and between columns, in mm: of the mask's file, else of the image's.

        None if neither states it.

        Raises:
            ImageError: a file cannot be read.
            StorageError: the store was unavailable for too long.
        """
        has_file = record.mask_rle is None and not record.is_negative
        masks = [(self._masks, record.mask_uri, record.mask_selector)] if has_file else []
        for reader, uri, selector in (*masks, (self._images, record.image_uri, record.image_selector)):
            content, frame = reader.open({"image_uri": uri, "selector": selector})
            if (spacing := read_spacing(content, frame, self._settings.slices)) is not None:
                return spacing
        return None

    def _read_mask(self, record: Record, uri: str) -> Mask:
        content, frame = self._masks.open({"image_uri": uri, "selector": record.mask_selector})
        are_colours = any(label >= COLOURS for label in record.labels)
        stored = content.codes(frame, are_colours) if record.labels else content.labels(frame)
        is_set = np.isin(stored, record.labels) if record.labels else stored > self._settings.mask_threshold
        return Mask(is_set.astype(np.uint8), [stored], content.digest(frame), _orientation(content))


def _orientation(content: Content) -> int:
    return orientation_of(content.data) if content.kind in ("image", "tiff", None) else 1
