"""Logits to masks on the device of the models: torch does for many images at once what `image_rows` does for one.

Both make equal masks, but for pixels whose probability is within 0.001 of the threshold. Arrays here are column-major,
(..., W, H), as COCO run lengths are. Images of one batch differ in size: a group of them is computed in arrays of the
largest width and height, and pixels outside an image count as background. Large images are computed area by area, so
that memory does not grow with the image.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.images.windows import plan_windows
from vlsm.segmentation.finished import FinishedMask
from vlsm.segmentation.outlines import Area, Labels, Outlines, Overlaps
from vlsm.segmentation.tiles import window_weights

MOST_VALUES = 1 << 24  # pixels x texts that are computed at once: about 10 arrays of 64 MB in all


@dataclass(frozen=True)
class ImageLogits:
    """The logits of all windows of one image.

    Attributes:
        size: (height, width) of the original in pixels.
        num_texts: number of texts of each prompt.
        logits: of each member: (T windows, texts of all prompts, S, S) float32, on the device.
    """

    size: tuple[int, int]
    num_texts: tuple[int, ...]
    logits: Sequence[Tensor]


@torch.inference_mode()
def finish_images(
    images: Sequence[ImageLogits], settings: SegmentSettings, squares: Sequence[Square]
) -> list[list[FinishedMask]]:
    """Return the masks of each image, in the order of its output rows.

    Args:
        images: images of any sizes, whose logits are on one device.
        settings: of the run: threshold, weights, the combination of the members, and the rows to write.
        squares: the input square of each member.
    """
    masks: dict[int, list[FinishedMask]] = {}
    for numbers in _group(images, squares):
        group = _Group([images[number] for number in numbers], settings, squares)
        masks |= zip(numbers, group.finish(), strict=True)
    return [masks[number] for number in range(len(images))]


def mirrored_mean(logits: Tensor, mirrored: Tensor) -> Tensor:
    """Return the logits of the mean probability over an image and its mirror image.

    Args:
        logits: (..., S, S) float, of the image.
        mirrored: logits of the image with left and right exchanged, of the same shape.
    """
    back = mirrored.flip(-1)
    log_mean, log_rest = (
        torch.logaddexp(torch.nn.functional.logsigmoid(sign * logits), torch.nn.functional.logsigmoid(sign * back))
        for sign in (1, -1)
    )
    return log_mean - log_rest


def _group(images: Sequence[ImageLogits], squares: Sequence[Square]) -> Iterator[list[int]]:
    """Yield the numbers of images that are computed together; padding takes at most half of their pixels."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, image in enumerate(images):
        is_tiled = len(image.logits[0]) > 1
        key = (number,) if is_tiled else (image.num_texts, *(_shrinks(image.size, square) for square in squares))
        alike[key].append(number)
    for numbers in alike.values():
        numbers.sort(key=lambda number: images[number].size)
        group: list[int] = []
        height = width = num_pixels = 0
        for number in numbers:
            image = images[number]
            height, width = max(height, image.size[0]), max(width, image.size[1])
            num_pixels += image.size[0] * image.size[1]
            padded = (len(group) + 1) * height * width
            if group and (padded > 2 * num_pixels or padded * sum(image.num_texts) > MOST_VALUES):
                yield group
                group = []
                (height, width), num_pixels = image.size, image.size[0] * image.size[1]
            group.append(number)
        yield group


def _shrinks(size: tuple[int, int], square: Square) -> tuple[bool, bool]:
    """Return for height and width whether the image has fewer pixels than its content in the square."""
    rows, columns = square.content(size)
    return size[0] < rows.stop - rows.start, size[1] < columns.stop - columns.start


class _Group:
    """Images with equal numbers of texts, and of one window each; or one tiled image."""

    def __init__(self, images: Sequence[ImageLogits], settings: SegmentSettings, squares: Sequence[Square]) -> None:
        self._images, self._settings, self._squares = images, settings, squares
        self._threshold = settings.threshold or 0.5
        weights = [member.weight for member in settings.members]
        self._shares = [weight / sum(weights) for weight in weights]
        self._logits = [
            torch.stack([image.logits[number] for image in images]).transpose(-1, -2) for number in range(len(weights))
        ]  # (I, T, texts, S, S), column-major
        self._device = self._logits[0].device
        self._sizes = torch.tensor([image.size for image in images], device=self._device)  # (I, 2)
        self._windows = plan_windows(images[0].size, settings.tile) if self._logits[0].shape[1] > 1 else []

    def finish(self) -> list[list[FinishedMask]]:
        """Return the masks of each image."""
        num_prompts, num_members = len(self._images[0].num_texts), len(self._logits)
        num_kept = num_members if self._settings.has_member_rows else 0
        outlines = [Outlines(self._sizes, num_prompts) for _ in range(1 + num_kept)]
        labels = Labels(self._sizes, num_prompts) if self._settings.label_maps else None
        overlaps = Overlaps(len(self._images) * num_prompts, num_members)
        for area in self._areas():
            inside = self._inside(area)
            probabilities = [self._probability(number, area) for number in range(num_members)]
            masks = [(probability >= self._threshold) & inside for probability in probabilities]
            mean, mask = self._combine(probabilities, masks, inside)
            for outline, rows, values in zip(outlines, [mask, *masks], [mean, *probabilities], strict=False):
                outline.add(rows, values, inside, area)
            overlaps.add(masks)
            if labels is not None:
                labels.add(mask, mean, inside, area)
        agreements = overlaps.agreements()
        unknown = [None] * len(agreements)
        kinds = [outline.masks(unknown if number else agreements) for number, outline in enumerate(outlines)]
        maps = labels.masks() if labels is not None else [[]] * len(self._images)
        return [
            [*(kind[number][prompt] for prompt in range(num_prompts) for kind in kinds), *maps[number]]
            for number in range(len(self._images))
        ]

    def _areas(self) -> Iterator[Area]:
        """Yield areas that cover the images in the order of run lengths: whole columns, or parts of one column."""
        height, width = (max(sides) for sides in zip(*(image.size for image in self._images), strict=True))
        most = max(1, MOST_VALUES // (len(self._images) * sum(self._images[0].num_texts)))
        num_columns, num_rows = max(1, most // height), min(height, most)
        for left, top in itertools.product(range(0, width, num_columns), range(0, height, num_rows)):
            yield Area(left, top, min(num_columns, width - left), min(num_rows, height - top))

    def _inside(self, area: Area) -> Tensor:
        """Return which pixels of an area belong to their image, (I, 1, w, h) bool."""
        columns = _positions(area.left, area.width, self._device) < self._sizes[:, 1:]
        rows = _positions(area.top, area.height, self._device) < self._sizes[:, :1]
        return (columns[:, :, None] & rows[:, None, :])[:, None]

    def _combine(self, probabilities: list[Tensor], masks: list[Tensor], inside: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of the members' probabilities, and the combined mask, (I, P, w, h)."""
        if len(probabilities) == 1:
            return probabilities[0], masks[0]
        mean, votes = torch.zeros_like(probabilities[0]), torch.zeros_like(probabilities[0])
        for probability, mask, share in zip(probabilities, masks, self._shares, strict=True):
            mean += share * probability
            votes += share * mask
        if self._settings.combine == "vote":
            return mean, votes > 0.5 + 1e-6  # rounding: the shares of half of the members may add up to more than 0.5
        return mean, (mean >= self._threshold) & inside

    def _probability(self, number: int, area: Area) -> Tensor:
        """Return the probabilities of one member in an area, (I, P, w, h) float32, averaged over texts and windows."""
        logits, square = self._logits[number], self._squares[number]
        if not self._windows:
            sizes = [image.size for image in self._images]
            probability = torch.sigmoid(_enlarge(logits[:, 0], sizes, square, area))
        else:
            probability = self._join_windows(logits[0], square, area)
        num_texts = self._images[0].num_texts
        if len(num_texts) == probability.shape[1]:
            return probability
        return torch.stack([texts.mean(1) for texts in torch.split(probability, list(num_texts), dim=1)], dim=1)

    def _join_windows(self, logits: Tensor, square: Square, area: Area) -> Tensor:
        """Return the probabilities of a tiled image in an area, (1, texts, w, h): `tiles.probability_map`."""
        total = torch.zeros(1, logits.shape[1], area.width, area.height, device=self._device)
        weight = torch.zeros(area.width, area.height, device=self._device)
        first = self._windows[0]
        shares = torch.from_numpy(window_weights(first.height, first.width).T).to(self._device)
        for window, window_logits in zip(self._windows, logits, strict=True):
            left, top = max(area.left, window.left), max(area.top, window.top)
            width = min(area.left + area.width, window.left + window.width) - left
            height = min(area.top + area.height, window.top + window.height) - top
            if width <= 0 or height <= 0:
                continue
            part = Area(left - window.left, top - window.top, width, height)
            values = torch.sigmoid(_enlarge(window_logits[None], [(window.height, window.width)], square, part))
            share = part.cut(shares)
            here = Area(left - area.left, top - area.top, width, height)
            here.cut(total).add_(share * values)
            here.cut(weight).add_(share)
        return total / weight


def _positions(start: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + count, device=device)


def _enlarge(logits: Tensor, sizes: Sequence[tuple[int, int]], square: Square, area: Area) -> Tensor:
    """Return logits at the original size of their images, in one area: `Square.enlarge_logits`.

    Args:
        logits: (I, texts, S, S), column-major.
        sizes: (height, width) of each image.
        square: the input square of the model.
        area: the part of each image to compute.

    Returns:
        (I, texts, w, h) float32. Values outside an image have no meaning.
    """
    contents = [square.content(size) for size in sizes]
    heights, widths = zip(*sizes, strict=True)
    wide = _resize(logits, 2, [columns for _, columns in contents], widths, area.left, area.width)
    return _resize(wide, 3, [rows for rows, _ in contents], heights, area.top, area.height)


def _resize(  # noqa: PLR0913 - one axis of many images
    values: Tensor, axis: int, contents: Sequence[slice], lengths: Sequence[int], start: int, count: int
) -> Tensor:
    """Return values with one axis resized bilinearly, with antialiasing where it becomes shorter.

    Args:
        values: (I, texts, ., .) float32.
        axis: 2 or 3.
        contents: of each image, the part of the axis that the image fills.
        lengths: of each image, the length that this part gets.
        start: the first of the new positions to compute.
        count: their number.

    Source: the bilinear filter of Pillow, a triangle that is as wide as the scale, and at least 1 on each side.
    """
    steps = [(part.stop - part.start) / length for part, length in zip(contents, lengths, strict=True)]
    bounds = [(part.start, part.stop, step) for part, step in zip(contents, steps, strict=True)]
    first, stop, step = torch.tensor(bounds, dtype=torch.float64, device=values.device).T[..., None]  # (I, 1) each
    centre = first + (_positions(start, count, values.device) + 0.5) * step  # (I, count)
    if max(steps) > 1:
        pixels = _positions(0, values.shape[axis], values.device) + 0.5
        weights = (1 - (pixels - centre[..., None]).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
        weights *= (pixels > first[..., None]) & (pixels < stop[..., None])
        weights /= weights.sum(2, keepdim=True).clamp(min=1e-12)  # 0 outside an image
        matrices = weights.float()[:, None]  # (I, 1, count, S)
        return matrices @ values if axis == 2 else values @ matrices.mT
    position = torch.minimum((centre - 0.5).clamp(min=first), stop - 1)
    low = position.floor()
    high = torch.minimum(low + 1, stop - 1)
    shape, size = [len(values), 1, 1, 1], list(values.shape)
    shape[axis] = size[axis] = count

    def take(index: Tensor) -> Tensor:
        return values.gather(axis, index.long().view(shape).expand(size))

    return torch.lerp(take(low), take(high), (position - low).float().view(shape))
