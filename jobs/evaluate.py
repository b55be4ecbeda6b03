"""Score checkpoints, ensembles and existing masks on labelled images at their original sizes, and compare them.

    plan -> one segment run per system -> Ray tasks that compare the masks of part files with labels -> scores, tables

`jobs.segment` makes the masks of each system in OUTPUT/runs. It plans, resumes and checks them like any segment run.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jobs.clock import PROGRESS_S, describe_left, seconds_left
from jobs.command import RaySession, job_parser, locate, logger, parse_pairs, run_command
from jobs.segment import segment
from vlsm import storage
from vlsm.config import dump_yaml, load_settings
from vlsm.errors import VlsmError
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.events import event, shows_bars
from vlsm.report.endings import evaluate_ending
from vlsm.runs.lease import Lease
from vlsm.runs.record import SUMMARY_NAME, read_summary
from vlsm.shown import Lines, say
from vlsm.words import count

if TYPE_CHECKING:
    import pyarrow as pa

    from vlsm.evaluation.parts import PredictionSource
    from vlsm.evaluation.planning import Evaluation

_EXAMPLES = (
    "scores --checkpoint trained/checkpoint --dataset kvasir=data/kvasir",
    "scores --checkpoint a/checkpoint --checkpoint b/checkpoint --dataset kvasir=data/kvasir --set split=val",
    "scores --masks ours=masks --dataset kvasir=data/kvasir",
)
_COMMON = (
    "split", "prompts", "limit", "baseline", "systems", "combine", "threshold", "data.mask_threshold",
    "groups", "patient", "retry_failed", "start_over",
)  # fmt: skip
_TASK_SCORES = 500  # minimum per task: about 15 s of work, as long as a process needs for its imports


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser("jobs.evaluate", str(__doc__).partition("\n")[0], _EXAMPLES, EvaluateSettings, _COMMON)
    parser.add_argument("output", metavar="OUTPUT", help="folder for scores and tables; a rerun continues there")
    repeated: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="checkpoint directory, local or s3://; may be repeated to compare several (for ensembles see `systems`)",
        **repeated,
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME=URI",
        help="a folder with images/ and masks/, or a list with image_uri and mask_uri; may be repeated",
        **repeated,
    )
    parser.add_argument(
        "--masks",
        metavar="NAME=OUTPUT",
        help="the OUTPUT of a finished segment run; its masks are scored as they are; may be repeated",
        **repeated,
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)

    used: list[EvaluateSettings] = []

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {"output": locate(args.output)}
        given = {
            "checkpoints": args.checkpoint,
            "datasets": parse_pairs("--dataset", args.dataset),
            "masks": parse_pairs("--masks", args.masks),
        }
        arguments |= {name: value for name, value in given.items() if value}
        settings = load_settings(EvaluateSettings, args.config, args.set, arguments)
        used.append(settings)
        if not args.dry_run:
            return evaluate(settings)
        with storage.name_errors("OUTPUT", settings.output):
            storage.check_writable(settings.output)
        dry_run(settings)
        return None

    def describe(result: dict[str, Any]) -> list[str]:
        return evaluate_ending(used[0].output, [*used[0].datasets.values(), *used[0].run.allow])

    return run_command(work, describe, args.json, args.log_format)


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Run the whole job and return its summary.

    Raises:
        LeaseError: another job works on OUTPUT, or has taken it over.
        VlsmError: the settings or the data are wrong, or the run failed; a rerun continues it.
    """
    with Lease(settings.output, "jobs.evaluate") as lease:
        return _evaluate(settings, lease)


def _evaluate(settings: EvaluateSettings, lease: Lease) -> dict[str, Any]:
    # Imported here so that --help is fast.
    from vlsm.evaluation.planning import MARKDOWN_NAME, finish_evaluation, prepare_evaluation

    evaluation = prepare_evaluation(settings, lease)
    settings = evaluation.settings
    summary_uri = storage.join(settings.output, SUMMARY_NAME)
    if summary := read_summary(settings.output):
        if not settings.retry_failed:
            logger.info("%s is finished: there is nothing to do", settings.output)
            return summary
        lease.take()
        storage.remove(summary_uri)
    started_s = time.monotonic()
    num_systems = len(evaluation.systems)
    logger.info("the plan has %s and %s", count(num_systems, "system"), count(evaluation.num_rows, "score"))
    with RaySession() as session:
        session.wait()
        for number, system in enumerate(evaluation.systems, 1):
            if system.segment is not None:
                phase = event("phase", phase=f"segmenting with system {system.name}")
                logger.info("segmenting with system %s, %d of %d", system.name, number, num_systems, extra=phase)
                segment(system.segment)
                lease.check()
        tables = list(score(evaluation))
    if lease.token is not None:
        lease.token.check()
    summary = finish_evaluation(evaluation, tables, time.monotonic() - started_s)
    table = storage.join(settings.output, MARKDOWN_NAME)
    logger.info("%s:\n%s", table, Lines(storage.read_bytes(table).decode()))
    return summary


def dry_run(settings: EvaluateSettings) -> None:
    """Print the resolved settings and the amount of work. Write nothing and do not start Ray."""
    from vlsm.evaluation.planning import plan_evaluation
    from vlsm.evaluation.systems import list_images

    evaluation, _ = plan_evaluation(settings)
    say(dump_yaml(evaluation.settings.model_dump(mode="json")), end="")
    for system in evaluation.systems:
        num_images = len(list_images(system.targets)) if system.segment else 0
        say(f"# {system.name}: {count(num_images, 'image')} to segment, {count(system.num_rows, 'score')}")


def score(evaluation: "Evaluation") -> "Iterator[pa.Table]":
    """Yield tables with the scores of all systems, from the part files of their finished segment runs.

    Raises:
        VlsmError: a part file is missing or damaged, or a task failed in all its attempts.
    """
    import ray

    from vlsm.evaluation.parts import missing_rows, open_source

    num_scores = evaluation.num_rows
    for system in evaluation.systems:
        missing = missing_rows(system, evaluation.settings)
        num_scores -= missing.num_rows
        yield missing
    logger.info("scoring %s", count(num_scores, "mask"), extra=event("phase", phase="scoring"))
    sources = [open_source(system, evaluation.settings) for system in evaluation.systems]
    parts = [(number, shard) for number, source in enumerate(sources) for shard in range(source.num_parts)]
    size = -(-len(parts) * _TASK_SCORES // max(1, evaluation.num_rows))
    task, shared = ray.remote(num_cpus=1, max_retries=3)(_score_parts), ray.put(sources)
    pending = [task.remote(shared, parts[start : start + size]) for start in range(0, len(parts), size)]
    try:
        yield from _collect(pending, num_scores)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        message = str(cause).strip().splitlines()[-1]
        raise VlsmError(f"scoring failed after retries: {message}; run the same command again to continue") from error


def _score_parts(sources: "list[PredictionSource]", parts: list[tuple[int, int]]) -> "pa.Table":
    """Return the scores of some part files; runs as a Ray task on one CPU.

    Args:
        sources: all segment runs.
        parts: pairs of an index in `sources` and the number of a part file.
    """
    import pyarrow as pa
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # decode_image checks max_pixels instead
    return pa.concat_tables([sources[number].score_part(shard) for number, shard in parts])


def _collect(pending: list[Any], num_scores: int) -> "Iterator[pa.Table]":
    """Yield the scores of each task when it ends. Show a progress bar on a terminal, else a log line every 10 s."""
    import ray

    with tqdm(total=num_scores, unit="mask", desc="scored", disable=not shows_bars()) as bar:
        started_s = logged_s = time.monotonic()
        num_done = 0
        while pending:
            ready, pending = ray.wait(pending, timeout=1.0)
            for reference in ready:
                table = ray.get(reference)
                yield table
                num_done += table.num_rows
                bar.update(table.num_rows)
            if bar.disable and time.monotonic() - logged_s >= PROGRESS_S:
                logged_s = time.monotonic()
                left_s = seconds_left(num_done, num_scores, logged_s - started_s)
                progress = event("progress", done=num_done, total=num_scores, unit="mask", left_s=left_s)
                words = f"{num_done:,}", count(num_scores, "mask"), describe_left(left_s)
                logger.info("scored %s of %s, %s", *words, extra=progress)


if __name__ == "__main__":
    sys.exit(main())
