"""Segment an archive of images into a Parquet dataset of masks, one row per image and prompt.

    plan -> fetch and decode -> model actors -> masks at the image's own size -> one Parquet part per shard

A shard of the plan is one row that flows through Ray Data and one part file at the end. The part's name is the shard's
number and it is put in one atomic step, so that its presence means done: a rerun does the shards that have none, and a task
that Ray retries, or that outlives its run, can only put the same rows again.
"""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.command import logger, make_parser, run_command, start_ray
from vlsm import storage
from vlsm.archive import open_archive
from vlsm.checkpoints import build_checkpoint, digest_files, parse_settings, read_checkpoint
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.errors import ConfigError, ImageError, StorageError, VlsmError
from vlsm.images import decode_image, resize_image
from vlsm.manifest import Plan, planned_rows, read_shard, write_manifest
from vlsm.masks import describe_logits
from vlsm.record import (
    SUMMARY_NAME,
    describe_differences,
    forget_run,
    make_record,
    read_record,
    write_record,
)
from vlsm.results import check_rows, count_rows, part_name
from vlsm.schema import RESULT_SCHEMA

_MIN_IMAGES_TO_JUDGE = 200  # fewer say little about the share of failed images


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("jobs.segment", __doc__.partition("\n")[0], SegmentSettings)
    parser.add_argument("input", metavar="INPUT", help="folder or prefix (recursive), glob, or manifest; local or s3://")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks; a rerun continues there")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint directory; local or s3://")
    args = parser.parse_args(argv)

    def work() -> dict[str, Any] | None:
        arguments = {name: storage.absolute(getattr(args, name)) for name in ("input", "output", "checkpoint")}
        settings = load_settings(SegmentSettings, args.config, args.set, arguments)
        return dry_run(settings) if args.dry_run else segment(settings)

    return run_command(work)


def segment(settings: SegmentSettings) -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Raises:
        VlsmError: the settings are wrong, or the run could not be finished; a rerun goes on where it stopped.
    """
    run = prepare(settings)
    summary_uri = storage.join(run.settings.output, SUMMARY_NAME)
    if storage.exists(summary_uri):
        logger.info("%s is finished: there is nothing to do", run.settings.output)
        return dict(json.loads(storage.read_bytes(summary_uri)))
    started_s = time.monotonic()
    names = set(storage.list_names(storage.join(run.settings.output, "masks")))
    done = [shard for shard in range(run.plan.num_shards) if part_name(shard) in names]
    pending = sorted(set(range(run.plan.num_shards)) - set(done))
    counts = count_rows(run.settings.output, run.plan, done)
    num_before = counts["ok"] + counts["failed"]
    logger.info("%s of %s images are to be done, in %d shards", f"{run.plan.num_images - num_before:,}", f"{run.plan.num_images:,}", len(pending))
    if pending:
        counts += execute(run, pending, counts)
    return finish(run, counts, num_before, time.monotonic() - started_s)


@dataclass(frozen=True)
class Run:
    """A planned run: resolved settings, the checkpoint's files, and how much there is to do."""

    settings: SegmentSettings
    checkpoint_files: dict[str, bytes]
    plan: Plan


def resolve(settings: SegmentSettings) -> tuple[SegmentSettings, dict[str, bytes]]:
    """The settings with the checkpoint's prompt and threshold where none were given, and the checkpoint's files."""
    files = read_checkpoint(settings.checkpoint)
    checkpoint = parse_settings(files, settings.checkpoint)
    resolved = {"prompts": settings.prompts or (checkpoint.prompt,), "threshold": settings.threshold or checkpoint.threshold}
    return settings.model_copy(update=resolved), files


def prepare(settings: SegmentSettings) -> Run:
    """Everything that can be wrong is found here, before Ray starts; then the plan is made, or taken up again."""
    settings, files = resolve(settings)
    digest = digest_files(files)
    output = settings.output
    with _storage_errors(output):
        if settings.start_over:
            forget_run(output)
        record = read_record(output)
        if record is None:
            if any(name.startswith("part-") for name in storage.list_names(storage.join(output, "masks"))):
                raise ConfigError(f"{output!r} holds masks of a run without config.yaml; choose another OUTPUT")
            plan = _plan(settings)
            write_record(output, make_record(settings, digest, plan))
        elif differences := describe_differences(record, settings, digest):
            raise ConfigError(
                f"{output!r} belongs to a run with other settings: {'; '.join(differences)}; "
                "choose another OUTPUT, or --set start_over=true to forget that run"
            )
        else:
            plan = Plan(**record["plan"])
    return Run(settings, files, plan)


def _plan(settings: SegmentSettings) -> Plan:
    archive = open_archive(settings.input, settings.prompts or (), exclude=settings.output)
    plan = write_manifest(settings.output, archive.rows, settings.shard_rows)
    passed_over = ", ".join(f"{count:,} {suffix}" for suffix, count in archive.skipped.most_common(5))
    if not plan.num_images:
        raise ConfigError(f"INPUT {settings.input!r} holds no images" + (f", but {passed_over}" if passed_over else ""))
    logger.info("planned %s images%s", f"{plan.num_images:,}", f"; passed over {passed_over}" if passed_over else "")
    return plan


@contextlib.contextmanager
def _storage_errors(output: str) -> Any:
    """Storage that refuses is one sentence that names what was asked of it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise ConfigError(f"storage refused while the run for OUTPUT {output!r} was planned: {error}") from error


def dry_run(settings: SegmentSettings) -> None:
    """Print the resolved settings and how much would be done; nothing is written, Ray is not started."""
    settings, files = resolve(settings)
    with _storage_errors(settings.output):
        archive = open_archive(settings.input, settings.prompts or (), exclude=settings.output)
        num_images = num_rows = 0
        for row in archive.rows:
            num_images += 1
            num_rows += len(row["prompts"])
    print(dump_yaml(settings.model_dump(mode="json")), end="")
    print(f"# {num_images:,} images, {num_rows:,} output rows; passed over: {dict(archive.skipped) or 'nothing'}")


def execute(run: Run, pending: list[int], counts: Counter[str]) -> Counter[str]:
    """Stream the pending shards through Ray and return the counts of their images.

    Raises:
        VlsmError: too large a share of the images failed, or a stage failed through its retries.
    """
    import ray

    from jobs.progress import Board, Progress

    start_ray()
    settings = run.settings
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard stays one block, however large
    context.max_errored_blocks = 0
    context.retried_map_errors, context.max_map_retries = True, 2
    context.max_consecutive_actor_init_deaths = 3
    size = asdict(pool_size(settings, ray.nodes()))
    task_cpus, max_actors = size.pop("task_cpus"), size.pop("max_actors")
    board = Board.remote()
    # each node fetches the weights once from the object store, whether or not it could reach the directory itself
    weights = ray.put({name: np.frombuffer(data, np.uint8) for name, data in run.checkpoint_files.items()})
    logger.info("up to %d model actors with %s CPUs and %s GPUs each", max_actors, size["num_cpus"], size["num_gpus"])

    done = Counter[str]()
    try:
        # one row is one shard and batch_size is 1, so that no stage can merge or split shards
        parts = (
            ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
            .map_batches(fetch_shard, fn_args=(settings, _image_size(run)), batch_size=1, num_cpus=task_cpus)
            .map_batches(
                SegmentActor,
                fn_constructor_args=(settings, weights, board, math.ceil(size["num_cpus"])),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max_actors),
                **size,
            )
            .map_batches(write_part, fn_args=(settings,), batch_size=1, num_cpus=task_cpus)
        )
        num_before, failed_before = counts["ok"] + counts["failed"], counts["failed"]
        with Progress(run.plan.num_images, num_before, failed_before, board) as progress:
            for part in parts.iter_rows():
                progress.finish_shard(part["shard"], part["num_images"], part["num_failed"])
                done += Counter(json.loads(part["counts"]))
                if progress.done >= min(_MIN_IMAGES_TO_JUDGE, run.plan.num_images):
                    check_failed_share(settings, progress.done, progress.failed, json.loads(part["first_errors"]))
    except ray.exceptions.RayError as error:
        raise VlsmError(f"a stage failed through its retries: {_root_cause(error)}; the same command goes on from here") from error
    finally:
        ray.shutdown()
    return done


@dataclass(frozen=True)
class PoolSize:
    """What Ray is asked for: the model actors, and the CPU tasks before and after them."""

    max_actors: int
    num_cpus: float
    num_gpus: float
    task_cpus: float


def pool_size(settings: SegmentSettings, nodes: list[dict[str, Any]]) -> PoolSize:
    """As many actors as the cluster has GPUs, or nodes; CPU tasks keep room beside them.

    Without GPUs the model takes all of a node but half a CPU, and with it as many threads as the node has CPUs: decoding
    costs little next to a model on a CPU, but must never wait for it.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in resources)
    cpus = min(node["CPU"] for node in resources if node.get("CPU"))
    num_gpus = settings.run.gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if gpus else 0.0
    num_cpus = settings.run.cpus_per_actor or (1.0 if num_gpus else cpus - 0.5)
    max_actors = settings.run.actors or (max(1, int(gpus / num_gpus)) if num_gpus else len(resources))
    # unequal CPUs keep Ray from fusing the fetching tasks into the actors, which would decode on the model's time
    task_cpus = 0.75 if num_gpus else 0.25
    return PoolSize(max_actors, num_cpus, num_gpus, task_cpus if task_cpus != num_cpus else task_cpus / 2)


def _image_size(run: Run) -> int:
    return parse_settings(run.checkpoint_files, run.settings.checkpoint).image.size


def _root_cause(error: BaseException) -> str:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def check_failed_share(settings: SegmentSettings, num_images: int, num_failed: int, first_errors: list[str]) -> None:
    """Nothing, or a VlsmError where too large a share of the images failed, with some of their reasons."""
    if num_failed > settings.run.max_failed_fraction * num_images:
        raise VlsmError(
            f"{num_failed:,} of {num_images:,} images failed, more than run.max_failed_fraction "
            f"{settings.run.max_failed_fraction}: {'; '.join(first_errors) or 'see the rows with status failed'}"
        )


def fetch_shard(batch: dict[str, np.ndarray], settings: SegmentSettings, image_size: int) -> dict[str, Any]:
    """A CPU task: the images of one shard, read, decoded and resized; an image that cannot be is an error and zeros."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # decode_image has the limit; Pillow's own would forbid to raise it
    shard = int(batch["shard"][0])
    rows = read_shard(settings.output, shard)
    pixels = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
    sizes = np.zeros((len(rows), 2), np.int32)
    errors: list[str | None] = [None] * len(rows)

    def fetch(index: int) -> None:
        uri, size_bytes = rows["image_uri"][index].as_py(), rows["size_bytes"][index].as_py()
        try:
            data = storage.read_image_bytes(uri, size_bytes, settings.max_image_bytes)
            image = decode_image(data, uri, settings.max_pixels)
        except ImageError as error:
            errors[index] = str(error)
            return
        sizes[index] = image.shape[:2]
        pixels[index] = resize_image(image, image_size)

    with ThreadPoolExecutor(settings.run.fetch_threads) as pool:
        list(pool.map(fetch, range(len(rows))))
    return {"shard": [shard], "pixels": pixels[None], "sizes": sizes[None], "errors": [json.dumps(errors)]}


class SegmentActor:
    """A model on its device; turns the images of a shard into logits, one per image and prompt."""

    def __init__(self, settings: SegmentSettings, weights: Any, board: Any, num_threads: int) -> None:
        import ray
        import torch

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
    counts = Counter(rows=len(rows), ok=len(errors) - len(failed), failed=len(failed))
    counts.update("failed: " + error.partition(":")[0] for error in failed)
    return {
        "shard": [shard],
        "num_images": [len(errors)],
        "num_failed": [len(failed)],
        "counts": [json.dumps(counts)],
        "first_errors": [json.dumps(failed[:3])],
    }


def finish(run: Run, counts: Counter[str], num_before: int, seconds: float) -> dict[str, Any]:
    """Prove by counting that every planned row is there once, then write summary.json and return it."""
    counts = count_rows(run.settings.output, run.plan, list(range(run.plan.num_shards)))
    num_images = counts["ok"] + counts["failed"]
    if (num_images, counts["rows"]) != (run.plan.num_images, run.plan.num_rows):
        raise StorageError(f"{counts['rows']} rows of {num_images} images were written, planned were {run.plan}")
    check_failed_share(run.settings, num_images, counts["failed"], [])
    summary = {
        "planned": run.plan.num_images,
        "ok": counts["ok"],
        "failed": counts["failed"],
        "failed_by_reason": {key.partition(": ")[2]: counts[key] for key in sorted(counts) if key.startswith("failed: ")},
        "rows": counts["rows"],
        "parts": run.plan.num_shards,
        "seconds": round(seconds, 1),
        "images_per_s": round((num_images - num_before) / seconds, 2),
        "done_before": num_before,
        "output": run.settings.output,
    }
    storage.write_bytes(storage.join(run.settings.output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary


if __name__ == "__main__":
    sys.exit(main())
