"""The model actors of the segment job. They run between its fetching and writing tasks."""

import time
from typing import Any

import pyarrow as pa

from jobs import metrics
from jobs.segment_tasks import Task
from vlsm.segmentation.shard import ShardBatch


class SegmentActor:
    """Models on their device. They turn the pixels of a shard into logits.

    Args:
        task: the data of the run.
        weights: Ray references to the checkpoint files of each member of the run: arrays of bytes by file name.
        members: numbers of the members that this actor runs.
        num_threads: number of torch threads.
    """

    def __init__(self, task: Task, weights: list[Any], members: tuple[int, ...], num_threads: int) -> None:
        task.board.reach.remote("model's process", time.time())
        import ray
        import torch

        from vlsm.segmentation.predictor import Predictor

        torch.set_num_threads(num_threads)
        files = {
            number: {name: data.tobytes() for name, data in ray.get(weights[number]).items()} for number in members
        }
        self._task, self._pool = task, str(min(members))
        self._is_last = len(task.settings.members) - 1 in members
        self._predictor = Predictor(task.settings, files)
        self._predictor.warm_up()
        task.board.reach.remote("model", time.time())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a packed ShardBatch with the logits of this pool; the last pool removes the pixels."""
        batch = ShardBatch.unpack(table)
        with self._task.watch(f"segment {self._pool}", batch.shard) as watch:
            texts = self._task.texts_of(self._task.read_images(batch.shard), batch.entries)

            def report(num_done: int, num_windows: int, seconds: float) -> None:
                metrics.observe("vlsm_batch_seconds", seconds, pool=self._pool)
                metrics.count("vlsm_segmented_images", num_windows, pool=self._pool)
                if self._is_last:
                    self._task.board.note.remote(batch.shard, num_done)

            batch = self._predictor.predict(batch, texts, watch, report)
        if self._is_last:
            batch.pixels, batch.encoded = {}, []
        return batch.pack()
