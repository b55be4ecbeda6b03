"""Bilinear resizing with antialias, as Pillow does it, in less than half of its time."""

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as resizer
except ImportError:  # there are no wheels for Linux on ARM
    resizer = None


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An array of another size; levels of 255 are one away from Pillow's at most, floats are Pillow's but for rounding.

    Args:
        pixels: (H, W, 3) uint8, or (H, W) float32.
        size: (height, width) of what is to come.

    Returns:
        (height, width, 3) uint8 or (height, width) float32, not to be written to.
    """
    (old_height, old_width), (height, width) = pixels.shape[:2], size
    if resizer is None:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    kind = resizer.PixelType.U8x3 if pixels.ndim == 3 else resizer.PixelType.F32
    resized = resizer.ImageData(width, height, kind)
    bilinear = resizer.ResizeAlg.convolution(resizer.FilterType.bilinear)
    options = resizer.ResizeOptions(resize_alg=bilinear)
    resizer.Resizer().resize(resizer.ImageData(old_width, old_height, kind, pixels.tobytes()), resized, options)
    return np.frombuffer(resized.get_buffer(), pixels.dtype).reshape(height, width, *pixels.shape[2:])
