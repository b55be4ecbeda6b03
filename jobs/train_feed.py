"""Feeds examples to training workers: Ray tasks and actors on CPUs inspect, read, decode, resize and augment them.

A micro-batch of a worker's plan is one row in Ray Data, in the order of the plan. Each worker has its own stream. Ray
Train can split one dataset, but it gives the next block to the first worker that asks, so no run could be repeated.
"""

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import ray

from jobs.clock import PROGRESS_S, describe_left, seconds_left
from jobs.command import logger
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
_MAX_LOADERS = 16  # per worker; Ray Data starts only as many as it needs
_WAVE = 512  # micro-batches in one Ray dataset: Ray Data plans some hundreds of blocks a second
_CACHED_SHARE = 0.3  # of the object store; the rest is for batches in transit

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
        chunks = dict(zip(wanted, ray.get([self.chunks[number] for number in wanted]), strict=True))
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

    Loading uses actors, not tasks, because Ray ends the process of a task after one idle second.

    Attributes:
        records: the examples.
        settings: settings to read and augment them.
        square: the input square of the model.
        decoded: the decoded examples, or None if they are not kept.
    """

    records: Sequence[Record]
    settings: DataSettings
    square: Square
    decoded: Decoded | None

    def stream(self, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
        """Yield micro-batches in order, with images (B, S, S, 3) uint8 and target masks (B, S, S) uint8 of 0 and 1."""
        if self.decoded is not None and self.settings.augment.is_off:
            yield from _take(self.decoded, batches)
        else:
            yield from self._load(batches)

    def _load(self, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
        """Yield micro-batches that actors read, decode and augment."""
        import ray.data  # here and below, not above: it imports pandas, and inspecting and decoding tasks need neither

        for wave in _batched(batches, _WAVE):
            rows = [{"batch": json.dumps(self._describe(batch))} for batch in wave]
            loaded = (
                ray.data.from_items(rows, override_num_blocks=len(rows))
                .map_batches(
                    _Loader,
                    fn_constructor_args=(self.settings, self.square, self.decoded),
                    batch_size=1,
                    num_cpus=_TASK_CPUS,
                    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=_MAX_LOADERS),
                )
                .iter_rows()
            )
            for batch, row in zip(wave, loaded, strict=True):
                yield batch, np.array(row["images"]), np.array(row["masks"])

    def _describe(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the description of a micro-batch from which an actor loads it."""
        records = [asdict(self.records[example]) for example in batch.examples] if self.decoded is None else []
        return {
            "examples": batch.examples, "records": records, "seeds": batch.seeds, "is_training": batch.split == "train",
        }  # fmt: skip


def _take(decoded: Decoded, batches: Iterable[MicroBatch]) -> Iterator[Loaded]:
    """Stream micro-batches of decoded examples that need no augmentation."""
    for batch in batches:
        images, masks = zip(*decoded.fetch(batch.examples), strict=True)
        yield batch, np.stack(images), np.stack(masks)


class _Loader:
    """A CPU actor that reads, decodes and resizes examples, or fetches decoded ones, and augments them."""

    def __init__(self, settings: DataSettings, square: Square, decoded: Decoded | None) -> None:
        self.settings, self.square, self.decoded = settings, square, decoded
        self._reader = ExampleReader(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the images and target masks of one micro-batch, augmented if it is for training."""
        description = json.loads(batch["batch"][0])
        if self.decoded is None:
            records = [Record(**fields) for fields in description["records"]]
            pairs = [
                _decode(record, self._reader, self.square, self.settings.tile_size, seed)
                for record, seed in zip(records, description["seeds"], strict=True)
            ]
        else:
            pairs = self.decoded.fetch(description["examples"])
        augment = self.settings.augment
        if description["is_training"] and not augment.is_off:
            pairs = [
                augment_example(image, mask, augment, seed)
                for (image, mask), seed in zip(pairs, description["seeds"], strict=True)
            ]
        images, masks = zip(*pairs, strict=True)
        return {"images": np.stack(images)[None], "masks": np.stack(masks)[None]}


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def prepare_streams(num_workers: int) -> None:
    """Set up Ray Data in this worker: rows in order, no progress output, and an equal share of the object store.

    All num_workers workers together may use 30 % of it, and the decoded examples another 30 %.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    options = context.execution_options
    options.preserve_order = True
    store_bytes = ray.cluster_resources().get("object_store_memory", 0)  # type: ignore[no-untyped-call]
    options.resource_limits = options.resource_limits.copy(object_store_memory=0.3 * store_bytes / num_workers)
