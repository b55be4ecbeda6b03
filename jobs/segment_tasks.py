"""The CPU tasks of the segment job: fetching before the model actors, and writing after them.

They do not import torch. There are many task processes, and torch would make each four times as large.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import metrics
from jobs.crash_watch import Watch
from vlsm.allocator import keep_freed_memory
from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.runs.carried import CARRIED, carried_of_plan
from vlsm.runs.compare import compare_shard
from vlsm.runs.plan import planned_keys, read_shard
from vlsm.runs.results import read_part, write_part
from vlsm.segmentation.image_rows import describe_entry
from vlsm.segmentation.shard import Entry, ShardBatch, read_shard_images

_PLANNED = ("image_id", "image_uri", "selector", "image_version")  # columns that an output row copies from the plan
_PROMPTS = pa.list_(pa.list_(pa.string()))  # of each entry of a shard

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """The data of the run that every stage needs.

    Attributes:
        settings: resolved settings.
        run_id: id of the run in config.yaml.
        plan_id: id of the plan in config.yaml.
        squares: the input square of each member's model.
        retry_failed: whether to segment failed images again.
        board: handle of the `jobs.crash_watch.CrashBoard` actor.
    """

    settings: SegmentSettings
    run_id: str
    plan_id: str
    squares: tuple[Square, ...]
    retry_failed: bool
    board: Any

    def watch(self, stage: str, shard: int) -> Watch:
        """Return the watch for one attempt of a stage on a shard."""
        return Watch(self.board, stage, shard, self.settings.run.image_timeout_s)

    def read_images(self, shard: int) -> pa.Table:
        """Return the planned images of a shard, with the columns of PLAN_SCHEMA."""
        return read_shard(self.settings.output, self.plan_id, shard, self.settings.run.outage_patience_s)

    def read_rows(self, shard: int, exists: bool) -> pa.Table | None:
        """Return the output rows in the existing part file of a shard, or None if there is no valid one."""
        if not exists:
            return None
        return read_part(self.settings.output, shard, self.run_id, patience_s=self.settings.run.outage_patience_s)

    def texts_of(self, images: pa.Table, entries: Sequence[Entry]) -> list[list[tuple[str, ...]]]:
        """Return the texts that the models see, for each entry and each of its prompts."""
        positions = pa.array([entry.position for entry in entries], pa.int64())
        return [self.settings.texts_of(prompts) for prompts in images["prompts"].take(positions).to_pylist()]


def fetch_shard(batch: Mapping[str, np.ndarray], task: Task) -> pa.Table:
    """Read, decode and resize the undone images of one shard, in a CPU task.

    Returns:
        A packed ShardBatch, with the prompts of each entry in a further column: an actor that read the plan itself
        would let its GPU wait for the store.
    """
    from PIL import Image

    keep_freed_memory()
    Image.MAX_IMAGE_PIXELS = None  # decode_image checks max_pixels; Pillow's limit would forbid a higher one
    shard, exists = int(batch["shard"][0]), bool(batch["exists"][0])
    with task.watch("fetch", shard) as watch:
        images = task.read_images(shard)
        undone = compare_shard(images, task.read_rows(shard, exists), task.settings.kinds, task.retry_failed).undone
        positions = [position for position in undone if not images["vanished"][position].as_py()]
        rows = images.take(pa.array(positions, pa.int64())).to_pylist()
        entries = [
            Entry(position, num_texts=sum(map(len, task.settings.texts_of(row["prompts"]))))
            for position, row in zip(positions, rows, strict=True)
        ]
        packed = read_shard_images(ShardBatch(shard, exists, entries), rows, task.squares, task.settings, watch).pack()
        prompts = pa.array([[row["prompts"] for row in rows]], _PROMPTS)
        return packed.append_column("prompts", prompts)


def write_masks(table: pa.Table, task: Task) -> dict[str, Any]:
    """Make masks at the images' original sizes and write the shard's part file atomically, in a CPU task.

    Returns:
        One row for the driver: the number of images that this task has done; as JSON the numbers of the failed ones by
        reason, and the errors of the first three.
    """
    import cv2

    keep_freed_memory()
    cv2.setNumThreads(1)  # there are as many tasks as cores
    batch, settings = ShardBatch.unpack(table), task.settings
    with task.watch("write", batch.shard) as watch:
        images = task.read_images(batch.shard)
        old = task.read_rows(batch.shard, batch.exists)
        undone = set(compare_shard(images, old, settings.kinds, task.retry_failed).undone)
        old_rows: dict[str, list[Row]] = {}
        for row in [] if old is None else old.to_pylist():
            old_rows.setdefault(row["image_id"], []).append(row)
        segmented = _SegmentedShard(batch, task.texts_of(images, batch.entries), task, watch)
        rows: list[Row] = []
        for position, image in enumerate(images.to_pylist()):
            image_rows = old_rows.get(image["image_id"], [])
            if position in undone and image["vanished"]:
                image_rows = _vanished_rows(image, image_rows, segmented.model, settings.kinds)
            elif position in undone:
                # an image without rows was not fetched: the part has changed since; the final count finds the gap
                image_rows = segmented.rows(position, image) or image_rows
            of_list = image.get(CARRIED) or {}
            rows += [row | of_list for row in image_rows]
        carried, patience_s = carried_of_plan(images.schema), settings.run.outage_patience_s
        write_part(settings.output, batch.shard, rows, task.run_id, patience_s, carried, batch.embedding_width)
    failed = [entry.error for entry in batch.entries if entry.error is not None]
    metrics.count("vlsm_written_parts", 1)
    metrics.count("vlsm_written_images", len(undone) - len(failed), status="ok")
    metrics.count("vlsm_written_images", len(failed), status="failed")
    return {
        "shard": [batch.shard],
        "num_images": [len(undone)],
        "failed": [json.dumps(Counter(error.partition(":")[0] for error in failed))],
        "first_errors": [json.dumps(failed[:3])],
    }


class _SegmentedShard:
    """A segmented shard that gives the output rows of each image.

    Attributes:
        model: names of the models, joined by " + ".
    """

    def __init__(self, batch: ShardBatch, texts: list[list[tuple[str, ...]]], task: Task, watch: Watch) -> None:
        self._batch, self._settings, self._squares, self._watch = batch, task.settings, task.squares, watch
        self.model = " + ".join(logits.name for _, logits in sorted(batch.logits.items()))
        self._images = {
            entry.position: (entry, image_texts) for entry, image_texts in zip(batch.entries, texts, strict=True)
        }

    def rows(self, position: int, image: Row) -> list[Row]:
        """Return the output rows of one image, or no rows if it was not fetched."""
        if position not in self._images:
            return []
        entry, texts = self._images[position]
        if position in self._watch.blamed:
            entry.error = f"crashed: the process that wrote the mask of {image['image_uri']} died each time"
        common: Row = {"model": self.model, "content_sha256": entry.content_sha256}
        common |= {name: image[name] for name in _PLANNED}
        keys = planned_keys(image["prompts"], self._settings.kinds)
        if entry.error is not None:
            failed = common | {"status": "failed", "error": entry.error}
            return [failed | {"prompt": prompt, "kind": kind} for prompt, kind in keys]
        with self._watch.image(position):
            records = describe_entry(self._batch, entry, texts, self._settings, self._squares)
        common |= {"status": "ok", "height": entry.height, "width": entry.width, "grey_rule": entry.grey_rule}
        rows = [
            common | {"prompt": prompt, "kind": kind, **vars(record)}
            for (prompt, kind), record in zip(keys, records, strict=True)
        ]
        if entry.embedding is not None:
            rows[0]["embedding"] = np.frombuffer(entry.embedding, np.float16)
        return rows


def _vanished_rows(image: Row, old: Sequence[Row], model: str, kinds: list[str]) -> list[Row]:
    """Return the rows of an image that the archive no longer has: its old masks, with status "vanished"."""
    known = {(row["prompt"], row["kind"]): row for row in old}
    empty = {name: image[name] for name in _PLANNED} | {"model": model}
    return [
        known.get((prompt, kind), empty | {"prompt": prompt, "kind": kind}) | {"status": "vanished"}
        for prompt, kind in planned_keys(image["prompts"], kinds)
    ]
