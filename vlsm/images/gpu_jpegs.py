"""JPEG files that a GPU may decode. `vlsm.images.decode` decodes all other files, and those that the GPU refuses."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from vlsm.images.codestreams import codestream_size, has_jpeg_end, jpeg_colours, rare_jpeg_bits, without_metadata
from vlsm.images.decode import stated_orientation
from vlsm.images.stored import check_pixels

_MOST_PIXELS = 1 << 25  # of one file: as float32 for the resizing, they take 400 MB of the GPU
_LONGEST_SIDE = 16_384  # of the hardware decoders; longer images come from scanners, and are few


class Jpeg(NamedTuple):
    """A JPEG to decode on a GPU.

    Attributes:
        size: (height, width) of the upright image in pixels.
        orientation: its EXIF orientation, 1 to 8, to apply after the decoding.
        name: its name in error messages.
        data: the file without metadata, so that a decoder neither turns the image nor reads a thumbnail.
    """

    size: tuple[int, int]
    orientation: int
    name: str
    data: bytes


@dataclass(frozen=True)
class Encoded:
    """A JPEG among the images of a shard; `vlsm.segmentation.gpu_decode` decodes it.

    Attributes:
        row, num_windows: its rows among the windows of the shard.
        orientation, name, data: as in `Jpeg`.
    """

    row: int
    num_windows: int
    orientation: int
    name: str
    data: bytes


def place_jpegs(images: Sequence[object], starts: Sequence[int]) -> list[Encoded]:
    """Return the images that are a Jpeg, with their rows.

    Args:
        images: N images, decoded or not.
        starts: the first row of each image, and the number of all rows.
    """
    return [
        Encoded(start, stop - start, image.orientation, image.name, image.data)
        for image, start, stop in zip(images, starts, starts[1:], strict=False)
        if isinstance(image, Jpeg)
    ]


def find_jpeg(data: bytes, name: str, max_pixels: int) -> Jpeg | None:
    """Return a file for a GPU, or None if the CPU must decode it. Only headers are read.

    A GPU gets whole JPEGs with 8 bits, grey or YCbCr: with them it agrees with the CPU but for rounding. CMYK, RGB,
    files of several images, and files that end early or have a damaged header are for the CPU.

    Args:
        data: the content of the file, of any format.
        name: the name of the file in error messages.
        max_pixels: images with more pixels are refused.

    Raises:
        ImageError: "too_large".
    """
    if data[:2] != b"\xff\xd8" or rare_jpeg_bits(data) is not None or not has_jpeg_end(data):
        return None
    height, width, num_channels = codestream_size(data) or (0, 0, 0)
    if num_channels not in (1, 3) or (num_channels == 3 and jpeg_colours(data) != "YCBCR"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            is_plain = image.format == "JPEG" and image.mode in ("L", "RGB") and image.size == (width, height)
            orientation = stated_orientation(image)
    except Exception:  # a damaged header can raise any type of error; the CPU's decoder says what it is
        return None
    if not is_plain:
        return None
    check_pixels((height, width), name, max_pixels)
    if height * width > _MOST_PIXELS or max(height, width) > _LONGEST_SIDE:
        return None
    orientation = orientation if orientation in range(1, 9) else 1
    size = (width, height) if orientation in range(5, 9) else (height, width)
    return Jpeg(size, orientation, name, without_metadata(data))
