"""Segment an archive of images into a Parquet dataset of masks, one row per image and prompt.

    plan -> fetch and decode -> model actors -> masks at the image's own size -> one Parquet part per shard

A shard of the plan is one row that flows through Ray Data and one part file at the end. The part's name is the shard's
number and it is put in one atomic step, so that its presence means done: a rerun does the shards that have none, and a
task that Ray retries, or that outlives its run, can only put the same rows again.
"""

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from jobs.command import RaySession, logger, make_parser, run_command
from jobs.segment_pipeline import Wave, execute
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, load_settings
from vlsm.report.forecast import describe_forecast, keep_sample, measure
from vlsm.runs.compare import compare_run
from vlsm.runs.lifecycle import finish_run, make_planner, open_input, prepare_run, read_summary, resolve_settings
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
        VlsmError: the settings are wrong, or the run could not be finished; a rerun goes on where it stopped.
    """
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(RaySession())
        run = prepare_run(settings, session.start)
        output = run.settings.output
        if summary := read_summary(output):
            if not (settings.retry_failed and summary["failed"]):
                logger.info("%s is finished: there is nothing to do", output)
                return summary
            storage.remove(storage.join(output, SUMMARY_NAME))
        started_s = time.monotonic()
        if settings.prompts is None:
            logger.info("the prompt is the checkpoint's own: %s", ", ".join(map(repr, run.settings.prompts or ())))
        planner = None if run.plan.is_complete else stack.enter_context(make_planner(run))
        known = run.plan if planner is None else replace(run.plan, num_shards=planner.wait(0))
        state = compare_run(output, known, run.run_id, settings.retry_failed)
        num_before = state.num_done
        waves = _waves(state.pending.items())
        if planner is None:
            logger.info("%d of %d images are to be done", run.plan.num_images - num_before, run.plan.num_images)
            execute(session, run, waves, state, lambda: run.plan.num_images, settings.retry_failed)
        else:
            names = set(storage.list_names(storage.join(output, "masks")))
            waves = itertools.chain(waves, _planned_waves(planner, known.num_shards, names))
            execute(session, run, waves, state, lambda: planner.num_images, settings.retry_failed)
            run = replace(run, plan=planner.result())
            if settings.update and planner.is_resumed:  # what has changed of that which was listed before
                run = prepare_run(settings.model_copy(update={"start_over": False}))
        for _ in range(_MORE_ROUNDS):
            state = compare_run(output, run.plan, run.run_id)
            if not state.pending:
                break
            execute(session, run, _waves(state.pending.items()), state, lambda: run.plan.num_images)
    return finish_run(run, state, num_before, time.monotonic() - started_s)


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


def _planned_waves(planner: Planner, num_shards: int, names: set[str]) -> Iterator[Wave]:
    """The shards behind so many, while they are being planned: each wave is what there is when the last one is done."""
    while (end := planner.wait(num_shards)) > num_shards:
        yield from _waves((shard, part_name(shard) in names) for shard in range(num_shards, end))
        num_shards = end


if __name__ == "__main__":
    sys.exit(main())
