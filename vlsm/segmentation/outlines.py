"""Masks on a device, area by area, to the changes, sums and overlaps that travel. Arrays are column-major."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlsm.segmentation.finished import FinishedMask, mean_dice

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)


class Area(NamedTuple):
    """A part of an image, or of all images of a group."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, values: ArrayT) -> ArrayT:
        """Return a view of this area of an array (..., W, H)."""
        return values[..., self.left : self.left + self.width, self.top : self.top + self.height]


class Outlines:
    """The changes of one kind of masks, R of each image, collected area by area.

    Args:
        sizes: (I, 2) heights and widths of the images.
        num_masks: R.
    """

    def __init__(self, sizes: Tensor, num_masks: int) -> None:
        self._sizes = sizes
        self._last = torch.zeros(len(sizes), num_masks, 1, dtype=torch.bool, device=sizes.device)
        self._changes: list[list[np.ndarray]] = [[] for _ in range(len(sizes) * num_masks)]
        self._sums, self._highest = np.zeros((2, len(sizes) * num_masks))

    def add(self, masks: Tensor, probabilities: Tensor, inside: Tensor, area: Area) -> None:
        """Add an area, which follows the areas before it in the order of run lengths.

        Args:
            masks: (I, R, w, h) bool, False outside the images.
            probabilities: (I, R, w, h) float32.
            inside: (I, 1, w, h) bool: which pixels belong to the images.
            area: the area.
        """
        ends = (self._sizes[:, 0] - area.top).clamp(max=area.height) - 1  # the last row of each image
        last_rows = masks.gather(3, ends[:, None, None, None].expand(*masks.shape[:3], 1))[..., 0]  # (I, R, w)
        before = torch.empty_like(masks)
        before[..., 1:] = masks[..., :-1]
        before[..., 0] = torch.cat([self._last, last_rows[..., :-1]], dim=2)
        self._last = last_rows[..., -1:]
        changes = (masks ^ before) & inside
        sums = torch.where(masks, probabilities, 0).sum((2, 3), dtype=torch.float64)
        highest = torch.where(inside, probabilities, 0).amax((2, 3)).double()
        numbers = torch.stack([changes.sum((2, 3), dtype=torch.float64), sums, highest]).reshape(3, -1).cpu().numpy()
        pixels = self._pixels(changes, area).cpu().numpy().astype(np.uint32)
        ends_of_masks = np.cumsum(numbers[0].astype(np.int64))[:-1]
        for changes_of_mask, found in zip(self._changes, np.split(pixels, ends_of_masks), strict=True):
            changes_of_mask.append(found)
        self._sums += numbers[1]
        self._highest = np.maximum(self._highest, numbers[2])

    def _pixels(self, changes: Tensor, area: Area) -> Tensor:
        """Return the numbers of the changed pixels in their images, (C,) int64, one mask after the other."""
        found = changes.flatten().nonzero()[:, 0]
        image = found // changes[0].numel()
        column, row = found // area.height % area.width, found % area.height
        return (column + area.left) * self._sizes[image, 0] + row + area.top

    def masks(self, agreements: Sequence[float | None]) -> list[list[FinishedMask]]:
        """Return the R masks of each image, with these agreements, one for each mask of each image."""
        found = [
            FinishedMask(np.concatenate(changes), float(total), float(highest), agreement)
            for changes, total, highest, agreement in zip(
                self._changes, self._sums, self._highest, agreements, strict=True
            )
        ]
        num_masks = len(found) // len(self._sizes)
        return [found[start : start + num_masks] for start in range(0, len(found), num_masks)]


class Overlaps:
    """Areas of the members' masks and of their intersections, collected area by area."""

    def __init__(self, num_masks: int, num_members: int) -> None:
        self._pairs = list(itertools.combinations(range(num_members), 2))
        self._areas = np.zeros((num_members, num_masks), np.int64)
        self._intersections = np.zeros((len(self._pairs), num_masks), np.int64)

    def add(self, masks: Sequence[Tensor]) -> None:
        """Add an area: for each member (I, P, w, h) bool."""
        if self._pairs:
            both = [masks[first] & masks[second] for first, second in self._pairs]
            counts = torch.stack([mask.sum((2, 3)).flatten() for mask in [*masks, *both]]).cpu().numpy()
            self._areas += counts[: len(masks)]
            self._intersections += counts[len(masks) :]

    def agreements(self) -> list[float | None]:
        """Return the agreement for each image and prompt."""
        columns = zip(self._areas.T.tolist(), self._intersections.T.tolist(), strict=True)
        return [mean_dice(areas, intersections) for areas, intersections in columns]


class Labels:
    """The label maps of the images, and their outlines."""

    def __init__(self, sizes: Tensor, num_prompts: int) -> None:
        self._outlines = Outlines(sizes, 1)
        self._type = (torch.uint8, np.uint8) if num_prompts < 256 else (torch.int32, np.uint16)
        self._maps = [np.zeros((width, height), self._type[1]) for height, width in sizes.tolist()]

    def add(self, masks: Tensor, means: Tensor, inside: Tensor, area: Area) -> None:
        """Add an area: each pixel gets the number of the most probable of its masks, from 1; the first of equal ones.

        Args:
            masks: (I, P, w, h) bool, the combined masks.
            means: (I, P, w, h) float32, the members' mean probabilities.
            inside: (I, 1, w, h) bool: which pixels belong to the images.
            area: the area.
        """
        scores = torch.where(masks, means, 0)
        best = scores.argmax(1, keepdim=True)
        labels = torch.where(masks.any(1, keepdim=True), best + 1, 0)
        self._outlines.add(labels > 0, scores.gather(1, best), inside, area)
        for label_map, values in zip(self._maps, labels[:, 0].to(self._type[0]).cpu().numpy(), strict=True):
            part = area.cut(label_map)
            part[:] = values[: part.shape[0], : part.shape[1]]

    def masks(self) -> list[list[FinishedMask]]:
        """Return the row of each image: pixels with any label, and the label map."""
        rows = self._outlines.masks([None] * len(self._maps))
        return [
            [replace(row, max_probability=None, label_map=label_map.T)]
            for (row,), label_map in zip(rows, self._maps, strict=True)
        ]
