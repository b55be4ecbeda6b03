"""The segment job's pipeline on Ray Data: each shard passes all stages and ends as a part file."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.command import RaySession
from jobs.segment_actor import SegmentActor
from jobs.segment_pools import prepare_pools
from jobs.segment_tasks import Task, fetch_shard, write_masks
from vlsm.errors import ProbeError, VlsmError
from vlsm.runs.compare import RunState
from vlsm.runs.lifecycle import Run, check_failed_share

if TYPE_CHECKING:
    from jobs.progress import Progress

Wave = list[tuple[int, bool]]  # shards for one Ray dataset: number, and whether a part file exists


def stream_shards(  # noqa: PLR0913 - all that one stream of shards depends on
    session: RaySession,
    run: Run,
    waves: Iterator[Wave],
    state: RunState,
    count_images: Callable[[], int],
    retry_failed: bool = False,
    note: Callable[[str], None] = lambda words: None,
) -> None:
    """Segment shards with Ray, wave by wave. Without any wave, return without waiting for Ray.

    Args:
        session: Ray, running or starting.
        run: the planned run.
        waves: the shards to segment; the next wave is requested when the last one is written.
        state: the progress of the run so far.
        count_images: returns the number of images of the run that are planned so far.
        retry_failed: whether to segment failed images again.
        note: gets what the job does, as a phrase, whenever this changes.

    Raises:
        VlsmError: the fraction of failed images is too large, or a stage failed in all its retries.
        CheckpointError: the actors could not build the checkpoint's model.
        ProbeError: a model computes otherwise on the device of an actor than where its checkpoint was written.
    """
    first = next(waves, None)
    if first is None:
        return
    note("starting Ray")
    session.wait()
    import ray.data

    from jobs.crash_watch import CrashBoard, start_board
    from jobs.progress import Progress

    configure_ray_data()
    board = start_board(CrashBoard, session.milestones)
    squares = tuple(member.square for member in run.members)
    task = Task(run.settings, run.run_id, run.plan.id, squares, retry_failed, board)
    # each node gets the weights from Ray's object store, once, and need not reach the checkpoint directory
    weights = [
        ray.put({name: np.frombuffer(data, np.uint8) for name, data in member.files.items()}) for member in run.members
    ]
    try:
        with Progress(
            count_images, state.num_done, state.counts["failed"], board, task.settings.output, note
        ) as progress:
            for wave in itertools.chain([first], waves):
                for part in plan_stream(wave, task, weights).iter_rows():
                    finish_part(part, run, progress, count_images)
    except ray.exceptions.RayError as error:
        if refusal := ray.get(board.refusal.remote()):
            raise ProbeError(refusal) from error
        _check_checkpoints(run)
        reason = ray.get(board.last_error.remote()) or _root_cause(error)
        raise VlsmError(f"a stage failed in all its retries: {reason}; the same command goes on from here") from error


def finish_part(part: Mapping[str, Any], run: Run, progress: "Progress", count_images: Callable[[], int]) -> None:
    """Count the images of a written part: a row of `plan_stream`'s pipeline.

    Raises:
        VlsmError: the fraction of failed images is too large.
        ProbeError: the device of an actor computes otherwise than it should.
    """
    progress.finish_shard(part["shard"], part["num_images"], json.loads(part["failed"]))
    if progress.done >= min(run.settings.run.judge_after, count_images()):
        check_failed_share(run.settings, progress.done, progress.failed, json.loads(part["first_errors"]))


def configure_ray_data() -> None:
    """Set Ray Data up for shards: one block each, no lost block, few retries of exceptions."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard stays one block of any size
    context.max_errored_blocks = 0
    context.retried_map_errors, context.max_map_retries = True, 2  # of exceptions; deaths of processes have no limit
    context.max_consecutive_actor_init_deaths = 3


def plan_stream(wave: Wave, task: Task, weights: list[Any]) -> Any:
    """Return the pipeline as a lazy Ray dataset with one row per written part.

    A row is a shard, and every stage has batch_size 1, so that no stage can merge or split shards. At first, a row has
    the shard's number and whether a part file exists. Then it is a packed ShardBatch. At the end, it has counts.
    """
    import ray.data

    pools = prepare_pools(task.settings, len(wave))
    shards = [{"shard": shard, "exists": exists} for shard, exists in wave]
    rows: Any = ray.data.from_items(shards, override_num_blocks=len(shards))
    rows = rows.map_batches(fetch_shard, fn_args=(task,), **pools[0].fetch_options)
    for pool in pools:
        actor = (task, weights, pool.members, pool.num_threads)
        rows = rows.map_batches(SegmentActor, fn_constructor_args=actor, batch_format="pyarrow", **pool.actor_options)
    return rows.map_batches(write_masks, fn_args=(task,), batch_format="pyarrow", **pools[0].write_options)


def _check_checkpoints(run: Run) -> None:
    """Raise a CheckpointError if a model cannot be built: an actor that fails to build it dies without a reason."""
    from vlsm.checkpoints import build_checkpoint

    for member, member_settings in zip(run.members, run.settings.members, strict=True):
        build_checkpoint(member.files, member_settings.checkpoint)


def _root_cause(error: BaseException) -> str:
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
