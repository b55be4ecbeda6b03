"""The stages of the segment job: what Ray runs in its CPU tasks and in its model actors.

The CPU tasks import no torch: there are many of them, and each stays a quarter of the size.
"""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.fetch import read_image_bytes
from vlsm.images import decode_image, resize_image
from vlsm.manifest import planned_rows, read_shard
from vlsm.masks import describe_logits
from vlsm.results import check_rows, part_name
from vlsm.schema import RESULT_SCHEMA


@dataclass(frozen=True)
class PoolSize:
    """What Ray is asked for: the model actors, and the CPU tasks before and after them."""

    max_actors: int
    num_cpus: float
    num_gpus: float
    task_cpus: float
    num_threads: int


def pool_size(settings: SegmentSettings, nodes: list[dict[str, Any]]) -> PoolSize:
    """As many actors as the cluster has GPUs, or nodes; CPU tasks keep room beside them.

    Without GPUs the model has as many threads as the node has CPUs but asks Ray for one CPU less, so that fetching and
    writing can always run beside it: with half a CPU left, Ray Data held all writing back until the last fetch.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in resources)
    cpus = min(node["CPU"] for node in resources if node.get("CPU"))
    num_gpus = settings.run.gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if gpus else 0.0
    num_cpus = settings.run.cpus_per_actor or (1.0 if num_gpus else max(0.5, cpus - 1))
    num_threads = math.ceil(num_cpus) if num_gpus or settings.run.cpus_per_actor else int(cpus)
    max_actors = settings.run.actors or (max(1, int(gpus / num_gpus)) if num_gpus else len(resources))
    # unequal CPUs keep Ray from fusing the fetching tasks into the actors, which would decode on the model's time
    task_cpus = 0.75 if num_gpus else 0.25
    task_cpus = task_cpus / 2 if task_cpus == num_cpus else task_cpus
    return PoolSize(max_actors, num_cpus, num_gpus, task_cpus, num_threads)


def fetch_shard(batch: dict[str, np.ndarray], settings: SegmentSettings, image_size: int) -> dict[str, Any]:
    """A CPU task: the images of one shard, read, decoded and resized; an image that cannot be is an error and zeros."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # decode_image has the limit; Pillow's own would forbid to raise it
    shard = int(batch["shard"][0])
    rows = read_shard(settings.output, shard)
    pixels = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
    sizes = np.zeros((len(rows), 2), np.int32)
    errors: list[str | None] = [None] * len(rows)
    decoding = threading.Lock()  # reads overlap; decoding keeps to one core and to one decoded image in memory

    def fetch(index: int) -> None:
        uri, size_bytes = rows["image_uri"][index].as_py(), rows["size_bytes"][index].as_py()
        try:
            data = read_image_bytes(uri, size_bytes, settings.max_image_bytes)
            with decoding:
                image = decode_image(data, uri, settings.max_pixels)
                sizes[index] = image.shape[:2]
                pixels[index] = resize_image(image, image_size)
        except ImageError as error:
            errors[index] = str(error)

    with ThreadPoolExecutor(settings.run.fetch_threads) as pool:
        list(pool.map(fetch, range(len(rows))))
    return {"shard": [shard], "pixels": pixels[None], "sizes": sizes[None], "errors": [json.dumps(errors)]}


class SegmentActor:
    """A model on its device; turns the images of a shard into logits, one per image and prompt."""

    def __init__(self, settings: SegmentSettings, weights: Any, board: Any, num_threads: int) -> None:
        import ray
        import torch

        from vlsm.checkpoints import build_checkpoint
        from vlsm.segmenter import Segmenter

        torch.set_num_threads(num_threads)
        files = {name: data.tobytes() for name, data in ray.get(weights).items()}
        checkpoint = build_checkpoint(files, settings.checkpoint)
        self.settings = settings
        self.board = board
        self.name = checkpoint.name
        self.segmenter = Segmenter(checkpoint, batch_size=settings.run.batch_size)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Logits (rows, S, S) float16: half the bytes to move, and exact to 0.001 where a threshold decides."""
        shard, pixels = int(batch["shard"][0]), batch["pixels"][0]
        errors = json.loads(batch["errors"][0])
        prompts = read_shard(self.settings.output, shard)["prompts"].to_pylist()
        starts = np.cumsum([0, *map(len, prompts)])
        logits = np.zeros((starts[-1], *pixels.shape[1:3]), np.float16)
        good = [index for index, error in enumerate(errors) if error is None]
        for begin in range(0, len(good), self.segmenter.batch_size):
            chosen = good[begin : begin + self.segmenter.batch_size]
            predicted = self.segmenter.predict_logits(pixels[chosen], [prompts[index] for index in chosen])
            for index, own in zip(chosen, predicted, strict=True):
                logits[starts[index] : starts[index + 1]] = np.clip(own, -60_000, 60_000)
            self.board.note.remote(shard, begin + len(chosen))
        carried = {key: batch[key] for key in ("shard", "sizes", "errors")}
        return carried | {"logits": logits[None], "model": [self.name]}


def write_part(batch: dict[str, np.ndarray], settings: SegmentSettings) -> dict[str, Any]:
    """A CPU task: masks at the images' own sizes, and the shard's part file in one atomic put."""
    shard, logits, sizes = int(batch["shard"][0]), batch["logits"][0], batch["sizes"][0]
    errors, model = json.loads(batch["errors"][0]), str(batch["model"][0])
    manifest_rows = read_shard(settings.output, shard)
    rows: list[dict[str, Any]] = []
    for image, (height, width), error in zip(manifest_rows.to_pylist(), sizes.tolist(), errors, strict=True):
        for prompt in image["prompts"]:
            row = {"image_id": image["image_id"], "image_uri": image["image_uri"], "prompt": prompt, "model": model}
            if error is None:
                mask = describe_logits(logits[len(rows)], (height, width), settings.threshold or 0.5)
                row |= {"status": "ok", "height": height, "width": width, **asdict(mask)}
            else:
                row |= {"status": "failed", "error": error}
            rows.append(row)
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    check_rows(settings.output, shard, table, planned_rows(manifest_rows))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(storage.join(settings.output, "masks", part_name(shard)), sink.getvalue().to_pybytes())
    failed = [error for error in errors if error is not None]
    return {
        "shard": [shard],
        "num_images": [len(errors)],
        "num_failed": [len(failed)],
        "first_errors": [json.dumps(failed[:3])],
    }
