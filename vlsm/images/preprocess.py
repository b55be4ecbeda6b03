"""Preprocessing: an image becomes pixel_values, and logits return to the original size of the image.

Training, segmentation, calibration and the forecast all resize with `Square` and normalise with `ImageSpec`. So their
preprocessing cannot differ.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as resizer
except ImportError:  # there are no wheels for Linux on ARM
    resizer = None

if TYPE_CHECKING:
    from torch import Tensor

Resize = Literal["squeeze", "letterbox"]

with np.errstate(invalid="ignore"):  # processors of ARM report the NaNs
    _FLOATS_OF_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # by their bits


class Square(NamedTuple):
    """The input square of a model. Models with equal squares share the resized pixels of an image.

    Attributes:
        size: side S in pixels.
        resize: "squeeze" stretches the image to the whole square, as for published models. "letterbox" keeps the aspect
            ratio, centres the image and pads it with black.
    """

    size: int
    resize: Resize = "squeeze"

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """Return the image in the model's square, resized bilinearly with antialiasing.

        Published models were trained with images that Pillow resized. Levels differ from Pillow's by at most 1 of 255.

        Args:
            image: (H, W, 3) uint8.

        Returns:
            (S, S, 3) uint8.
        """
        rows, columns = self.content(image.shape[:2])
        content = resize_bilinear(image, (rows.stop - rows.start, columns.stop - columns.start))
        if content.shape[:2] == (self.size, self.size):
            return content
        square = np.zeros((self.size, self.size, 3), np.uint8)
        square[rows, columns] = content
        return square

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """Return a mask (H, W) in the model's square, (S, S), by nearest neighbour; the padding is 0."""
        rows, columns = self.content(mask.shape)
        size = columns.stop - columns.start, rows.stop - rows.start  # Pillow's order
        square = np.zeros((self.size, self.size), mask.dtype)
        square[rows, columns] = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        return square

    def enlarge_logits(self, logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return logits at the original size of the image, resized bilinearly.

        Antialiasing applies if the image is smaller than the square.

        Args:
            logits: (S, S) float.
            size: (height, width) of the image in pixels.

        Returns:
            (height, width) float32, column-major in memory as COCO run lengths are, so that encoding needs no copy.
        """
        import cv2  # here: it takes memory in processes that only decode

        content = logits[self.content(size)]
        if content.dtype == np.float16:  # a cast takes twice as long
            across = _FLOATS_OF_HALVES.take(cv2.transpose(content.view(np.uint16)), mode="clip")
        else:
            across = cv2.transpose(content.astype(np.float32, copy=False))
        return resize_bilinear(across, (size[1], size[0])).T

    def content(self, size: tuple[int, ...]) -> tuple[slice, slice]:
        """Return the rows and columns of the square that an image of this (height, width) fills."""
        if self.resize == "squeeze":
            return slice(0, self.size), slice(0, self.size)
        longest = max(size)
        lengths = [max(1, round(length * self.size / longest)) for length in size]
        starts = [(self.size - length) // 2 for length in lengths]
        return slice(starts[0], starts[0] + lengths[0]), slice(starts[1], starts[1] + lengths[1])


@dataclass(frozen=True)
class ImageSpec:
    """The input of a model: a square, and the mean and standard deviation for its normalisation.

    Attributes:
        size, resize: as in `Square`.
        mean, std: per RGB channel, for levels from 0 to 1.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Resize = "squeeze"

    @property
    def square(self) -> Square:
        """The input square, which resizes images and enlarges logits."""
        return Square(self.size, self.resize)

    def normalize(self, images: "Tensor") -> "Tensor":
        """Return resized images as normalised pixel_values, on the device of the images.

        Args:
            images: (B, S, S, 3) uint8.

        Returns:
            (B, 3, S, S) float32, channels last in memory.
        """
        import torch  # here: processes that only decode need a quarter of the memory without torch

        # filled on the device: a copy from the host would wait for all work that is queued there
        mean, std = (
            torch.stack([torch.full((), value, device=images.device) for value in values])
            for values in (self.mean, self.std)
        )
        # in place: on a CPU, new arrays cost as much as the arithmetic
        return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an array of another size, like Pillow's bilinear resize, in less than half of its time.

    8-bit levels differ from Pillow's by at most 1, floats only by rounding. OpenCV enlarges floats; it has no
    antialiasing, which enlarging does not need.

    Args:
        pixels: (H, W, 3) uint8, or (H, W) float32.
        size: (height, width) of the result.

    Returns:
        (height, width, 3) uint8 or (height, width) float32. The array may be read-only.
    """
    (old_height, old_width), (height, width) = pixels.shape[:2], size
    if pixels.ndim == 2 and height >= old_height and width >= old_width:
        import cv2  # here: as above

        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    if resizer is None:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    kind = resizer.PixelType.U8x3 if pixels.ndim == 3 else resizer.PixelType.F32
    resized = resizer.ImageData(width, height, kind)
    bilinear = resizer.ResizeAlg.convolution(resizer.FilterType.bilinear)
    options = resizer.ResizeOptions(resize_alg=bilinear)
    resizer.Resizer().resize(resizer.ImageData(old_width, old_height, kind, pixels.tobytes()), resized, options)
    return np.frombuffer(resized.get_buffer(), pixels.dtype).reshape(height, width, *pixels.shape[2:])
