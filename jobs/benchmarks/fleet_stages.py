"""The stages of a simulated segment run. Each of many processes imports them, so they import little."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.segment_tasks import Task
from vlsm.segmentation.shard import Entry, Logits, ShardBatch

SIDE_PX = 352


@dataclass(frozen=True)
class Simulated(Task):
    """The data of a simulated run."""

    shard_rows: int = 256
    rate: float = 4000
    has_pixels: bool = False


def fetch_shard(batch: Mapping[str, np.ndarray], task: Simulated) -> pa.Table:
    """Return a packed shard whose pixels are zero, or one without entries."""
    shard = int(batch["shard"][0])
    with task.watch("fetch", shard):
        count = task.shard_rows if task.has_pixels else 0
        entries = [Entry(number, 1, 560, 560, number, 1, number) for number in range(count)]
        return ShardBatch(shard, False, entries, {task.squares[0]: _pixels(count)}).pack()


class SegmentActor:
    """Sleeps as long as a GPU computes."""

    def __init__(self, task: Simulated, weights: list[Any], members: tuple[int, ...], num_threads: int) -> None:
        self._task = task

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the shard with masks of real size instead of pixels."""
        batch = ShardBatch.unpack(table)
        with self._task.watch("segment 0", batch.shard) as watch:
            time.sleep(self._task.shard_rows / self._task.rate)
            watch.note(self._task.shard_rows)
        batch.pixels = {}
        count = self._task.shard_rows if self._task.has_pixels else 0
        # packed bits of a mask take a fifth of float16 logits of 352 x 352
        batch.logits = {0: Logits("simulated", np.zeros((batch.num_logits, 140, 140), np.float16))} if count else {}
        return batch.pack()


def write_masks(table: pa.Table, task: Simulated) -> dict[str, Any]:
    """Return the counts of the shard."""
    batch = ShardBatch.unpack(table)
    with task.watch("write", batch.shard):
        return {"shard": [batch.shard], "num_images": [task.shard_rows], "failed": ["{}"], "first_errors": ["[]"]}


def _pixels(count: int) -> np.ndarray:
    return np.zeros((count, SIDE_PX, SIDE_PX, 3), np.uint8)
