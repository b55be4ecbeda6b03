"""Segment an archive of images into a Parquet dataset of masks, one row per image and prompt.

    plan -> fetch and decode -> model actors -> masks at the image's original size -> one Parquet part per shard

A shard of the plan is one row in Ray Data and one part file in the output. The part is named after the shard's number
and is written in one atomic step, so a part that exists is complete. A rerun segments the shards without a part. A task
that Ray retries, or that outlives its run, can only write the same rows again.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from jobs.command import RaySession, job_parser, locate, logger, run_command
from jobs.segment_pipeline import Wave, stream_shards
from jobs.segment_pools import check_decoding
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.events import event
from vlsm.report.endings import segment_ending
from vlsm.report.forecast import describe_forecast, keep_sample, measure
from vlsm.runs.alive import SignOfLife
from vlsm.runs.compare import RunState, compare_run
from vlsm.runs.lifecycle import Run, finish_run, make_planner, open_input, prepare_run, resolve_settings
from vlsm.runs.plan import planned_keys
from vlsm.runs.planner import Planner
from vlsm.runs.record import SUMMARY_NAME, read_segment_summary
from vlsm.runs.results import part_name
from vlsm.shown import say
from vlsm.words import count

_EXAMPLES = (
    "scans masks --checkpoint checkpoint --set 'prompts=[polyp, flat polyp]'",
    "s3://bucket/scans s3://bucket/masks --checkpoint s3://bucket/checkpoint --dry-run --sample 20",
    "list.csv masks --checkpoint clipseg --checkpoint unet --set retry_failed=true",
)
_COMMON = (
    "prompts", "classes", "threshold", "label_maps", "probability_maps", "tile.size", "update", "retry_failed",
    "start_over", "run.batch_size", "run.actors",
)  # fmt: skip
_WAVE = 2048  # shards in one Ray dataset: Ray Data plans some hundreds a second
_MORE_ROUNDS = 3  # of counting and repair: a task that outlived a killed run may overwrite an updated part

Stream = Callable[..., None]  # `stream_shards` on the Ray of this job


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser("jobs.segment", str(__doc__).partition("\n")[0], _EXAMPLES, SegmentSettings, _COMMON)
    parser.add_argument(
        "input", metavar="INPUT", help="folder or prefix (recursive), glob, image, archive or manifest; local or s3://"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks; a rerun continues there")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="DIR",
        help="checkpoint directory, local or s3://; several are an ensemble",
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="with --dry-run: segment N images on this machine, without Ray, and estimate the time for all images",
    )
    parser.add_argument(
        "--node-price", type=float, metavar="X", help="with --sample: price per hour of a node like this machine"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.sample is not None and not (args.dry_run and args.sample > 0):
        parser.error(f"--sample is {args.sample}; it must be 1 or more, and goes with --dry-run")
    if args.node_price is not None and not args.sample:
        parser.error("--node-price goes with --sample")

    used: list[SegmentSettings] = []

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {name: locate(getattr(args, name)) for name in ("input", "output")}
        if args.checkpoint:
            arguments["members"] = [{"checkpoint": locate(uri)} for uri in args.checkpoint]
        settings = load_settings(SegmentSettings, args.config, args.set, arguments)
        used.append(settings)
        if not args.dry_run:
            return segment(settings)
        with storage.name_errors("OUTPUT", settings.output):
            storage.check_writable(settings.output)
        dry_run(settings, args.sample or 0, args.node_price)
        return None

    return run_command(work, lambda result: segment_ending(used[0], result), args.json, args.log_format)


def segment(settings: SegmentSettings) -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Raises:
        VlsmError: the settings are wrong, or the run could not be finished. A rerun continues it.
    """
    with SignOfLife(settings.output, "jobs.segment") as sign:
        return _segment(settings, sign)


def _segment(settings: SegmentSettings, sign: SignOfLife) -> dict[str, Any]:
    with RaySession() as session:
        sign.note("planning")
        run = prepare_run(settings, lambda: _begin(session, settings), sign.start)
        if summary := _final_summary(run):
            logger.info("%s is finished: there is nothing to do", run.settings.output)
            return summary
        sign.begin()
        if settings.prompts is None and not settings.classes:
            logger.info(
                "no prompt is set: the checkpoint's prompt is used, %s",
                ", ".join(map(repr, run.settings.prompts or ())),
            )
        started_s = time.monotonic()
        stream = partial(stream_shards, session, note=sign.note)
        if run.plan.is_complete:
            num_before = _stream_plan(stream, run)
        else:
            run, num_before = _stream_while_planning(stream, run)
        sign.note("counting all rows")
        state = _stream_missing(stream, run)
    return finish_run(run, state, num_before, time.monotonic() - started_s)


def _begin(session: RaySession, settings: SegmentSettings) -> None:
    """Start Ray, if the settings fit this machine; nothing is written yet."""
    check_decoding(settings)
    session.start()


def _final_summary(run: Run) -> dict[str, Any] | None:
    """Return the summary of a finished run; if its failed images must be retried, remove it and return None."""
    summary = read_segment_summary(run.settings.output, run.plan.num_images, run.plan.num_rows)
    if summary and run.settings.retry_failed and summary["failed"]:
        storage.remove(storage.join(run.settings.output, SUMMARY_NAME))
        return None
    return summary


def _stream_plan(stream: Stream, run: Run) -> int:
    """Segment the unfinished shards of a complete plan. Returns the number of images that were done before."""
    settings, num_images = run.settings, run.plan.num_images
    state = compare_run(settings.output, run.plan, run.run_id, settings.retry_failed)
    num_left = num_images - state.num_done
    planned = event("planned", images=num_images, rows=run.plan.num_rows, left=num_left)
    logger.info("still to do: %s of %s", f"{num_left:,}", count(num_images, "image"), extra=planned)
    if state.num_stale:
        logger.info("only the columns of the list to write anew: %s", count(state.num_stale, "image"))
    stream(run, _waves(state.pending.items()), state, lambda: num_images, settings.retry_failed)
    return state.num_done


def _waves(pending: Iterable[tuple[int, bool]]) -> Iterator[Wave]:
    """Yield unfinished shards in waves that Ray Data can plan in some seconds."""
    iterator = iter(pending)
    while wave := list(itertools.islice(iterator, _WAVE)):
        yield wave


def _stream_while_planning(stream: Stream, run: Run) -> tuple[Run, int]:
    """Segment the shards of a plan while a planner still lists the archive.

    Returns:
        The run with its complete plan, and the number of images that were done before.
    """
    settings = run.settings
    with make_planner(run) as planner:
        known = replace(run.plan, num_shards=planner.wait(0))
        state = compare_run(settings.output, known, run.run_id, settings.retry_failed)
        num_before = state.num_done
        names = set(storage.list_names(storage.join(settings.output, "masks")))
        waves = itertools.chain(_waves(state.pending.items()), _waves_of_planner(planner, known.num_shards, names))
        stream(run, waves, state, lambda: planner.num_images, settings.retry_failed)
        run = replace(run, plan=planner.result())
    if settings.update and planner.is_resumed:  # an earlier job has listed the first images; they may have changed
        run = prepare_run(settings.model_copy(update={"start_over": False}))
    return run, num_before


def _waves_of_planner(planner: Planner, num_shards: int, names: set[str]) -> Iterator[Wave]:
    """Yield the shards after the first num_shards in waves; each wave has the shards that are planned so far."""
    while (end := planner.wait(num_shards)) > num_shards:
        yield from _waves((shard, part_name(shard) in names) for shard in range(num_shards, end))
        num_shards = end


def _stream_missing(stream: Stream, run: Run) -> RunState:
    """Count all rows and segment shards that lack rows, until no row is missing. Returns the last count."""
    for _ in range(_MORE_ROUNDS):
        state = compare_run(run.settings.output, run.plan, run.run_id, are_written=True)
        if not state.pending:
            break
        stream(run, _waves(state.pending.items()), state, lambda: run.plan.num_images)
    return state


def dry_run(settings: SegmentSettings, sample_size: int = 0, node_price: float | None = None) -> None:
    """Print the resolved settings and the numbers of images and rows. Write nothing and do not start Ray.

    Args:
        settings: settings of the run.
        sample_size: number of images to segment on this machine, to estimate the time for all images.
        node_price: price per hour of a node like this machine.
    """
    settings, members = resolve_settings(settings)
    archive = open_input(settings, [member.settings for member in members])
    counts = Counter(images=0, rows=0)
    sample: list[dict[str, Any]] = []
    for row in keep_sample(archive.rows, sample, sample_size):
        counts.update(images=1, rows=len(planned_keys(row["prompts"], settings.kinds)))
    say(dump_yaml(settings.model_dump(mode="json")), end="")
    say(
        f"# {count(counts['images'], 'image')}, {count(counts['rows'], 'output row')}; "
        f"skipped files: {dict(archive.skipped) or 'none'}"
    )
    if sample:
        for line in describe_forecast(measure(settings, members, sample), counts["images"], node_price):
            say(f"# {line}")


if __name__ == "__main__":
    sys.exit(main())
