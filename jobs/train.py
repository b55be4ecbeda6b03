"""Train a model on one or several labelled datasets, with one or many workers, and write a checkpoint for jobs.segment.

    check the data -> keep it decoded -> workers: stream, train, validate -> best checkpoint -> test

The state of a run is one file, OUTPUT/last.safetensors, which the first worker replaces in one atomic step. After the
death of a worker, a node or the driver, the run continues from this file: the order of the steps depends only on the
seed.
"""

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.command import RaySession, job_parser, locate, logger, parse_pairs, run_command
from jobs.segment_pools import warn_if_none_fits
from vlsm import storage
from vlsm.config import dump_yaml, load_settings
from vlsm.datasets.inspection import Facts
from vlsm.datasets.records import Record
from vlsm.errors import VlsmError
from vlsm.events import event
from vlsm.report.endings import train_ending
from vlsm.runs.lease import Lease
from vlsm.runs.record import read_record, read_summary
from vlsm.shown import say
from vlsm.temporary import PrivateFolder, remove_abandoned
from vlsm.training.settings import TrainSettings
from vlsm.words import count

if TYPE_CHECKING:
    from jobs.train_group import Ended

_EXAMPLES = (
    "trained --dataset kvasir=data/kvasir --set model=vlsm_a",
    "trained --dataset kvasir=data/kvasir --config jobs/configs/strong/unet.yaml --dry-run",
    "tuned --dataset own=s3://bucket/own --set start_from=trained/checkpoint --set optim.epochs=20",
)
_COMMON = (
    "model", "options", "trainable", "start_from", "data.prompt", "data.split.val", "data.augment.preset",
    "optim.epochs", "optim.batch_size", "optim.lr", "run.workers", "start_over",
)  # fmt: skip
_KILLED_S = 10.0  # workers that are killed need some seconds to end
_QUIET_S = 60.0  # after this time without a line, and again, the log says that it waits


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser("jobs.train", str(__doc__).partition("\n")[0], _EXAMPLES, TrainSettings, _COMMON)
    parser.add_argument("output", metavar="OUTPUT", help="folder for the checkpoint and other files; a rerun continues")
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=URI",
        help="a folder with images/ and masks/, or a list with image_uri and mask_uri; may be repeated",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)

    used: list[TrainSettings] = []

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {"output": locate(args.output)}
        if args.dataset:
            arguments["datasets"] = parse_pairs("--dataset", args.dataset)
        settings = load_settings(TrainSettings, args.config, args.set, arguments)
        used.append(settings)
        if not args.dry_run:
            return train(settings)
        with storage.name_errors("OUTPUT", settings.output):
            storage.check_writable(settings.output)
        dry_run(settings)
        return None

    return run_command(work, lambda result: train_ending(used[0], result), args.json, args.log_format)


def train(settings: TrainSettings, holder: str = "") -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Args:
        settings: settings of the run.
        holder: an id that all tries of one training share; a later try takes over OUTPUT from an earlier one.

    Raises:
        LeaseError: another job works on OUTPUT, or has taken it over.
        VlsmError: the settings or the data are wrong, or the training failed. A rerun continues the run.
    """
    from vlsm.training.run import prepare_training  # here, so that --help does not wait for this import

    # the lease is given back after Ray has ended the workers, which write to OUTPUT
    with (
        Lease(settings.output, "jobs.train", holder) as lease,
        _removed_features(settings),
        RaySession() as session,
    ):
        records = prepare_training(settings, partial(_inspect, session, settings), session.start, lease)
        if summary := read_summary(settings.output):
            logger.info("%s is finished: there is nothing to do", settings.output)
            return summary
        session.wait()
        train_with_ray(settings, records, milestones=session.milestones, lease=lease)
    summary = read_summary(settings.output)
    if summary is None:
        raise VlsmError("the workers ended without a summary; the same command goes on from here")
    return summary


@contextlib.contextmanager
def _removed_features(settings: TrainSettings) -> Iterator[None]:
    """Return a context that removes the features of killed workers on this machine: they cannot do it themselves."""
    try:
        yield
    finally:
        if settings.run.feature_cache_bytes:
            with contextlib.suppress(VlsmError, OSError):  # a store that is down: the next run removes them
                remove_abandoned(_features_kind(settings.output), _KILLED_S)


def dry_run(settings: TrainSettings) -> None:
    """Print the resolved settings and all findings in the data. Write nothing and train nothing.

    Raises:
        VlsmError: the settings or the data are wrong.
    """
    from vlsm.training.run import check_examples, check_model

    check_model(settings)
    with RaySession() as session:
        inspect = partial(_inspect, session, settings)
        _, lines, errors = check_examples(settings, inspect, num_shown=None, begin=session.start)
    say(dump_yaml(settings.model_dump(mode="json")), end="")
    say("\n".join(f"# {line}" for line in lines))
    if errors:  # not as an error of the usage: the dry run itself has done its work
        raise VlsmError(str(errors[0])) from errors[0]


def _inspect(session: RaySession, settings: TrainSettings, records: Sequence[Record]) -> list[Facts]:
    session.wait()
    from jobs.train_feed import inspect_records  # which imports Ray
    from vlsm.training.run import input_square

    return inspect_records(records, settings.data.allowing(settings.run.allow), input_square(settings))


def train_with_ray(
    settings: TrainSettings,
    records: Sequence[Record],
    worker: str | None = None,
    milestones: Mapping[str, float] | None = None,
    lease: Lease | None = None,
) -> None:
    """Train with Ray Train until the run has its summary.

    Args:
        settings: settings of the run.
        records: examples of the run.
        worker: MODULE:NAME of the function that each worker calls; default: `train_worker`.
        milestones: times of the milestones so far, in seconds since 1970, for the log.
        lease: the lease of OUTPUT, which this job has taken.

    Raises:
        LeaseError: another job has taken over OUTPUT.
        VlsmError: an error that another try cannot fix, or more worker deaths than run.max_failures.
    """
    import ray

    from jobs.crash_watch import start_board
    from jobs.train_feed import keep_decoded
    from jobs.train_group import TRAIN_WORKER, TrainingBoard, Work, fit_in_background, group_size
    from vlsm.training.run import input_square

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    size = group_size(settings, nodes)
    low, high = size.num_workers
    logger.info(
        "%s with %s and %s%s",
        count(low, "worker") if low == high else f"{low} to {high} workers",
        *(count(size.cpus, "CPU"), count(size.gpus, "GPU"), "" if high == 1 else " each"),
    )
    warn_if_none_fits(size.cpus, size.gpus, nodes)
    board = start_board(TrainingBoard, milestones or {"start": time.time()})
    decoded = keep_decoded(
        records, settings.data.allowing(settings.run.allow), input_square(settings), settings.run.cache_images
    )
    token = lease.token if lease is not None else None
    work = Work(settings, _run_id(settings.output), decoded, board, size, _features_kind(settings.output), token)
    with PrivateFolder("train") as folder:
        ended = fit_in_background(work, folder, worker or TRAIN_WORKER)
        _follow(ended, board, lease)
    if message := ray.get(board.failure.remote()):
        raise VlsmError(message)
    if ended.error is not None:
        raise VlsmError(
            f"training failed after run.max_failures={settings.run.max_failures} repetitions: {ended.error}; "
            "the same command goes on from here"
        ) from ended.error


def _follow(ended: "Ended", board: Any, lease: Lease | None) -> None:
    """Log the lines of the workers, and note their progress, until the training has ended."""
    import ray

    logger.info("starting the workers", extra=event("phase", phase="starting the workers"))
    news_s = said_s = time.monotonic()
    while not ended.wait(1.0):
        lines, progress = ray.get(board.take.remote())
        for line, extra in lines:
            logger.info("%s", line, extra=extra)
            news_s = said_s = time.monotonic()
        if time.monotonic() - said_s >= _QUIET_S:
            said_s = time.monotonic()
            logger.info("nothing new from the workers for %d s", said_s - news_s)
        if lease is not None:
            lease.check()
            lease.note(progress)
    for line, extra in ray.get(board.take.remote())[0]:
        logger.info("%s", line, extra=extra)


def _features_kind(output: str) -> str:
    """Return the kind of the temporary folders with the features of a run; see `vlsm.temporary`."""
    return f"features-{_run_id(output)}"


def _run_id(output: str) -> str:
    """Return the id of a run. A resumed run has the same id; a run that is started over has another one."""
    record = read_record(output) or {}
    return hashlib.sha256(f"{output} {record.get('planned_at')}".encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
