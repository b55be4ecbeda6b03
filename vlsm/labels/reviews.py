"""What an annotation tool states about one image: its name, its size, and the shapes of each label."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlsm.datasets.coco_shapes import Rle, check_polygon, encode_segmentation, join
from vlsm.errors import ImageError, ManifestError
from vlsm.images.brush_rle import decode_brush
from vlsm.images.polygons import fill_polygon
from vlsm.images.run_lengths import decode_run_lengths
from vlsm.limits import MAX_REGIONS

Key = tuple[str, str | None]  # image_uri and selector of an image


@dataclass(frozen=True)
class Brush:
    """A mask of Label Studio's brush, as its run lengths."""

    data: bytes


@dataclass(frozen=True)
class Outline:
    """A polygon in pixels; (0, 0) is the upper left corner of the image.

    Attributes:
        rings: the outer ring, then the holes, as a file has them: x and y of the corners in turn.
    """

    rings: tuple[Any, ...]


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of a COCO annotation, as its file has it."""

    value: Any


@dataclass(frozen=True)
class MaskFile:
    """A mask in an image file.

    Attributes:
        uri: location of the file.
    """

    uri: str


@dataclass(frozen=True)
class Prediction:
    """The mask of the run itself, which a reviewer has accepted.

    Attributes:
        digest: of the mask that the reviewer saw, see `vlsm.runs.marks.digest_mask`; None if nobody noted it.
    """

    digest: str | None


Shape = Brush | Outline | Segmentation | MaskFile | Prediction


@dataclass
class Review:
    """What a tool states about one image.

    Attributes:
        where: its place in the file, for messages.
        names: names and locations of the image, the most exact first.
        size: (height, width) in pixels; None if the file does not state it.
        shapes: shapes by label. A reviewed prompt without shapes is an empty mask.
        key: the image itself, if the tool has kept it.
        prompts: the prompts that were reviewed; None for all of the image.
        is_rejected: whether the annotator has rejected the image.
        problem: why nothing of it can be used.
    """

    where: str
    names: tuple[str, ...]
    size: tuple[int, int] | None = None
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    key: Key | None = None
    prompts: tuple[str, ...] | None = None
    is_rejected: bool = False
    problem: str | None = None

    @property
    def is_mask_file(self) -> bool:
        """Whether it is one mask in an image file, whose name tells the prompt."""
        return any(isinstance(shape, MaskFile) for shapes in self.shapes.values() for shape in shapes)


def draw_shapes(shapes: list[Shape], size: tuple[int, int], where: str) -> np.ndarray:
    """Return the union of shapes, (H, W) uint8 of 0 and 1. A mask file is read by `vlsm.labels.masks`.

    Args:
        shapes: the shapes of one label.
        size: (height, width) of the image in pixels.
        where: the image, for messages.

    Raises:
        ImageError: a shape is damaged, or does not fit the image.
    """
    if len(shapes) > MAX_REGIONS:
        raise ImageError("too_large", f"{where} has {len(shapes):,} regions; {MAX_REGIONS:,} are read")
    rles: list[Rle] = []
    mask = np.zeros(size, np.uint8)
    try:
        for shape in shapes:
            if isinstance(shape, Brush):
                mask |= decode_brush(shape.data, size)
            elif isinstance(shape, Outline) and len(shape.rings) > 1:
                mask |= fill_polygon([check_polygon(ring, size, where) for ring in shape.rings], size)
            else:
                value = list(shape.rings) if isinstance(shape, Outline) else getattr(shape, "value", None)
                rles.append(encode_segmentation(value, size, where))
    except ManifestError as error:
        raise ImageError("corrupt", str(error)) from error
    except ValueError as error:
        raise ImageError("corrupt", f"{where}: {error}") from error
    return mask | decode_run_lengths(join(rles, size), size) if rles else mask


def text_of(value: Any) -> str | None:
    """Return a value of a file if it is a text that is not blank, else None."""
    return value if isinstance(value, str) and value.strip() else None


def dict_of(value: Any) -> dict[str, Any]:
    """Return a value of a file if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """Return a value of a file if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def size_of(height: Any, width: Any) -> tuple[int, int] | None:
    """Return (height, width) if both values of a file are whole numbers above 0, else None."""
    are_whole = all(type(side) in (int, float) and side == side // 1 and side > 0 for side in (height, width))
    return (int(height), int(width)) if are_whole else None
