"""Segment an archive of images into a Parquet dataset of masks, one row per image and prompt.

    plan -> fetch and decode -> model actors -> masks at the image's own size -> one Parquet part per shard

A shard of the plan is one row that flows through Ray Data and one part file at the end. The part's name is the shard's
number and it is put in one atomic step, so that its presence means done: a rerun does the shards that have none, and a
task that Ray retries, or that outlives its run, can only put the same rows again.
"""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from jobs.command import RaySession, logger, make_parser, run_command
from jobs.segment_pipeline import Wave, stream_shards
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.report.forecast import describe_forecast, keep_sample, measure
from vlsm.runs.compare import RunState, compare_run
from vlsm.runs.lifecycle import Run, finish_run, make_planner, open_input, prepare_run, read_summary, resolve_settings
from vlsm.runs.plan import planned_keys
from vlsm.runs.planner import Planner
from vlsm.runs.record import SUMMARY_NAME
from vlsm.runs.results import part_name

_WAVE = 2048  # shards that Ray Data plans at once: some hundreds a second
_MORE_ROUNDS = 3  # a task that outlived a killed run may still undo what an update has planned anew


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("jobs.segment", str(__doc__).partition("\n")[0], SegmentSettings)
    parser.add_argument(
        "input", metavar="INPUT", help="folder or prefix (recursive), glob, image, archive or manifest; local or s3://"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks; a rerun continues there")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="DIR",
        help="checkpoint directory; local or s3://; several make an ensemble",
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="with --dry-run: segment so many images on this machine, without Ray, and tell how long all would take",
    )
    parser.add_argument("--node-price", type=float, metavar="X", help="with --sample: what such a node costs an hour")
    args = parser.parse_args(argv)
    if args.sample is not None and not (args.dry_run and args.sample > 0):
        parser.error("--sample is a number of images, 1 or more, and goes with --dry-run")
    if args.node_price is not None and not args.sample:
        parser.error("--node-price goes with --sample")

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {name: storage.absolute(getattr(args, name)) for name in ("input", "output")}
        if args.checkpoint:
            arguments["members"] = [{"checkpoint": storage.absolute(uri)} for uri in args.checkpoint]
        settings = load_settings(SegmentSettings, args.config, args.set, arguments)
        if not args.dry_run:
            return segment(settings)
        dry_run(settings, args.sample or 0, args.node_price)
        return None

    return run_command(work)


def segment(settings: SegmentSettings) -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Raises:
        VlsmError: the settings are wrong, or the run could not be finished; a rerun continues it.
    """
    with RaySession() as session:
        run = prepare_run(settings, session.start)
        if summary := _take_summary(run):
            logger.info("%s is finished: there is nothing to do", run.settings.output)
            return summary
        if settings.prompts is None:
            logger.info("the prompt is the checkpoint's own: %s", ", ".join(map(repr, run.settings.prompts or ())))
        started_s = time.monotonic()
        run, num_before = _stream_planned(session, run)
        state = _stream_missing(session, run)
    return finish_run(run, state, num_before, time.monotonic() - started_s)


def _take_summary(run: Run) -> dict[str, Any] | None:
    """The summary of a finished run; it is removed, and None returned, if failed images are to be segmented again."""
    summary = read_summary(run.settings.output)
    if summary and run.settings.retry_failed and summary["failed"]:
        storage.remove(storage.join(run.settings.output, SUMMARY_NAME))
        return None
    return summary


def _stream_planned(session: RaySession, run: Run) -> tuple[Run, int]:
    """Stream the shards that have no part yet, while a planner may still be listing the archive.

    Returns:
        The run with its complete plan, and the number of images that were done before.
    """
    settings = run.settings
    if run.plan.is_complete:
        state = compare_run(settings.output, run.plan, run.run_id, settings.retry_failed)
        logger.info("%d of %d images are to be done", run.plan.num_images - state.num_done, run.plan.num_images)
        waves = _waves(state.pending.items())
        stream_shards(session, run, waves, state, lambda: run.plan.num_images, settings.retry_failed)
        return run, state.num_done
    with make_planner(run) as planner:
        known = replace(run.plan, num_shards=planner.wait(0))
        state = compare_run(settings.output, known, run.run_id, settings.retry_failed)
        num_before = state.num_done
        names = set(storage.list_names(storage.join(settings.output, "masks")))
        waves = itertools.chain(_waves(state.pending.items()), _waves_of_planner(planner, known.num_shards, names))
        stream_shards(session, run, waves, state, lambda: planner.num_images, settings.retry_failed)
        run = replace(run, plan=planner.result())
    if settings.update and planner.is_resumed:  # the earlier part of the listing may have changed since
        run = prepare_run(settings.model_copy(update={"start_over": False}))
    return run, num_before


def _stream_missing(session: RaySession, run: Run) -> RunState:
    """Count every row, and stream shards that lack some; a task that outlived a killed run may undo newer work."""
    for _ in range(_MORE_ROUNDS):
        state = compare_run(run.settings.output, run.plan, run.run_id)
        if not state.pending:
            break
        stream_shards(session, run, _waves(state.pending.items()), state, lambda: run.plan.num_images)
    return state


def dry_run(settings: SegmentSettings, sample_size: int = 0, node_price: float | None = None) -> None:
    """Print the resolved settings and how much would be done; nothing is written, Ray is not started.

    Args:
        settings: of the run.
        sample_size: images that are segmented here, to tell how long all of them would take.
        node_price: of a node like this machine, an hour.
    """
    settings, members = resolve_settings(settings)
    archive = open_input(settings)
    rows = Counter(images=0, rows=0)
    sample: list[dict[str, Any]] = []
    for row in keep_sample(archive.rows, sample, sample_size):
        rows.update(images=1, rows=len(planned_keys(row["prompts"], settings.kinds)))
    print(dump_yaml(settings.model_dump(mode="json")), end="")
    print(
        f"# {rows['images']:,} images, {rows['rows']:,} output rows; passed over: {dict(archive.skipped) or 'nothing'}"
    )
    if sample:
        for line in describe_forecast(measure(settings, members, sample), rows["images"], node_price):
            print(f"# {line}")


def _waves(pending: Iterable[tuple[int, bool]]) -> Iterator[Wave]:
    """Pending shards, as many at a time as Ray Data plans in some seconds."""
    iterator = iter(pending)
    while wave := list(itertools.islice(iterator, _WAVE)):
        yield wave


def _waves_of_planner(planner: Planner, num_shards: int, names: set[str]) -> Iterator[Wave]:
    """The shards after the first `num_shards`, as they are planned; each wave has those that are planned by then."""
    while (end := planner.wait(num_shards)) > num_shards:
        yield from _waves((shard, part_name(shard) in names) for shard in range(num_shards, end))
        num_shards = end


if __name__ == "__main__":
    sys.exit(main())
