"""The CPU tasks of the segment job, before and after its model actors.

They import no torch: there are many of them, and each stays a quarter of the size.
"""

import faulthandler
import itertools
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import metrics
from jobs.crash_watch import Watch
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.decode import resize_image
from vlsm.images.reader import Content, Opening, open_images
from vlsm.runs.compare import compare_shard
from vlsm.runs.plan import planned_keys, read_shard
from vlsm.runs.results import read_part, write_part
from vlsm.segmentation.image_rows import describe_image
from vlsm.segmentation.tiles import check_windows, plan_windows

_PLANNED = ("image_id", "image_uri", "selector", "image_version")  # columns that a row has from the plan


@dataclass(frozen=True)
class Task:
    """What every stage is told.

    Attributes:
        settings: of the run.
        run_id, plan_id: of the run, as its record has them.
        image_sizes: side S of each member's input in pixels.
        retry_failed: whether images that have failed are to be done again.
        board: a `jobs.crash_watch.Board`.
    """

    settings: SegmentSettings
    run_id: str
    plan_id: str
    image_sizes: tuple[int, ...]
    retry_failed: bool
    board: Any

    def read_images(self, shard: int) -> pa.Table:
        """The planned images of a shard."""
        return read_shard(self.settings.output, self.plan_id, shard, self.settings.run.outage_patience_s)

    def texts_of(self, images: pa.Table, positions: list[int]) -> list[list[tuple[str, ...]]]:
        """Of some images of a shard, for each of their prompts the texts that the models are told."""
        prompts = images["prompts"].take(pa.array(positions, pa.int64())).to_pylist()
        return [[self.settings.classes.get(prompt, (prompt,)) for prompt in own] for own in prompts]

    def read_rows(self, shard: int, exists: bool) -> pa.Table | None:
        """The rows of a shard that an earlier run has written."""
        if not exists:
            return None
        return read_part(self.settings.output, shard, self.run_id, patience_s=self.settings.run.outage_patience_s)


@dataclass
class _Fetched:
    """The images of a shard that are to be done, one place for each of its images.

    Attributes:
        positions: in the shard, of the images that were to be read.
        pixels: of each image its windows, (w, S, S, 3) uint8 for each S that a member takes; none of one that cannot be
            done, or of a twin.
        sizes: (n, 2) int32, height and width of the originals.
        errors: why an image cannot be done.
        hashes: SHA-256 of the files' bytes.
        twins: for each image the first of equal bytes, which may be itself.
    """

    positions: list[int]
    pixels: list[dict[int, np.ndarray]]
    sizes: np.ndarray
    errors: list[str | None]
    hashes: list[str | None]
    twins: list[int]


def fetch_shard(batch: dict[str, np.ndarray], task: Task) -> dict[str, Any]:
    """A CPU task: the images of one shard, read, decoded and resized; an image that cannot be is an error and zeros."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # decode_image has the limit; Pillow's own would forbid to raise it
    shard, exists = int(batch["shard"][0]), bool(batch["exists"][0])
    with Watch(task.board, "fetch", shard) as watch:
        images = task.read_images(shard)
        undone = compare_shard(images, task.read_rows(shard, exists), task.settings.kinds, task.retry_failed).undone
        positions = [position for position in undone if not images["vanished"][position].as_py()]
        fetched = _fetch_images(images, positions, task, watch)
    windows = [len(next(iter(own.values()), ())) for own in fetched.pixels]
    notes = {"positions": positions, "errors": fetched.errors, "hashes": fetched.hashes, "twins": fetched.twins}
    notes["windows"] = windows
    return {
        "shard": [shard],
        "exists": [exists],
        **{f"pixels_{size}": _join(fetched.pixels, windows, size)[None] for size in set(task.image_sizes)},
        "sizes": fetched.sizes[None],
        "notes": [json.dumps(notes)],
    }


def _join(parts: list[dict[int, np.ndarray]], windows: list[int], size: int) -> np.ndarray:
    """The windows of all images, one behind the other; each is let go as soon as it is there."""
    joined = np.zeros((max(1, sum(windows)), size, size, 3), np.uint8)  # Ray Data has no arrays of nothing
    start = 0
    for part, count in zip(parts, windows, strict=True):
        if count:
            joined[start : start + count] = part.pop(size)
        start += count
    return joined


def _fetch_images(images: pa.Table, positions: list[int], task: Task, watch: Watch) -> _Fetched:
    settings, count = task.settings, len(positions)
    sizes = np.zeros((max(1, count), 2), np.int32)
    fetched = _Fetched(positions, [{} for _ in positions], sizes, [None] * count, [None] * count, list(range(count)))
    firsts: dict[tuple[str, str | None], int] = {}
    rows = images.take(pa.array(positions, pa.int64())).to_pylist()

    def fetch(index: int, read: Opening) -> None:
        try:
            if positions[index] in watch.blamed:
                uri = rows[index]["image_uri"]
                raise ImageError("crashed", f"{uri}: the process that read and decoded it died or hung each time")
            with watch.image(positions[index]):
                _decode(*read(), index)
        except ImageError as error:
            fetched.errors[index] = str(error)

    def _decode(content: Content, frame: str | None, index: int) -> None:
        digest = fetched.hashes[index] = content.digest(frame)
        key = digest, content.kind  # equal bytes may be an image by one name and none by another
        if (first := firsts.get(key)) is not None:
            fetched.twins[index] = first
            sizes[index] = sizes[first]
            return
        try:
            signal.setitimer(signal.ITIMER_REAL, settings.run.image_timeout_s)
            image = content.decode(frame)
            sizes[index] = image.shape[:2]
            check_windows(image.shape[:2], settings.tile, content.name)
            windows = plan_windows(image.shape[:2], settings.tile)
            for size in set(task.image_sizes):
                resized = [resize_image(window.cut(image), size) for window in windows]
                fetched.pixels[index][size] = np.stack(resized)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        firsts[key] = index

    # a decoder that hangs can only be stopped with its process, and by what waits for no Python code; the next try of
    # this shard goes carefully. A timer of faulthandler's own would start a thread for each image, and wait for its end
    faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
    for index, read in open_images(rows, settings, one_by_one=watch.is_careful):
        fetch(index, read)
    return fetched


def write_masks(batch: dict[str, np.ndarray], task: Task) -> dict[str, Any]:
    """A CPU task: masks at the images' own sizes, and the shard's part file in one atomic put."""
    shard, settings = int(batch["shard"][0]), task.settings
    with Watch(task.board, "write", shard) as watch:
        images = task.read_images(shard)
        old = task.read_rows(shard, bool(batch["exists"][0]))
        undone = set(compare_shard(images, old, settings.kinds, task.retry_failed).undone)
        kept: dict[str, list[dict[str, Any]]] = {}
        for row in [] if old is None else old.to_pylist():
            kept.setdefault(row["image_id"], []).append(row)
        new = _Segmented(batch, images, task, watch)
        rows: list[dict[str, Any]] = []
        for position, image in enumerate(images.to_pylist()):
            own = kept.get(image["image_id"], [])
            if position in undone:
                own = (
                    _vanished_rows(image, own, new.model, settings.kinds)
                    if image["vanished"]
                    else new.rows(position, image, own)
                )
            rows += own
        write_part(settings.output, shard, rows, task.run_id, settings.run.outage_patience_s)
    failed = [error for error in new.errors if error is not None]
    metrics.count("vlsm_written_parts", 1)
    metrics.count("vlsm_written_images", len(undone) - len(failed), status="ok")
    metrics.count("vlsm_written_images", len(failed), status="failed")
    return {
        "shard": [shard],
        "num_images": [len(undone)],
        "num_failed": [len(failed)],
        "first_errors": [json.dumps(failed[:3])],
    }


class _Segmented:
    """What the stages before have made of the images of a shard, as rows."""

    def __init__(self, batch: dict[str, np.ndarray], images: pa.Table, task: Task, watch: Watch) -> None:
        notes, settings = json.loads(batch["notes"][0]), task.settings
        self.errors: list[str | None] = notes["errors"]
        self._hashes: list[str | None] = notes["hashes"]
        numbers = range(len(settings.members))
        self.model = " + ".join(str(batch[f"model_{number}"][0]) for number in numbers)
        self._sizes, self._logits = batch["sizes"][0], [batch[f"logits_{number}"][0] for number in numbers]
        self._settings, self._watch = settings, watch
        self._indices = {position: index for index, position in enumerate(notes["positions"])}
        self._texts = task.texts_of(images, notes["positions"])
        self._windows = [notes["windows"][twin] for twin in notes["twins"]]
        counts = [sum(map(len, own)) * windows for own, windows in zip(self._texts, self._windows, strict=True)]
        self._starts = np.cumsum([0, *counts])

    def rows(self, position: int, image: dict[str, Any], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of one image; the old ones where a part has changed since the images were fetched.

        What is still missing then is found when the run is counted, and done.
        """
        if (index := self._indices.get(position)) is None:
            return old
        common = {"model": self.model, "content_sha256": self._hashes[index]} | {name: image[name] for name in _PLANNED}
        if position in self._watch.blamed:
            self.errors[index] = f"crashed: the process that wrote the mask of {image['image_uri']} died each time"
        keys = planned_keys(image["prompts"], self._settings.kinds)
        if (error := self.errors[index]) is not None:
            failed = common | {"status": "failed", "error": error}
            return [failed | {"prompt": prompt, "kind": kind} for prompt, kind in keys]
        height, width = self._sizes[index].tolist()
        with self._watch.image(position):
            records = list(describe_image(self._logits_of(index), (height, width), self._settings))
        found = common | {"status": "ok", "height": height, "width": width}
        return [
            found | {"prompt": prompt, "kind": kind, **vars(record)}
            for (prompt, kind), record in zip(keys, records, strict=True)
        ]

    def _logits_of(self, index: int) -> list[list[np.ndarray]]:
        """Of each prompt of an image, each member's logits, (texts, windows, S, S)."""
        windows = self._windows[index]
        ends = np.cumsum([self._starts[index], *(len(texts) * windows for texts in self._texts[index])])
        return [
            [logits[start:end].reshape(-1, windows, *logits.shape[1:]) for logits in self._logits]
            for start, end in itertools.pairwise(ends)
        ]


def _vanished_rows(
    image: dict[str, Any], old: Sequence[dict[str, Any]], model: str, kinds: list[str]
) -> list[dict[str, Any]]:
    """The rows of an image that is no longer there: its masks as they were, marked."""
    known = {(row["prompt"], row["kind"]): row for row in old}
    bare = {name: image[name] for name in _PLANNED} | {"model": model}
    return [
        known.get((prompt, kind), bare | {"prompt": prompt, "kind": kind}) | {"status": "vanished"}
        for prompt, kind in planned_keys(image["prompts"], kinds)
    ]
