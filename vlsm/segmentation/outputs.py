"""What the models' batches become: logits for the writing tasks, or masks made on the device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.segmentation.device_masks import ImageLogits, finish_images
from vlsm.segmentation.finished import FinishedMask
from vlsm.segmentation.shard import Entry, ShardBatch
from vlsm.segmentation.staging import Staging

_MAX_LOGIT = 60_000.0  # the largest float16 is 65,504

Texts = Sequence[Sequence[Sequence[str]]]  # for each image, for each of its prompts: the texts for the models


class WindowTexts(NamedTuple):
    """A window and its texts, an input of the models. Images with equal bytes and equal texts share it.

    Attributes:
        row: in the pixels of the shard.
        window: number in the image, from 0.
        prompts: for each prompt the texts for the models.
        entries: the images.
    """

    row: int
    window: int
    prompts: tuple[tuple[str, ...], ...]
    entries: list[Entry]

    @property
    def texts(self) -> list[str]:
        """The texts of all prompts."""
        return [text for prompt_texts in self.prompts for text in prompt_texts]

    def logit_rows(self, entry: Entry) -> range:
        """Return the rows of this window's logits in the arrays of the shard, for one of its images."""
        return range(entry.first_logit + self.window, entry.first_logit + entry.num_logits, entry.num_windows)


def distinct_windows(batch: ShardBatch, texts: Texts) -> list[WindowTexts]:
    """Return the windows to predict, without images that have an error. Equal images with equal texts come once."""
    groups: dict[tuple[int, tuple[tuple[str, ...], ...]], list[Entry]] = {}
    for entry, prompts in zip(batch.entries, texts, strict=True):
        if entry.error is None:
            groups.setdefault((entry.first_window, tuple(map(tuple, prompts))), []).append(entry)
    return [
        WindowTexts(first_window + window, window, prompts, entries)
        for (first_window, prompts), entries in groups.items()
        for window in range(entries[0].num_windows)
    ]


class Output(Protocol):
    """Takes the logits of batches, in the order of their windows."""

    def add(self, windows: Sequence[WindowTexts], logits: Mapping[int, Tensor]) -> None:
        """Take a batch.

        Args:
            windows: the windows of the batch.
            logits: of each member, (texts of all windows, S, S) float32 on the device.
        """


class LogitsOutput:
    """Collects logits in float16, in the order of the shard's entries.

    Attributes:
        values: by the member's number, (L, S, S).
    """

    def __init__(self, batch: ShardBatch, squares: Mapping[int, Square], staging: Staging) -> None:
        self.values = {
            number: staging.empty((batch.num_logits, square.size, square.size)) for number, square in squares.items()
        }
        for entry in batch.entries:
            if entry.error is not None:
                for values in self.values.values():
                    values[entry.first_logit : entry.first_logit + entry.num_logits] = 0

    def add(self, windows: Sequence[WindowTexts], logits: Mapping[int, Tensor]) -> None:
        """Copy the logits of a batch to their rows: one copy if the rows follow each other."""
        targets = [row for item in windows for row in item.logit_rows(item.entries[0])]
        for number, member_logits in logits.items():
            half = member_logits.clamp(-_MAX_LOGIT, _MAX_LOGIT).half()
            for start, target, count in _join_rows(targets):
                self.values[number][target : target + count].copy_(half[start : start + count], non_blocking=True)

    def share(self, windows: Sequence[WindowTexts]) -> None:
        """Copy the logits of images to the other images with equal bytes and texts, after all batches."""
        for item in windows:
            for twin in item.entries[1:]:
                for values in self.values.values():
                    values[list(item.logit_rows(twin))] = values[list(item.logit_rows(item.entries[0]))]


def _join_rows(targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, first target, number) for rows whose targets follow each other."""
    start = 0
    for row in range(1, len(targets) + 1):
        if row == len(targets) or targets[row] != targets[row - 1] + 1:
            yield start, targets[start], row - start
            start = row


@dataclass
class MasksOutput:
    """Makes the masks of images on the device as soon as all their windows are there.

    Attributes:
        settings: of the run.
        squares: the input square of each member, in order.
        masks: of all images; the entries of the images get the numbers of their masks.
    """

    settings: SegmentSettings
    squares: Sequence[Square]
    masks: list[FinishedMask] = field(default_factory=list)
    _windows: list[list[Tensor]] = field(default_factory=list)  # of the image that is not complete yet: by member

    def add(self, windows: Sequence[WindowTexts], logits: Mapping[int, Tensor]) -> None:
        """Take a batch, and make the masks of the images that it completes."""
        clipped = [logits[number].clamp(-_MAX_LOGIT, _MAX_LOGIT) for number in sorted(logits)]
        counts = [len(item.texts) for item in windows]
        complete, images = [], []
        for item, *members in zip(windows, *(torch.split(values, counts) for values in clipped), strict=True):
            self._windows.append(members)
            entry = item.entries[0]
            if item.window == entry.num_windows - 1:
                joined = [torch.stack(member_windows) for member_windows in zip(*self._windows, strict=True)]
                num_texts = tuple(map(len, item.prompts))
                images.append(ImageLogits((entry.height, entry.width), num_texts, joined))
                complete.append(item.entries)
                self._windows = []
        for entries, masks in zip(complete, finish_images(images, self.settings, self.squares), strict=True):
            for entry in entries:
                entry.first_mask = len(self.masks)
            self.masks += masks
