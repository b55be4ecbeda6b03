"""The members of an ensemble on one device: they turn the windows of a shard into logits."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vlsm.checkpoints import build_checkpoint
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.models.sharing import share_towers
from vlsm.segmentation.gpu_decode import decode_images
from vlsm.segmentation.masks import mirrored_mean
from vlsm.segmentation.segmenter import Segmenter
from vlsm.segmentation.shard import Entry, Guard, Logits, ShardBatch

_MAX_LOGIT = 60_000.0  # the largest float16 is 65,504

Texts = Sequence[Sequence[Sequence[str]]]  # for each image, for each of its prompts: the texts for the models
Report = Callable[[int, int, float], None]  # finished images of the shard, windows of the batch, seconds of the batch


class Predictor:
    """Some members of a run's ensemble, built and on the device.

    Args:
        settings: the resolved settings of the run.
        files: the checkpoint files of each member to build, by the member's number in the run.

    Raises:
        CheckpointError: a checkpoint cannot be used.
    """

    def __init__(self, settings: SegmentSettings, files: Mapping[int, dict[str, bytes]]) -> None:
        self._settings = settings
        self._members: dict[int, tuple[MemberSettings, Segmenter]] = {}
        self.names: dict[int, str] = {}
        for number, member_files in files.items():
            member = settings.members[number]
            checkpoint = build_checkpoint(member_files, member.checkpoint)
            self.names[number] = checkpoint.name
            self._members[number] = member, Segmenter(checkpoint, batch_size=settings.run.batch_size)
        share_towers([segmenter.model for _, segmenter in self._members.values()])

    @property
    def squares(self) -> dict[int, Square]:
        """The input square of each member, by its number in the run."""
        return {number: segmenter.model.image_spec.square for number, (_, segmenter) in self._members.items()}

    @property
    def _device(self) -> str:
        return str(next(segmenter.device for _, segmenter in self._members.values()))

    def warm_up(self) -> None:
        """Predict black images on a GPU, so that it chooses its kernels before the first shard."""
        settings = self._settings
        texts = [text for prompt in settings.prompts or () for text in settings.classes.get(prompt, (prompt,))]
        for number, (_, segmenter) in self._members.items():
            if segmenter.device.type == "cuda":
                size = self.squares[number].size
                images = np.zeros((settings.run.batch_size, size, size, 3), np.uint8)
                self._predict(number, images, [texts] * len(images))

    def predict(
        self, batch: ShardBatch, texts: Texts, guard: Guard, report: Report = lambda done, windows, seconds: None
    ) -> ShardBatch:
        """Return the batch with the logits of these members. An image that the guard blames gets an error.

        Args:
            batch: it holds pixels for the square of each member.
            texts: one item for each entry.
            guard: watches the work on each image.
            report: called after each batch of windows.
        """
        for entry in batch.entries:
            if entry.position in guard.blamed:
                entry.error = "crashed: the process that ran the model on the image died each time"
        values = {
            number: np.zeros((batch.num_logits, square.size, square.size), np.float16)
            for number, square in self.squares.items()
        }
        pixels = decode_images(batch, self.squares.values(), self._settings, guard, self._device)
        work = _distinct_windows(batch, texts)
        done: set[int] = set()  # images, by their first windows
        step = 1 if guard.is_careful else self._settings.run.batch_size
        for begin in range(0, len(work), step):
            chosen = work[begin : begin + step]
            rows = [item.row for item in chosen]
            started_s = time.monotonic()
            # every member sees a batch before the next one: members may share its features
            for number, square in self.squares.items():
                with guard.image(chosen[0].entries[0].position):
                    predicted = self._predict(number, pixels[square][rows], [item.texts for item in chosen])
                for item, window_logits in zip(chosen, predicted, strict=True):
                    item.store(values[number], window_logits)
            done.update(item.row - item.window for item in chosen)
            report(len(done), len(chosen), time.monotonic() - started_s)
        logits = {number: Logits(self.names[number], member_values) for number, member_values in values.items()}
        return replace(batch, logits=batch.logits | logits)

    def _predict(self, number: int, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return the logits (T, S, S) of one member for each window.

        The member's settings may replace texts, and may average over the image and its mirror image.
        """
        member, segmenter = self._members[number]
        member_texts = [[member.prompts.get(text, text) for text in window_texts] for window_texts in texts]
        logits = segmenter.predict_logits(pixels, member_texts)
        if not member.flip:
            return logits
        return list(map(mirrored_mean, logits, segmenter.predict_logits(pixels[:, :, ::-1], member_texts)))


class _Window(NamedTuple):
    """A window and its texts, an input of the models. Images with equal bytes and equal texts share it."""

    row: int  # in the pixels of the shard
    window: int  # number in the image, from 0
    texts: tuple[str, ...]
    entries: list[Entry]

    def store(self, values: np.ndarray, logits: np.ndarray) -> None:
        """Write logits (T, S, S) of this window to the rows of each of its entries."""
        clipped = np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
        for entry in self.entries:
            stop = entry.first_logit + entry.num_logits
            values[entry.first_logit + self.window : stop : entry.num_windows] = clipped


def _distinct_windows(batch: ShardBatch, texts: Texts) -> list[_Window]:
    """Return the windows to predict, without images that have an error. Equal images with equal texts come once."""
    groups: dict[tuple[int, tuple[str, ...]], list[Entry]] = {}
    for entry, prompts in zip(batch.entries, texts, strict=True):
        if entry.error is None:
            image_texts = tuple(text for prompt_texts in prompts for text in prompt_texts)
            groups.setdefault((entry.first_window, image_texts), []).append(entry)
    return [
        _Window(first_window + window, window, image_texts, entries)
        for (first_window, image_texts), entries in groups.items()
        for window in range(entries[0].num_windows)
    ]
