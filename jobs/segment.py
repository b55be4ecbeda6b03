"""Segment an archive of images into a Parquet dataset of masks, one row per image and prompt.

    plan -> fetch and decode -> model actors -> masks at the image's own size -> one Parquet part per shard

A shard of the plan is one row that flows through Ray Data and one part file at the end. The part's name is the shard's
number and it is put in one atomic step, so that its presence means done: a rerun does the shards that have none, and a
task that Ray retries, or that outlives its run, can only put the same rows again.
"""

import json
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from jobs.command import logger, make_parser, ray_session, run_command
from jobs.stages import SegmentActor, fetch_shard, pool_size, write_part
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.errors import VlsmError
from vlsm.results import count_rows, part_name
from vlsm.runs import Run, check_failed_share, finish_run, open_input, prepare_run, read_summary, resolve_settings

_MIN_IMAGES_TO_JUDGE = 200  # fewer say little about the share of failed images


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("jobs.segment", str(__doc__).partition("\n")[0], SegmentSettings)
    parser.add_argument(
        "input", metavar="INPUT", help="folder or prefix (recursive), glob, or manifest; local or s3://"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks; a rerun continues there")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint directory; local or s3://")
    args = parser.parse_args(argv)

    def work() -> dict[str, Any] | None:
        arguments = {name: storage.absolute(getattr(args, name)) for name in ("input", "output", "checkpoint")}
        settings = load_settings(SegmentSettings, args.config, args.set, arguments)
        if not args.dry_run:
            return segment(settings)
        dry_run(settings)
        return None

    return run_command(work)


def segment(settings: SegmentSettings) -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Raises:
        VlsmError: the settings are wrong, or the run could not be finished; a rerun goes on where it stopped.
    """
    run = prepare_run(settings)
    output, plan = run.settings.output, run.plan
    if summary := read_summary(output):
        logger.info("%s is finished: there is nothing to do", output)
        return summary
    started_s = time.monotonic()
    names = set(storage.list_names(storage.join(output, "masks")))
    pending = [shard for shard in range(plan.num_shards) if part_name(shard) not in names]
    before = count_rows(output, sorted(set(range(plan.num_shards)) - set(pending)))
    num_before = before["ok"] + before["failed"]
    logger.info(
        "%d of %d images are to be done, in %d shards", plan.num_images - num_before, plan.num_images, len(pending)
    )
    if pending:
        execute(run, pending, before)
    return finish_run(run, num_before, time.monotonic() - started_s)


def dry_run(settings: SegmentSettings) -> None:
    """Print the resolved settings and how much would be done; nothing is written, Ray is not started."""
    settings = resolve_settings(settings)[0]
    archive = open_input(settings)
    rows = Counter(images=0, rows=0)
    for row in archive.rows:
        rows.update(images=1, rows=len(row["prompts"]))
    print(dump_yaml(settings.model_dump(mode="json")), end="")
    print(
        f"# {rows['images']:,} images, {rows['rows']:,} output rows; passed over: {dict(archive.skipped) or 'nothing'}"
    )


def execute(run: Run, pending: list[int], before: Counter[str]) -> None:
    """Stream the pending shards through Ray until each has its part file.

    Args:
        run: the planned run.
        pending: the shards to do.
        before: counts of the images of all other shards.

    Raises:
        VlsmError: too large a share of the images failed, or a stage failed through its retries.
        CheckpointError: the actors could not build the checkpoint's model.
    """
    import ray.data  # here, so that --help and wrong arguments do not wait for it

    from jobs.progress import Board, Progress
    from vlsm.checkpoints import build_checkpoint

    with ray_session():
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = None  # a shard stays one block, however large
        context.max_errored_blocks = 0
        context.retried_map_errors, context.max_map_retries = True, 2
        context.max_consecutive_actor_init_deaths = 3
        board = Board.remote()
        try:
            with Progress(run.plan.num_images, before["ok"] + before["failed"], before["failed"], board) as progress:
                for part in stream_parts(run, pending, board).iter_rows():
                    progress.finish_shard(part["shard"], part["num_images"], part["num_failed"])
                    if progress.done >= min(_MIN_IMAGES_TO_JUDGE, run.plan.num_images):
                        check_failed_share(
                            run.settings, progress.done, progress.failed, json.loads(part["first_errors"])
                        )
        except ray.exceptions.RayError as error:
            # an actor that could not load its checkpoint dies without a word of why
            build_checkpoint(run.checkpoint_files, run.settings.checkpoint)
            raise VlsmError(
                f"a stage failed through its retries: {_root_cause(error)}; the same command goes on from here"
            ) from error


def stream_parts(run: Run, pending: list[int], board: Any) -> Any:
    """The pipeline as a lazy Ray dataset: a row per written part.

    One row is one shard and batch_size is 1 in every stage, so that no stage can merge or split shards.
    """
    import ray

    settings = run.settings
    size = pool_size(settings, ray.nodes())
    logger.info("up to %d model actors with %s CPUs and %s GPUs each", size.max_actors, size.num_cpus, size.num_gpus)
    # each node fetches the weights once from the object store, whether or not it could reach the directory itself
    weights = ray.put({name: np.frombuffer(data, np.uint8) for name, data in run.checkpoint_files.items()})
    return (
        ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
        .map_batches(fetch_shard, fn_args=(settings, run.image_size), batch_size=1, num_cpus=size.task_cpus)
        .map_batches(
            SegmentActor,
            fn_constructor_args=(settings, weights, board, size.num_threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size.max_actors),
            num_cpus=size.num_cpus,
            num_gpus=size.num_gpus,
        )
        .map_batches(write_part, fn_args=(settings,), batch_size=1, num_cpus=size.task_cpus)
    )


def _root_cause(error: BaseException) -> str:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
