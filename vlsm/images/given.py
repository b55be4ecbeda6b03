"""Images as callers of the library give them: files, bytes, Pillow's images and arrays, as the jobs see the same file.

- A file is decoded as in a run: upright, without alpha, more than 8 bits by the rule of `vlsm.images.grey_levels`.
- One input is one image. Of a file that holds several, the selector behind a `#` says which: `ct.nii.gz#slice=17`,
  `study.zip#a/b.png`. Of an animation, the first image is used.
- An image of Pillow is treated as its file; the frame that it shows counts.
- Arrays must be uint8, since nobody can know the range of other values. Their alpha channel is dropped.
"""

import os
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from vlsm import storage
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.decode import stated_orientation
from vlsm.images.formats import FORMATS, HEAD_BYTES, Look, NoImages, is_archive, sniff_kind
from vlsm.images.grey_levels import as_rgb
from vlsm.images.reader import Content, Reader
from vlsm.images.stored import Stored, decoder_errors, full_range, stored_levels

# the limits of a run
_SETTINGS = SegmentSettings(input="", output="", members=(MemberSettings(checkpoint=""),))
_BUFFERS = (bytes, bytearray, memoryview)
_ACCEPTED = "a path, bytes, an image of Pillow, or an array (H, W, 3) uint8"
_DEEP = ("I", "F")  # the first letter of Pillow's modes with more than 8 bits


def as_list(images: Any) -> tuple[list[Any], bool]:
    """Return the images, and whether the caller gave a single one.

    Args:
        images: one image, or an iterable of images. An array with 2 or 3 dimensions is one image.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(images, np.ndarray) and images.ndim != 1 and images.ndim < 4:
        return [images if images.ndim else images.item()], True
    if isinstance(images, (str, os.PathLike, Image.Image, *_BUFFERS)) or hasattr(images, "read"):
        return [images], True
    if not isinstance(images, Iterable) or isinstance(images, dict):
        raise TypeError(f"images has the type {_type_name(images)}; give {_ACCEPTED}, or a list of these")
    return list(images), False


def open_given(image: Any, name: str) -> Callable[[], np.ndarray]:
    """Return a function that returns the image as (H, W, 3) uint8, RGB. Only what is in memory is checked before.

    Args:
        image: a path or URI, bytes, a file that is open for reading bytes, an image of Pillow, or an array: (H, W, 3),
            grey (H, W) or (H, W, 1), with alpha (H, W, 4), uint8.
        name: for messages about an image without a name of its own, such as "image 3".

    Raises:
        TypeError: the image is something else.
        ValueError: the array has another shape or type.
        ImageError: the function raises it: the image cannot be read.
    """
    if isinstance(image, np.ndarray):
        pixels = _check_array(image, name)
        return lambda: pixels
    if isinstance(image, Image.Image):
        return lambda: _read_pillow(image, name)
    if isinstance(image, _BUFFERS):
        return lambda: _decode_bytes(bytes(image), name)
    if hasattr(image, "read"):
        return lambda: _decode_bytes(_read_open_file(image, name), name)
    if isinstance(image, (str, os.PathLike)):
        return lambda: _read_file(os.fsdecode(image))
    hint = f"give {_ACCEPTED}"
    if hasattr(image, "__array__"):  # of torch, jax, ...: there is no rule where their channels are
        hint = "give a NumPy array (H, W, 3) uint8, of a tensor (3, H, W): tensor.permute(1, 2, 0).cpu().numpy()"
    raise TypeError(f"{name} has the type {_type_name(image)}; {hint}")


def _check_array(array: np.ndarray, name: str) -> np.ndarray:
    found = f"{name} is {array.dtype} of shape {array.shape}; it must be uint8 (H, W, 3) or grey (H, W)"
    if array.dtype != np.uint8:
        raise ValueError(f"{found}: {_how_to_convert(array.dtype)}")
    num_channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or num_channels not in (1, 3, 4):
        is_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = ": array.transpose(1, 2, 0) moves the channels to the end" if is_first else "; give several as a list"
        raise ValueError(found + hint)
    if not array.size:
        raise ValueError(f"{found}, and have a pixel at least")
    if num_channels == 1:
        return as_rgb(array.reshape(array.shape[:2]))
    return array[..., :3]


def _how_to_convert(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "b":
        return "array.astype('uint8') * 255"
    if dtype.kind == "f":
        return "(array * 255).round().astype('uint8') if its values lie between 0 and 1"
    return (
        "array.astype('uint8') if its values lie between 0 and 255; deeper ones need a range that you choose, or give "
        "the path of their file, which is shown as in a run"
    )


def _read_pillow(image: Image.Image, name: str) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"{name} has {image.width} x {image.height} pixels; it must have one at least")
    with decoder_errors(name):
        image.load()  # before its orientation: Pillow turns a TIFF while it loads
        if image.mode.startswith(_DEEP):
            values = np.asarray(image)
            values = values.astype(values.dtype.newbyteorder("="))
            stored = Stored(values, full_range(values.dtype, 8 * values.dtype.itemsize))
        else:
            stored = stored_levels(image)
        return stored.upright(stated_orientation(image)).show().pixels


def _read_open_file(file: Any, name: str) -> bytes:
    data = file.read()
    if not isinstance(data, _BUFFERS):
        raise TypeError(f"{name} is a file that is open for text; open it with mode 'rb'")
    return bytes(data)


def _decode_bytes(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise ImageError("empty", f"{name} has 0 bytes")
    content = Content(data, name, sniff_kind(data[:HEAD_BYTES]), _SETTINGS)
    return content.decode(_only_image(content, "FILE")).pixels


def _read_file(location: str) -> np.ndarray:
    uri, selector = _split_location(storage.absolute(location))
    if os.path.isdir(uri):
        raise ImageError(
            "unreadable", f"{uri} is a folder; give a list of its files, or segment all with `vlsm segment`"
        )
    if selector is None and is_archive(uri):
        raise ImageError(
            "unreadable",
            f"{uri} is an archive; name an image of it, as {uri}#a/b.png, or segment all with `vlsm segment`",
        )
    most = Image.MAX_IMAGE_PIXELS
    reader = Reader(_SETTINGS)
    Image.MAX_IMAGE_PIXELS = most  # the limit of the caller's program, which a Reader would lift
    content, frame = reader.open({"image_uri": uri, "selector": selector})
    return content.decode(_only_image(content, content.name) if frame is None else frame).pixels


def _split_location(uri: str) -> tuple[str, str | None]:
    """Return the location of a file, and the selector behind a `#`. Any other `#` is part of the file's name."""
    for found in re.finditer("#", uri):
        file, selector = uri[: found.start()], uri[found.end() :]
        if is_archive(file) or any(
            known.selector and re.fullmatch(known.selector, selector) for known in FORMATS.values()
        ):
            return file, selector
    return uri, None


def _only_image(content: Content, location: str) -> str | None:
    """Return the selector of the only image of a file, or None if its format has none.

    Raises:
        ImageError: the file holds several images, or none; the location is for the hint.
    """
    if content.kind in ("image", None):
        return None
    try:
        selectors, _ = (
            FORMATS[content.kind].load().list_images(BytesIO(content.data), content.name, len(content.data), Look())
        )
    except NoImages as error:
        raise ImageError("unreadable", f"{content.name}: {error}") from None
    if not selectors:
        raise ImageError("unreadable", f"{content.name} holds no image")
    if len(selectors) > 1:
        raise ImageError(
            "unreadable",
            f"{content.name} holds {len(selectors):,} images; name one, as {location}#{selectors[0]}, or segment all "
            "with `vlsm segment`",
        )
    return selectors[0]


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
