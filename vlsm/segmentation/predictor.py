"""The members of an ensemble on one device: the windows of a shard to logits."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vlsm.checkpoints import build_checkpoint
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.models.sharing import share_towers
from vlsm.segmentation.masks import mirrored_mean
from vlsm.segmentation.segmenter import Segmenter
from vlsm.segmentation.shard import Entry, Guard, Logits, ShardBatch

_LARGEST = 60_000.0  # float16 ends at 65,504

Texts = Sequence[Sequence[Sequence[str]]]  # of each image, of each of its prompts: what the models see
Report = Callable[[int, int, float], None]  # images of the shard that are done, windows of the batch, its seconds


class Predictor:
    """Some members of a run's ensemble, built and ready.

    Args:
        settings: of the run, resolved.
        files: of each member that is built here, by its number in the run: the files of its checkpoint.

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
        """The input of each member."""
        return {number: segmenter.model.image_spec.square for number, (_, segmenter) in self._members.items()}

    def warm_up(self) -> None:
        """Let a GPU choose its kernels, before a shard waits for it."""
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
        """Return the batch with the logits of these members; an image that the guard blames gets an error.

        Args:
            batch: with the pixels that the members take.
            texts: one item for each entry.
            guard: watches each image.
            report: called after each batch of windows.
        """
        for entry in batch.entries:
            if entry.position in guard.blamed:
                entry.error = "crashed: the process that ran the model on this image died each time"
        values = {
            number: np.zeros((batch.num_logits, square.size, square.size), np.float16)
            for number, square in self.squares.items()
        }
        work = _distinct_windows(batch, texts)
        step = 1 if guard.is_careful else self._settings.run.batch_size
        for begin in range(0, len(work), step):
            chosen = work[begin : begin + step]
            rows = [item.row for item in chosen]
            started_s = time.monotonic()
            for number, square in self.squares.items():  # all see a batch before the next: they may share its features
                with guard.image(chosen[0].entries[0].position):
                    predicted = self._predict(number, batch.pixels[square][rows], [item.texts for item in chosen])
                for item, window_logits in zip(chosen, predicted, strict=True):
                    item.store(values[number], window_logits)
            num_done = len({item.row - item.window for item in work[: begin + len(chosen)]})
            report(num_done, len(chosen), time.monotonic() - started_s)
        logits = {number: Logits(self.names[number], member_values) for number, member_values in values.items()}
        return replace(batch, logits=batch.logits | logits)

    def _predict(self, number: int, pixels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Of each window the logits (T, S, S) of one member, which may see other texts and the mirrored image too."""
        member, segmenter = self._members[number]
        member_texts = [[member.prompts.get(text, text) for text in window_texts] for window_texts in texts]
        logits = segmenter.predict_logits(pixels, member_texts)
        if not member.flip:
            return logits
        return list(map(mirrored_mean, logits, segmenter.predict_logits(pixels[:, :, ::-1], member_texts)))


class _Window(NamedTuple):
    """A window that goes through the models with some texts: images of equal bytes and equal texts share it."""

    row: int  # of the pixels
    window: int  # of the image
    texts: tuple[str, ...]
    entries: list[Entry]

    def store(self, values: np.ndarray, logits: np.ndarray) -> None:
        """Put its logits (T, S, S) where each entry has them."""
        clipped = np.clip(logits, -_LARGEST, _LARGEST)
        for entry in self.entries:
            stop = entry.first_logit + entry.num_logits
            values[entry.first_logit + self.window : stop : entry.num_windows] = clipped


def _distinct_windows(batch: ShardBatch, texts: Texts) -> list[_Window]:
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
