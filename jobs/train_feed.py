"""Feeds examples to training workers: Ray tasks and actors on CPUs inspect, read, decode, resize and augment them.

Each worker has loading actors of its own, which load the micro-batches of its plan in their order. Ray Data is not used
here, for two reasons. Split by Ray Train, a dataset gives its next block to the first worker that asks, so no run could
be repeated. And with a dataset for each worker, all workers, all loading actors and two more processes import Ray Data
before the first step.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import ray

from jobs.clock import PROGRESS_S, describe_left, seconds_left
from jobs.command import logger
from vlsm.allocator import keep_freed_memory
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import Facts, inspect_record
from vlsm.datasets.records import Record
from vlsm.errors import VlsmError
from vlsm.events import event
from vlsm.images.preprocess import Square
from vlsm.training.augment import augment_example, draw_window
from vlsm.training.sampling import MicroBatch
from vlsm.training.settings import DataSettings
from vlsm.words import count

_TASK_CPUS = 0.25  # a task mostly waits for storage; on a small machine the workers need half of the CPUs
_MOST_DEATHS = 5  # of processes that inspect the same records; more are not accidents
_CHUNK = 32  # images in one object of Ray's store: 16 MB at 352 pixels
_MAX_LOADERS = 16  # per worker
_AHEAD = 2  # micro-batches of each loading actor: it loads one while the other is fetched
_CACHED_SHARE = 0.3  # of the object store
_TRANSIT_SHARE = 0.3  # of it, for the micro-batches of all workers that nobody has fetched yet

T = TypeVar("T")
Loaded = tuple[MicroBatch, np.ndarray, np.ndarray]  # with images and target masks, as in `Feed.stream`


def inspect_records(records: Sequence[Record], settings: DataSettings, square: Square | None = None) -> list[Facts]:
    """Return the facts about the files of each record, in the order of the records; see `inspect_record`.

    Raises:
        VlsmError: a task failed, or its process died in every attempt.
    """
    logger.info("checking %s", count(len(records), "image"), extra=event("phase", phase="checking images"))
    started_s = said_s = time.monotonic()
    inspect = ray.remote(num_cpus=1, max_retries=_MOST_DEATHS)(_inspect_chunk)
    chunks = list(_batched(records, max(_CHUNK, len(records) // 4000)))
    all_facts: list[Facts] = []
    for chunk, result in zip(chunks, [inspect.remote(chunk, settings, square) for chunk in chunks], strict=True):
        try:
            all_facts += ray.get(result)  # type: ignore[arg-type]
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            where = f"{chunk[0].where} to {chunk[-1].where}"
            raise VlsmError(f"records {where} could not be inspected: {reason}") from error
        if time.monotonic() - said_s >= PROGRESS_S:
            said_s = time.monotonic()
            left_s = seconds_left(len(all_facts), len(records), said_s - started_s)
            progress = event("progress", done=len(all_facts), total=len(records), unit="image", left_s=left_s)
            words = f"{len(all_facts):,}", f"{len(records):,}", describe_left(left_s)
            logger.info("checked %s of %s images, %s", *words, extra=progress)
    return all_facts


def _inspect_chunk(records: list[Record], settings: DataSettings, square: Square | None) -> list[Facts]:
    keep_freed_memory()
    reader = ExampleReader(settings)
    return [inspect_record(record, reader, square) for record in records]


@dataclass(frozen=True)
class Decoded:
    """Decoded examples in Ray's object store. Ray decodes a lost chunk again.

    Attributes:
        chunks: Ray references to chunks of 32 examples each: images (N, S, S, 3) and target masks (N, S, S), uint8.
    """

    chunks: list[Any]

    def fetch(self, examples: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return image and target mask of each example by its number; chunks on this node are not copied."""
        wanted = list(dict.fromkeys(example // _CHUNK for example in examples))
        chunks = dict(zip(wanted, _get([self.chunks[number] for number in wanted]), strict=True))
        return [tuple(part[example % _CHUNK] for part in chunks[example // _CHUNK]) for example in examples]


def keep_decoded(
    records: Sequence[Record], settings: DataSettings, square: Square, wanted: bool | None
) -> Decoded | None:
    """Decode all examples into the object store. Returns None if this is not wanted or they do not fit.

    Args:
        records: the examples.
        settings: settings to read and decode them.
        square: the input square of the model.
        wanted: whether to keep them decoded; None: only if they take less than 30 % of the cluster's object store.
    """
    if settings.tile_size is not None:
        logger.info("images are decoded again in every epoch, since data.tile_size cuts another window of each")
        return None
    num_bytes, store_bytes = len(records) * square.size**2 * 4, ray.cluster_resources().get("object_store_memory", 0)  # type: ignore[no-untyped-call]
    if wanted is False or (wanted is None and num_bytes > _CACHED_SHARE * store_bytes):
        logger.info(
            "images are decoded again in every epoch; all decoded images would take %.1f GB",
            num_bytes / 1e9,
        )
        return None
    # retries without limit: a lost node takes its chunks with it
    decode = ray.remote(num_cpus=2 * _TASK_CPUS, max_retries=-1)(_decode_chunk)
    return Decoded([decode.remote(chunk, settings, square) for chunk in _batched(records, _CHUNK)])


def _decode_chunk(records: list[Record], settings: DataSettings, square: Square) -> tuple[np.ndarray, np.ndarray]:
    keep_freed_memory()
    reader = ExampleReader(settings)
    pairs = [_decode(record, reader, square) for record in records]
    images, masks = zip(*pairs, strict=True)
    return np.stack(images), np.stack(masks)


def _decode(
    record: Record, reader: ExampleReader, square: Square, tile_size: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return an example in the model's square: image (S, S, 3) uint8, and target mask (S, S) uint8 of 0 and 1.

    If there is a side of a window in pixels, only the window of this seed is returned.
    """
    example = reader.read(record)
    image, mask = example.image, example.target.mask
    if tile_size is not None:
        window = draw_window(mask, tile_size, seed)
        image, mask = window.cut(image), window.cut(mask)
    return square.resize_image(image), square.resize_mask(mask)


@dataclass(frozen=True)
class Feed:
    """The source of a worker's micro-batches: the decoded examples in the object store, or a pool of loading actors.

    Attributes:
        records: the examples.
        settings: settings to read and augment them.
        square: the input square of the model.
        decoded: the decoded examples, or None if they are not kept.
        num_loaders: number of loading actors; see `plan_loaders`.
        max_bytes: the most bytes of loaded micro-batches that nobody has fetched yet.
    """

    records: Sequence[Record]
    settings: DataSettings
    square: Square
    decoded: Decoded | None
    num_loaders: int
    max_bytes: int

    def stream(self, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
        """Yield micro-batches in order, with images (B, S, S, 3) uint8 and target masks (B, S, S) uint8 of 0 and 1."""
        if self.decoded is not None and self.settings.augment.is_off:
            yield from _take(self.decoded, batches)
        else:
            yield from self._load(batches)

    @cached_property
    def _loaders(self) -> "_Loaders":
        return _Loaders(self.num_loaders, (self.settings, self.square, self.decoded))

    def _load(self, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
        """Yield micro-batches that actors read, decode and augment."""
        ahead: deque[tuple[MicroBatch, Any]] = deque()
        for batch in batches:
            records = [] if self.decoded is not None else [self.records[example] for example in batch.examples]
            loader, num_ready = self._loaders.next()
            ahead.append((batch, loader.load.remote(batch, records)))
            batch_bytes = 4 * self.square.size**2 * len(batch.examples)
            if len(ahead) >= min(_AHEAD * num_ready, max(1, self.max_bytes // batch_bytes)):
                yield _fetch(*ahead.popleft())
        while ahead:
            yield _fetch(*ahead.popleft())


class _Loaders:
    """Loading actors that take turns. An actor that Ray has not started yet takes no part.

    Ray starts an actor again after its death, and then repeats its micro-batches.
    """

    def __init__(self, count: int, arguments: tuple[Any, ...]) -> None:
        options = {
            "num_cpus": _TASK_CPUS, "max_restarts": -1, "max_task_retries": _MOST_DEATHS,
            "scheduling_strategy": "DEFAULT",  # not in the room of the worker
        }  # fmt: skip
        kind: Any = ray.remote(_Loader).options(**options)
        actors = [kind.remote(*arguments) for _ in range(count)]
        self._starting = {actor.is_ready.remote(): actor for actor in actors}
        self._ready: deque[Any] = deque()

    def next(self) -> tuple[Any, int]:
        """Return the actor whose turn it is, and how many take turns now."""
        if self._starting:
            started, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
            if not self._ready and not started:
                started, _ = ray.wait(list(self._starting))
            self._ready.extendleft(self._starting.pop(reference) for reference in started)
        self._ready.rotate(-1)
        return self._ready[-1], len(self._ready)


class _Loader:
    """A CPU actor that reads, decodes and resizes examples, or fetches decoded ones, and augments them."""

    def __init__(self, settings: DataSettings, square: Square, decoded: Decoded | None) -> None:
        keep_freed_memory()
        self.settings, self.square, self.decoded = settings, square, decoded
        self._reader = ExampleReader(settings)

    def is_ready(self) -> bool:
        """Return True, as soon as the actor has started."""
        return True

    def load(self, batch: MicroBatch, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and target masks of a micro-batch, augmented if it is for training.

        Args:
            batch: the micro-batch.
            records: its examples; unused if all decoded examples are kept.
        """
        if self.decoded is None:
            tile_size = self.settings.tile_size
            pairs = [
                _decode(record, self._reader, self.square, tile_size, seed)
                for record, seed in zip(records, batch.seeds, strict=True)
            ]
        else:
            pairs = self.decoded.fetch(batch.examples)
        augment = self.settings.augment
        if batch.split == "train" and not augment.is_off:
            pairs = [
                augment_example(image, mask, augment, seed)
                for (image, mask), seed in zip(pairs, batch.seeds, strict=True)
            ]
        images, masks = zip(*pairs, strict=True)
        return np.stack(images), np.stack(masks)


def _fetch(batch: MicroBatch, reference: Any) -> Loaded:
    images, masks = _get(reference)
    return batch, np.array(images), np.array(masks)  # copies: arrays in the object store are read-only


def _get(references: Any) -> Any:
    """Call `ray.get`, and raise what a task raised: the message of Ray's own error is a traceback."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _take(decoded: Decoded, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
    """Stream micro-batches of decoded examples that need no augmentation."""
    for batch in batches:
        images, masks = zip(*decoded.fetch(batch.examples), strict=True)
        yield batch, np.stack(images), np.stack(masks)


def plan_loaders(num_workers: int, worker_cpus: float) -> tuple[int, int]:
    """Return the number of loading actors of a worker, and the most bytes that its loaded micro-batches may take.

    A worker has as many actors as its share of the CPUs that no worker requests, rounded up, but 16 at most. The
    micro-batches of all workers may take 30 % of the object store.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = resources.get("CPU", 0) / num_workers - worker_cpus
    num_bytes = _TRANSIT_SHARE * resources.get("object_store_memory", 0) / num_workers
    return max(1, min(_MAX_LOADERS, math.ceil(free))), int(num_bytes)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
