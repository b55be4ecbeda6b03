"""What the models' batches become: logits for the writing tasks, or masks made on the device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.segmentation.device_masks import ImageLogits, finish_images, mirrored_mean
from vlsm.segmentation.finished import FinishedMask, count_masks
from vlsm.segmentation.presence import join_presence
from vlsm.segmentation.shard import Entry, ShardBatch
from vlsm.segmentation.staging import Staging

_MAX_LOGIT = 60_000.0  # the largest float16 is 65,504

Texts = Sequence[Sequence[Sequence[str]]]  # for each image, for each of its prompts: the texts for the models
ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)


class Prediction(NamedTuple, Generic[ArrayT]):
    """What a model says about pairs of an image and a text.

    Attributes:
        logits: (N, S, S) float32.
        presence: (N,) float32, the probability that the image shows the text at all; None if the model computes none.
    """

    logits: ArrayT
    presence: ArrayT | None


def mean_prediction(prediction: Prediction[Tensor], mirrored: Prediction[Tensor]) -> Prediction[Tensor]:
    """Return the mean over an image and its mirror image, whose prediction is mirrored too."""
    logits = mirrored_mean(prediction.logits, mirrored.logits)
    if prediction.presence is None or mirrored.presence is None:
        return Prediction(logits, None)
    return Prediction(logits, (prediction.presence + mirrored.presence) / 2)


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
    """Takes the predictions for batches, in the order of their windows."""

    def add(self, windows: Sequence[WindowTexts], predictions: Mapping[int, Prediction[Tensor]]) -> None:
        """Take a batch.

        Args:
            windows: the windows of the batch.
            predictions: of each member, for the texts of all windows, on the device.
        """


class LogitsOutput:
    """Collects logits in float16, in the order of the shard's entries.

    Attributes:
        values: by the member's number, (L, S, S).
        presence: by the member's number, (L,) float32; without members whose model computes none.
    """

    def __init__(self, batch: ShardBatch, squares: Mapping[int, Square], staging: Staging) -> None:
        self.values = {
            number: staging.empty((batch.num_logits, square.size, square.size)) for number, square in squares.items()
        }
        self.presence: dict[int, np.ndarray] = {}
        for entry in batch.entries:
            if entry.error is not None:
                for values in self.values.values():
                    values[entry.first_logit : entry.first_logit + entry.num_logits] = 0

    def add(self, windows: Sequence[WindowTexts], predictions: Mapping[int, Prediction[Tensor]]) -> None:
        """Copy the logits of a batch to their rows: one copy if the rows follow each other."""
        targets = [row for item in windows for row in item.logit_rows(item.entries[0])]
        for number, (logits, presence) in predictions.items():
            half = logits.clamp(-_MAX_LOGIT, _MAX_LOGIT).half()
            for start, target, count in _join_rows(targets):
                self.values[number][target : target + count].copy_(half[start : start + count], non_blocking=True)
            if presence is not None:
                values = self.presence.setdefault(number, np.zeros(len(self.values[number]), np.float32))
                values[targets] = presence.cpu().numpy()

    def share(self, windows: Sequence[WindowTexts]) -> None:
        """Copy the logits of images to the other images with equal bytes and texts, after all batches."""
        for item in windows:
            for twin in item.entries[1:]:
                target, source = list(item.logit_rows(twin)), list(item.logit_rows(item.entries[0]))
                for values in self.values.values():
                    values[target] = values[source]
                for presence in self.presence.values():
                    presence[target] = presence[source]


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
    _windows: list[list[Prediction[Tensor]]] = field(default_factory=list)  # of the image to complete: by member

    def add(self, windows: Sequence[WindowTexts], predictions: Mapping[int, Prediction[Tensor]]) -> None:
        """Take a batch, and make the masks of the images that it completes."""
        counts = [len(item.texts) for item in windows]
        members = [_split(predictions[number], counts) for number in sorted(predictions)]
        complete, images = [], []
        for item, *window in zip(windows, *members, strict=True):
            self._windows.append(window)
            entry = item.entries[0]
            if item.window == entry.num_windows - 1:
                joined = [torch.stack([each.logits for each in own]) for own in zip(*self._windows, strict=True)]
                num_texts = tuple(map(len, item.prompts))
                images.append(ImageLogits((entry.height, entry.width), num_texts, joined))
                complete.append((item.entries, self._presences(num_texts)))
                self._windows = []
        finished = finish_images(images, self.settings, self.squares)
        for (entries, presences), masks in zip(complete, finished, strict=True):
            for entry in entries:
                entry.first_mask = len(self.masks)
            self.masks += [replace(mask, presence=presence) for mask, presence in zip(masks, presences, strict=True)]

    def _presences(self, num_texts: Sequence[int]) -> list[float | None]:
        """Return the presence of each mask of the image whose windows are there, in the order of its output rows."""
        weights = [member.weight for member in self.settings.members]
        values: list[np.ndarray | None] = []  # of each member: (texts, T windows)
        for member in zip(*self._windows, strict=True):
            known = [each.presence for each in member if each.presence is not None]
            values.append(torch.stack(known, dim=1).numpy() if known else None)
        presences, start = [], 0
        for count in num_texts:
            chosen = [None if member is None else member[start : start + count] for member in values]
            presences += join_presence(chosen, weights)[: count_masks(self.settings, 1) - self.settings.label_maps]
            start += count
        return presences + [None] * self.settings.label_maps


def _split(prediction: Prediction[Tensor], counts: list[int]) -> list[Prediction[Tensor]]:
    """Return the predictions for each window: the logits on the device, the presence on the CPU."""
    logits = torch.split(prediction.logits.clamp(-_MAX_LOGIT, _MAX_LOGIT), counts)
    presence = prediction.presence
    presences = [None] * len(counts) if presence is None else torch.split(presence.cpu(), counts)
    return [Prediction(*each) for each in zip(logits, presences, strict=True)]
