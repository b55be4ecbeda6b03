"""Reads folders of corrected masks: one image file per image and prompt.

The rules:

- A file with the name of our own export (`--format masks`) is the mask of its image and prompt. In a run with one
  prompt, a file may also be named after its image: `a.png` for `a.jpg`.
- Pixels are foreground above 127, or above 0 if no value of the file is higher than 1. Deep and colour images are read
  as those of labelled datasets. A file with other values in more than a twentieth of its pixels, or without a value
  near 255, is refused: it is a photograph, or has classes.
- Each file counts as reviewed. A prompt without a file was not reviewed. A mask without foreground is empty.
"""

from collections.abc import Iterator

import numpy as np

from vlsm.config import RunSettings
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ImageError
from vlsm.images.formats import FORMATS, kind_of
from vlsm.images.reader import Reader
from vlsm.labels.reviews import MaskFile, Review

# JPEGs have noise around 0 and 255; what is between, or brighter than 1 and dark everywhere, is another kind of file
_DARK, _BRIGHT, _MOST_BETWEEN = 32, 223, 0.05


def read_mask_files(folder: str, names: list[str]) -> Iterator[Review]:
    """Yield a review for each image file; its label is "": the name tells the prompt.

    Args:
        folder: location of the folder.
        names: paths of its files, relative to it.
    """
    for name in names:
        if kind_of(name) in FORMATS:
            yield Review(name, (name,), shapes={"": [MaskFile(f"{folder.rstrip('/')}/{name}")]})


def make_mask_reader() -> Reader:
    """Return a reader of mask files."""
    return Reader(DatasetSettings().reading(RunSettings()))


def read_mask(shape: MaskFile, reader: Reader, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a file, (H, W) uint8 of 0 and 1.

    Args:
        shape: the file.
        reader: of `make_mask_reader`.
        size: (height, width) that it must have.

    Raises:
        ImageError: it cannot be read, or has another size.
    """
    content, frame = reader.open({"image_uri": shape.uri, "selector": None})
    values = content.labels(frame)
    if values.shape != size:
        height, width = values.shape
        raise ImageError("size", f"{shape.uri} has {width} x {height} pixels; the image has {size[1]} x {size[0]}")
    highest, between = values.max(initial=0), np.mean((values > _DARK) & (values < _BRIGHT))
    if 1 < highest < _BRIGHT or (highest > 1 and between > _MOST_BETWEEN):
        found = ", ".join(map(str, np.unique(values)[:5]))
        raise ImageError("corrupt", f"{shape.uri} is no mask of 0 and 255, or 0 and 1; it has values such as {found}")
    threshold = 0 if values.max(initial=0) <= 1 else 127
    return (values > threshold).astype(np.uint8)
