"""The model actors of the segment job, between its CPU tasks."""

import itertools
import json
import time
from typing import Any

import numpy as np

from jobs import metrics
from jobs.crash_watch import Watch
from jobs.segment_tasks import Task
from vlsm.segmentation.masks import mirrored_mean


class SegmentActor:
    """Models on their device; they turn the images of a shard into logits, one per image, text and model.

    Args:
        task: what every stage is told.
        weights: of all members of the run, each a reference to its files.
        members: numbers of those that this actor holds.
        num_threads: that torch may use.
    """

    def __init__(self, task: Task, weights: list[Any], members: tuple[int, ...], num_threads: int) -> None:
        task.board.reach.remote("model's process", time.time())
        import ray
        import torch

        from vlsm.checkpoints import build_checkpoint
        from vlsm.models.sharing import share_towers
        from vlsm.segmentation.segmenter import Segmenter

        torch.set_num_threads(num_threads)
        self.task, self.names, self.segmenters = task, {}, {}
        for number in members:
            files = {name: data.tobytes() for name, data in ray.get(weights[number]).items()}
            checkpoint = build_checkpoint(files, task.settings.members[number].checkpoint)
            self.names[f"model_{number}"] = [checkpoint.name]
            self.segmenters[number] = Segmenter(checkpoint, batch_size=task.settings.run.batch_size)
        share_towers([segmenter.model for segmenter in self.segmenters.values()])
        self._warm_up()
        task.board.reach.remote("model", time.time())

    def _warm_up(self) -> None:
        """Let a GPU choose its kernels, before a batch waits for it."""
        settings = self.task.settings
        texts = [text for prompt in settings.prompts or () for text in settings.classes.get(prompt, (prompt,))]
        for number, segmenter in self.segmenters.items():
            if segmenter.device.type == "cuda":
                size = self.task.image_sizes[number]
                images = np.zeros((settings.run.batch_size, size, size, 3), np.uint8)
                self._predict(number, images, [texts] * len(images))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Logits (texts, S, S) float16: half the bytes to move, and exact to 0.001 where a threshold decides."""
        shard, notes = int(batch["shard"][0]), json.loads(batch["notes"][0])
        with Watch(self.task.board, f"segment {min(self.segmenters)}", shard) as watch:
            images = self.task.read_images(shard)
            texts = self.task.texts_of(images, notes["positions"])
            prompts = [list(itertools.chain(*own)) for own in texts]
            for index, position in enumerate(notes["positions"]):
                if position in watch.blamed:
                    notes["errors"][index] = "crashed: the process that ran the model on this image died each time"
            logits = self._segment(batch, prompts, notes, watch)
        done = len(self.task.settings.members) - 1 in self.segmenters  # nobody needs the pixels any more
        carried = {key: value for key, value in batch.items() if not (done and key.startswith("pixels_"))}
        return carried | self.names | logits | {"notes": [json.dumps(notes)]}

    def _segment(
        self, batch: dict[str, Any], prompts: list[list[str]], notes: dict[str, Any], watch: Watch
    ) -> dict[str, np.ndarray]:
        """Logits of each member: image by image, text by text, window by window."""
        sizes, twins, positions = self.task.image_sizes, notes["twins"], notes["positions"]
        pixels = {number: batch[f"pixels_{sizes[number]}"][0] for number in self.segmenters}
        first_pixels = np.cumsum([0, *notes["windows"]])
        windows = [notes["windows"][twin] for twin in twins]
        starts = np.cumsum([0, *(len(own) * count for own, count in zip(prompts, windows, strict=True))])
        logits = {number: np.zeros((max(1, starts[-1]), sizes[number], sizes[number]), np.float16) for number in pixels}
        # images of equal bytes and equal prompts have equal logits
        same: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, error in enumerate(notes["errors"]):
            if error is None:
                same.setdefault((twins[index], tuple(prompts[index])), []).append(index)
        parts = [(group, window) for group in same.values() for window in range(windows[group[0]])]
        pool, step = str(min(self.segmenters)), 1 if watch.is_careful else self.task.settings.run.batch_size
        for begin in range(0, len(parts), step):
            chosen = parts[begin : begin + step]
            sources = [first_pixels[twins[group[0]]] + window for group, window in chosen]
            wanted = [prompts[group[0]] for group, _ in chosen]
            started_s = time.monotonic()
            for number in self.segmenters:  # all see a batch before the next: they may share what was made of it
                with watch.image(positions[chosen[0][0][0]]):
                    predicted = self._predict(number, pixels[number][sources], wanted)
                for (group, window), own in zip(chosen, predicted, strict=True):
                    for index in group:
                        places = slice(starts[index] + window, starts[index + 1], windows[index])
                        logits[number][places] = np.clip(own, -60_000, 60_000)
            metrics.observe("vlsm_batch_seconds", time.monotonic() - started_s, pool=pool)
            metrics.count("vlsm_segmented_images", len(chosen), pool=pool)
            if len(self.task.settings.members) - 1 in self.segmenters:
                num_images = len(same) * (begin + len(chosen)) // len(parts)
                self.task.board.note.remote(int(batch["shard"][0]), num_images)
        return {f"logits_{number}": own[None] for number, own in logits.items()}

    def _predict(self, number: int, pixels: np.ndarray, prompts: list[list[str]]) -> list[np.ndarray]:
        segmenter, member = self.segmenters[number], self.task.settings.members[number]
        prompts = [[member.prompts.get(prompt, prompt) for prompt in own] for own in prompts]
        logits = segmenter.predict_logits(pixels, prompts)
        if not member.flip:
            return logits
        return list(map(mirrored_mean, logits, segmenter.predict_logits(pixels[:, :, ::-1], prompts)))
