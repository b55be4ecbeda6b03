"""The segmentation of a COCO annotation as run lengths: polygons, uncompressed and compressed run lengths."""

from typing import Any

import numpy as np
from pycocotools import mask as coco

from vlsm.errors import ManifestError
from vlsm.images.run_lengths import unpack_run_lengths

_MAX_OUTLINE_PX = 1_000_000  # pycocotools needs some 260 bytes for each

Rle = dict[str, Any]  # size (height, width) and compressed counts, as pycocotools has it


def encode_segmentation(segmentation: Any, size: tuple[int, int], where: str) -> Rle:
    """Return the run lengths of a segmentation, as `COCO.annToRLE` of pycocotools does.

    Everything is checked first, because pycocotools trusts it. Two cases differ from it. pycocotools takes a polygon of
    two points as a box; here it is an error. Run lengths of another size than the image's are an error.

    Args:
        segmentation: as the JSON has it.
        size: (height, width) of the image in pixels.
        where: the annotation, for the message.

    Raises:
        ManifestError: it is no segmentation of this image.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons = [check_polygon(polygon, size, where) for polygon in segmentation]
        merged: Rle = coco.merge(coco.frPyObjects(polygons, *size))
        return merged
    if isinstance(segmentation, dict):
        return _read_run_lengths(segmentation, size, where)
    raise ManifestError(f"{where}: segmentation is {segmentation!r:.80}; it must be polygons or run lengths")


def join(rles: list[Rle], size: tuple[int, int]) -> str:
    """Return the compressed counts of the union of run lengths; of an empty mask if there are none."""
    if not rles:
        rles = [coco.frPyObjects({"size": list(size), "counts": [size[0] * size[1]]}, *size)]
    counts: bytes = coco.merge(rles)["counts"]
    return counts.decode("ascii")


def check_polygon(polygon: Any, size: tuple[int, int], where: str) -> list[float]:
    """Return x and y of the corners of a polygon in turn.

    Corners may lie a little outside of the image: the part outside is cut off. pycocotools needs memory for each pixel
    along the edges, so corners that are farther away than the image is wide or high are an error.
    """
    try:
        corners = np.array(polygon, np.float64)
    except (ValueError, TypeError, OverflowError):
        corners = np.empty(0)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
        raise ManifestError(f"{where}: a polygon is {polygon!r:.80}; it must be x and y of three or more corners")
    height, width = size
    places = corners.reshape(-1, 2)
    if not ((places >= (-width, -height)) & (places <= (2 * width, 2 * height))).all():
        raise ManifestError(f"{where}: a polygon has corners far outside of the image of {width} x {height} pixels")
    length_px = np.abs(places - np.roll(places, 1, axis=0)).max(axis=1).sum()
    if length_px > _MAX_OUTLINE_PX:
        raise ManifestError(
            f"{where}: a polygon has an outline of {length_px:,.0f} pixels; {_MAX_OUTLINE_PX:,} are read"
        )
    values: list[float] = corners.tolist()
    return values


def _read_run_lengths(segmentation: Rle, size: tuple[int, int], where: str) -> Rle:
    counts, stated = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(stated, list) or stated != list(size):
        height, width = size
        raise ManifestError(
            f"{where}: its run lengths have the size {stated!r:.80}; the image has the height {height}, width {width}"
        )
    if isinstance(counts, str):
        try:
            counts = unpack_run_lengths(counts).tolist()
        except ValueError as error:
            raise ManifestError(f"{where}: {error}") from None
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ManifestError(f"{where}: its run lengths are damaged")
    # pycocotools leaves the pixels behind the last run undefined
    if sum(counts) != size[0] * size[1]:
        raise ManifestError(f"{where}: its run lengths have {sum(counts):,} of {size[0] * size[1]:,} pixels")
    encoded: Rle = coco.frPyObjects({"size": list(size), "counts": counts}, *size)
    return encoded
