"""Decodes and resizes the JPEGs of a shard on the device of the models: with nvJPEG on a GPU, with libjpeg on a CPU."""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.decode import decode_image
from vlsm.images.gpu_jpegs import Encoded
from vlsm.images.preprocess import Square
from vlsm.images.stored import upright
from vlsm.images.windows import plan_windows
from vlsm.segmentation.shard import Entry, Guard, ShardBatch

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PIXELS = 1 << 25  # decoded together, unless one image has more: 100 MB, and 400 MB while one is resized
_TURNS = {2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, -1), 7: (True, -1), 8: (False, 1)}


def check_gpu_decoding(has_gpu: bool) -> None:
    """Raise a ConfigError if `decode: gpu` cannot work here.

    Args:
        has_gpu: whether the actors have GPUs.
    """
    if not has_gpu:
        raise ConfigError(
            "decode is gpu, but the model actors have no GPU; set decode=cpu, or run.gpus_per_actor=1 on a cluster "
            "with GPUs"
        )
    if importlib.util.find_spec("torchcodec") is None:
        raise ConfigError("decode is gpu, which needs the package torchcodec; install vlsm[gpu], or set decode=cpu")


def decode_images(
    batch: ShardBatch, squares: Iterable[Square], settings: SegmentSettings, guard: Guard, device: str
) -> dict[Square, np.ndarray]:
    """Return the pixels of all windows of a shard, (W, S, S, 3) uint8 by square; images that are encoded are decoded.

    What the device cannot decode, the CPU decodes. An image that cannot be decoded at all gets an error.

    Args:
        batch: the shard. Its entries get errors; its arrays stay as they are.
        squares: the squares to resize to.
        settings: of the run.
        guard: watches the work on each image, or on the first one of those that are decoded together.
        device: torch device that decodes and resizes.
    """
    if not batch.encoded:
        return batch.pixels
    importlib.import_module("torchcodec.decoders")  # here: its absence is no damage of an image
    squares = sorted(set(squares))
    entries: dict[int, list[Entry]] = {}
    for entry in batch.entries:
        if entry.num_windows:
            entries.setdefault(entry.first_window, []).append(entry)
    pixels = _with_gaps(batch, squares)
    images = [image for image in batch.encoded if any(entry.error is None for entry in entries[image.row])]
    sizes = {image.row: (entries[image.row][0].height, entries[image.row][0].width) for image in images}
    for chunk in _chunks(images, sizes, 1 if guard.is_careful else _MOST_PIXELS):
        with guard.image(entries[chunk[0].row][0].position):
            decoded = _decode(chunk, sizes, device)
        for image, content in zip(chunk, decoded, strict=True):
            for entry in entries[image.row] if isinstance(content, ImageError) else ():
                entry.error = entry.error or str(content)
        for square in squares:
            _resize(chunk, decoded, sizes, settings, square, pixels[square])
    return pixels


def _with_gaps(batch: ShardBatch, squares: Sequence[Square]) -> dict[Square, np.ndarray]:
    """Return arrays for all windows, with the pixels of those that are decoded already."""
    missing = {row for image in batch.encoded for row in range(image.row, image.row + image.num_windows)}
    num_windows = len(missing) + max((len(batch.pixels[square]) for square in squares), default=0)
    present = [row for row in range(num_windows) if row not in missing]
    pixels = {square: np.zeros((num_windows, square.size, square.size, 3), np.uint8) for square in squares}
    for square, whole in pixels.items():
        whole[present] = batch.pixels[square]
    return pixels


def _chunks(
    images: Sequence[Encoded], sizes: dict[int, tuple[int, int]], max_pixels: int
) -> Iterator[Sequence[Encoded]]:
    """Yield images that are decoded together: a decoder is faster with many, and all of them lie in its memory."""
    chunk: list[Encoded] = []
    num_pixels = 0
    for image in images:
        height, width = sizes[image.row]
        if chunk and num_pixels + height * width > max_pixels:
            yield chunk
            chunk, num_pixels = [], 0
        chunk.append(image)
        num_pixels += height * width
    if chunk:
        yield chunk


def _decode(
    chunk: Sequence[Encoded], sizes: dict[int, tuple[int, int]], device: str
) -> list["Tensor | np.ndarray | ImageError"]:
    """Return each image upright: (H, W, 3) uint8 on the device or, decoded by the CPU, as an array; or its error."""
    try:
        return list(_decode_on_device(chunk, sizes, device))
    except Exception:  # because of one image the decoder refuses all, with any type of error
        if len(chunk) > 1:
            return [_decode([image], sizes, device)[0] for image in chunk]
    try:
        (image,) = chunk
        pixels = upright(decode_image(image.data, image.name, 1 << 62), image.orientation)
        if pixels.shape[:2] != sizes[image.row]:
            raise ImageError("corrupt", f"{image.name}: its size is not that in its header")
        return [pixels]
    except ImageError as error:
        return [error]


def _decode_on_device(images: Sequence[Encoded], sizes: dict[int, tuple[int, int]], device: str) -> "list[Tensor]":
    from torchcodec.decoders import decode_jpeg

    decoded = decode_jpeg([image.data for image in images], device=device)
    tensors = [_turn(pixels.permute(1, 2, 0), image.orientation) for image, pixels in zip(images, decoded, strict=True)]
    if any(tuple(tensor.shape) != (*sizes[image.row], 3) for image, tensor in zip(images, tensors, strict=True)):
        raise ValueError("the size of an image is not that in its header")
    return tensors


def _turn(pixels: "Tensor", orientation: int) -> "Tensor":
    """Return (H, W, 3) turned as the EXIF orientation says, as `vlsm.images.stored.upright` does with arrays."""
    is_mirrored, quarters = _TURNS.get(orientation, (False, 0))
    return (pixels.flip(1) if is_mirrored else pixels).rot90(quarters, (0, 1))


def _resize(  # noqa: PLR0913 - one step of a loop
    chunk: Sequence[Encoded],
    decoded: Sequence["Tensor | np.ndarray | ImageError"],
    sizes: dict[int, tuple[int, int]],
    settings: SegmentSettings,
    square: Square,
    pixels: np.ndarray,
) -> None:
    """Write the windows of decoded images, resized to a square, to their rows of (W, S, S, 3) uint8."""
    import torch

    rows: list[int] = []
    tensors: list[Tensor] = []
    for image, content in zip(chunk, decoded, strict=True):
        if isinstance(content, ImageError):
            continue
        for row, window in enumerate(plan_windows(sizes[image.row], settings.tile), start=image.row):
            if isinstance(content, np.ndarray):
                pixels[row] = square.resize_image(window.cut(content))
            else:
                rows.append(row)
                tensors.append(resize_on_device(window.cut(content), square))  # type: ignore[arg-type]
    if rows:
        pixels[rows] = torch.stack(tensors).cpu().numpy()  # one transfer for all


def resize_on_device(image: "Tensor", square: Square) -> "Tensor":
    """Return an image in a model's square, resized as `Square.resize_image` does. Levels differ by at most 1.

    Args:
        image: (H, W, 3) uint8, on any device.
        square: the input of a model.

    Returns:
        (S, S, 3) uint8, on the same device.
    """
    from torch.nn import functional

    rows, columns = square.content((image.shape[0], image.shape[1]))
    size = rows.stop - rows.start, columns.stop - columns.start
    levels = image.permute(2, 0, 1)[None].float()
    resized = functional.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=True)
    whole: Any = image.new_zeros((square.size, square.size, 3))
    whole[rows, columns] = resized[0].round_().clamp_(0, 255).permute(1, 2, 0).byte()
    return whole
