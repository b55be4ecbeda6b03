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
from jobs.stages import SegmentActor, Task, fetch_shard, pool_size, write_masks
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.errors import VlsmError
from vlsm.proof import RunState, compare_run
from vlsm.record import SUMMARY_NAME
from vlsm.runs import Run, check_failed_share, finish_run, open_input, prepare_run, read_summary, resolve_settings

_WAVE = 2048  # shards that Ray Data plans at once: some hundreds a second
_ROUNDS = 3  # a task that outlived a killed run may still undo what an update has planned anew


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("jobs.segment", str(__doc__).partition("\n")[0], SegmentSettings)
    parser.add_argument(
        "input", metavar="INPUT", help="folder or prefix (recursive), glob, image, or manifest; local or s3://"
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
    output = run.settings.output
    if summary := read_summary(output):
        if not (settings.retry_failed and summary["failed"]):
            logger.info("%s is finished: there is nothing to do", output)
            return summary
        storage.remove(storage.join(output, SUMMARY_NAME))
    started_s = time.monotonic()
    if settings.prompts is None:
        logger.info("the prompt is the checkpoint's own: %s", ", ".join(map(repr, run.settings.prompts or ())))
    state = compare_run(output, run.plan, run.run_id, settings.retry_failed)
    num_before = state.num_done
    logger.info(
        "%d of %d images are to be done, in %d shards",
        run.plan.num_images - num_before,
        run.plan.num_images,
        len(state.pending),
    )
    for round_number in range(_ROUNDS):
        if not state.pending:
            break
        execute(run, state, settings.retry_failed and round_number == 0)
        state = compare_run(output, run.plan, run.run_id)
    return finish_run(run, state, num_before, time.monotonic() - started_s)


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


def execute(run: Run, state: RunState, retry_failed: bool) -> None:
    """Stream the pending shards through Ray until each has its part file.

    Args:
        run: the planned run.
        state: what is done and what is to be done.
        retry_failed: whether images that have failed are to be done again.

    Raises:
        VlsmError: too large a share of the images failed, or a stage failed through its retries.
        CheckpointError: the actors could not build the checkpoint's model.
    """
    import ray.data  # here, so that --help and wrong arguments do not wait for it

    from jobs.board import start_board
    from jobs.progress import Progress
    from vlsm.checkpoints import build_checkpoint

    with ray_session():
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = None  # a shard stays one block, however large
        context.max_errored_blocks = 0
        context.retried_map_errors, context.max_map_retries = True, 2
        context.max_consecutive_actor_init_deaths = 3
        board = start_board()
        task = Task(run.settings, run.run_id, run.plan.id, run.image_size, retry_failed, board)
        pending = list(state.pending.items())
        try:
            with Progress(run.plan.num_images, state.num_done, state.counts["failed"], board) as progress:
                for begin in range(0, len(pending), _WAVE):
                    for part in stream_parts(run, pending[begin : begin + _WAVE], task).iter_rows():
                        progress.finish_shard(part["shard"], part["num_images"], part["num_failed"])
                        if progress.done >= min(run.settings.run.judge_after, run.plan.num_images):
                            check_failed_share(
                                run.settings, progress.done, progress.failed, json.loads(part["first_errors"])
                            )
        except ray.exceptions.RayError as error:
            # an actor that could not load its checkpoint dies without a word of why
            build_checkpoint(run.checkpoint_files, run.settings.checkpoint)
            reason = ray.get(board.last_error.remote()) or _root_cause(error)
            raise VlsmError(
                f"a stage failed through its retries: {reason}; the same command goes on from here"
            ) from error


def stream_parts(run: Run, pending: list[tuple[int, bool]], task: Task) -> Any:
    """The pipeline as a lazy Ray dataset: a row per written part.

    One row is one shard and batch_size is 1 in every stage, so that no stage can merge or split shards.
    """
    import ray

    size = pool_size(run.settings, ray.nodes())
    logger.info("up to %d model actors with %s CPUs and %s GPUs each", size.max_actors, size.num_cpus, size.num_gpus)
    # each node fetches the weights once from the object store, whether or not it could reach the directory itself
    weights = ray.put({name: np.frombuffer(data, np.uint8) for name, data in run.checkpoint_files.items()})
    shards = [{"shard": shard, "exists": exists} for shard, exists in pending]
    return (
        ray.data.from_items(shards, override_num_blocks=len(shards))
        .map_batches(fetch_shard, fn_args=(task,), batch_size=1, num_cpus=size.task_cpus)
        .map_batches(
            SegmentActor,
            fn_constructor_args=(task, weights, size.num_threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size.max_actors),
            num_cpus=size.num_cpus,
            num_gpus=size.num_gpus,
        )
        .map_batches(write_masks, fn_args=(task,), batch_size=1, num_cpus=size.task_cpus)
    )


def _root_cause(error: BaseException) -> str:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
