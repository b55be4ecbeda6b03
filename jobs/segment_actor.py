"""The model actors of the segment job. They run between its fetching and writing tasks."""

import logging
import time
from typing import Any

import pyarrow as pa

from jobs import metrics
from jobs.segment_tasks import Task
from vlsm.errors import ProbeError
from vlsm.segmentation.shard import ShardBatch


class BoardHandler(logging.Handler):
    """Passes log messages of a process to the board: Ray does not show them on the terminal.

    Args:
        board: handle of the `jobs.crash_watch.CrashBoard` actor.
    """

    def __init__(self, board: Any) -> None:
        super().__init__(logging.INFO)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on one message."""
        self._board.tell.remote(record.levelno, record.getMessage())


class SegmentActor:
    """Models on their device. They turn the pixels of a shard into logits, or into masks.

    Args:
        task: the data of the run.
        weights: Ray references to the checkpoint files of each member of the run: arrays of bytes by file name.
        members: numbers of the members that this actor runs.
        num_threads: number of torch threads.
    """

    def __init__(self, task: Task, weights: list[Any], members: tuple[int, ...], num_threads: int) -> None:
        import ray

        task.board.reach.remote("model's process", time.time())
        if refusal := ray.get(task.board.refusal.remote()):  # Ray starts an actor again, whatever ended it
            raise ProbeError(refusal)
        import torch

        from vlsm.segmentation.predictor import Predictor

        torch.set_num_threads(num_threads)
        log = logging.getLogger("vlsm")
        log.setLevel(logging.INFO)
        log.addHandler(BoardHandler(task.board))
        files = {
            number: {name: data.tobytes() for name, data in ray.get(weights[number]).items()} for number in members
        }
        self._task, self._pool = task, str(min(members))
        self._is_last = len(task.settings.members) - 1 in members
        self._predictor = Predictor(task.settings, files)
        self._predictor.warm_up()
        try:
            self._predictor.check_probes()
        except ProbeError as error:
            ray.get(task.board.refuse.remote(str(error)))
            raise
        task.board.reach.remote("model", time.time())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a packed ShardBatch with the results of this pool; the last pool removes pixels and prompts."""
        batch = ShardBatch.unpack(table)
        with self._task.watch(f"segment {self._pool}", batch.shard) as watch:
            texts = [self._task.settings.texts_of(prompts) for prompts in table["prompts"][0].as_py()]

            def report(num_done: int, num_windows: int, seconds: float) -> None:
                metrics.observe("vlsm_batch_seconds", seconds, pool=self._pool)
                metrics.count("vlsm_segmented_images", num_windows, pool=self._pool)
                if self._is_last:
                    watch.note(num_done)

            batch = self._predictor.predict(batch, texts, watch, report)
        if self._is_last:
            batch.pixels, batch.encoded = {}, []
            return batch.pack()
        return batch.pack().append_column("prompts", table["prompts"])
