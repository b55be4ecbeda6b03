"""Train models on datasets with several prompts and seeds, and compare them in one table.

    plan -> one training per trial, in parallel -> one evaluation per group of trials -> one table

With data.split or folds, the splits of all trials are made first, once, as lists in OUTPUT.

A trial is a run of `jobs.train` in its own folder. A group has all trials with the same training data, prompt and fold;
a run of `jobs.evaluate` compares them. A rerun continues with the trainings and evaluations that are not finished.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from jobs.clock import PROGRESS_S, describe_left, seconds_left
from jobs.command import RaySession, job_parser, locate, logger, parse_pairs, run_command
from jobs.evaluate import evaluate
from vlsm import storage
from vlsm.config import dump_yaml, load_settings
from vlsm.datasets.inspection import Facts
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError, VlsmError
from vlsm.evaluation.folds import write_lists
from vlsm.evaluation.sweep import (
    SweepSettings,
    Trial,
    TrialGroup,
    choose_next,
    has_lists,
    plan_trial_groups,
    read_models,
    tabulate,
    write_csv,
    write_markdown,
)
from vlsm.evaluation.sweep_scores import average_scores
from vlsm.events import event
from vlsm.report.endings import sweep_ending
from vlsm.runs.lease import Lease
from vlsm.runs.record import (
    SUMMARY_NAME,
    create_record,
    describe_differences,
    forget_run,
    make_record,
    read_record,
    read_summary,
)
from vlsm.runs.tables import open_table
from vlsm.shown import Lines, say
from vlsm.training.settings import DataSettings
from vlsm.words import count

_EXAMPLES = (
    "sweep --config jobs/configs/sweeps/paper.yaml --dataset kvasir=data/kvasir --dataset busi=data/busi",
    "sweep --config jobs/configs/sweeps/paper.yaml --dataset kvasir=data/kvasir --set 'seeds=[0, 1, 2]' --dry-run",
    "folds --config jobs/configs/sweeps/paper.yaml --dataset own=data/own --set folds=5",
)
_COMMON = (
    "models", "prompts", "seeds", "folds", "pooled", "external", "train", "evaluate", "baseline", "start_over",
    "run.parallel",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = job_parser("jobs.sweep", str(__doc__).partition("\n")[0], _EXAMPLES, SweepSettings, _COMMON)
    parser.add_argument("output", metavar="OUTPUT", help="folder for trials, evaluations and the table")
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=URI",
        help="labelled dataset, as in jobs.train; repeatable",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {"output": locate(args.output)}
        if args.dataset:
            arguments["datasets"] = parse_pairs("--dataset", args.dataset)
        settings = load_settings(SweepSettings, args.config, args.set, arguments)
        folder = storage.absolute(str(PurePath(args.config or ".").parent))
        settings = settings.model_copy(update={"models": read_models(settings.models, folder)})
        if not args.dry_run:
            return sweep(settings)
        with storage.name_errors("OUTPUT", settings.output):
            storage.check_writable(settings.output)
        from vlsm.evaluation.sweep_checks import check_sweep  # here, so that --help does not wait for this import

        groups = plan_trial_groups(settings)
        lines = check_sweep(settings, groups)
        say(dump_yaml(settings.model_dump(mode="json")), end="")
        say("\n".join(f"# {line}" for line in lines))
        for group in groups:
            say("\n".join(f"# {trial.name}" for trial in group.trials))
        return None

    return run_command(work, lambda result: sweep_ending(locate(args.output), result), args.json, args.log_format)


def sweep(settings: SweepSettings) -> dict[str, Any]:
    """Run the whole job and return its summary.

    Raises:
        LeaseError: another job works on OUTPUT, or has taken it over.
        VlsmError: the settings are wrong, or a trial failed; a rerun keeps the finished trials.
    """
    from vlsm.evaluation.sweep_checks import check_sweep

    groups, output = plan_trial_groups(settings), settings.output
    if settings.start_over or read_record(output) is None:
        check_sweep(settings, groups)  # in seconds: the trainings would find the same after the start of Ray
    num_trials = sum(len(group.trials) for group in groups)
    with Lease(output, "jobs.sweep") as lease:
        with storage.name_errors("OUTPUT", output):
            _prepare(settings, num_trials, groups[0].trials[0].settings.data, lease)
        if summary := read_summary(output):
            logger.info("%s is finished: there is nothing to do", output)
            return summary
        return _run(settings, groups, lease)


def _prepare(settings: SweepSettings, num_trials: int, data: DataSettings, lease: Lease) -> None:
    """Write the record of a new sweep, or check the settings of an earlier one. Takes the lease if there is work."""
    output = settings.output
    if not settings.start_over and (record := read_record(output)) is not None:
        if differences := describe_differences(record, settings, {}):
            raise ConfigError(
                f"OUTPUT {output!r} belongs to a sweep with other settings: {'; '.join(differences)}; choose another "
                "OUTPUT, or --set start_over=true, which keeps the finished trainings"
            )
        if not storage.exists(storage.join(output, SUMMARY_NAME)):
            lease.take()
        return
    lease.take()
    if settings.start_over:
        forget_run(output, ("table.md", "table.csv"))
    if has_lists(settings, data.split):
        return  # `_run` writes the lists first: a plan that is recorded has them
    if not create_record(output, make_record(settings, {}, {"trials": num_trials})):
        _prepare(settings, num_trials, data, lease)  # another job has planned a sweep at the same time, and has ended


def _run(settings: SweepSettings, groups: list[TrialGroup], lease: Lease) -> dict[str, Any]:
    """Train and evaluate all that is not finished, write the tables, and return the summary."""
    trials = [trial for group in groups for trial in group.trials]
    output, started_s = settings.output, time.monotonic()
    with RaySession() as session:
        session.wait()
        if read_record(output) is None:
            data = trials[0].settings.data.allowing(settings.run.allow)
            for line in write_lists(settings, data, partial(_inspect, data)):
                logger.info("%s", line)
            create_record(output, make_record(settings, {}, {"trials": len(trials)}))
        failures = _train_all(trials, settings, lease)
        if failures:
            raise VlsmError(
                f"{count(len(failures), 'trial')} failed: {'; '.join(failures[:3])}; "
                "run the same command again to continue"
            )
        rows = [row for group in groups for row in _evaluate_group(group)]
    if lease.token is not None:
        lease.token.check()
    table = tabulate(rows, settings)
    markdown = write_markdown(table, settings)
    storage.write_bytes(storage.join(output, "table.csv"), write_csv(table).encode())
    storage.write_bytes(storage.join(output, "table.md"), markdown.encode())
    logger.info("%s/table.md:\n%s", output, Lines(markdown))
    summary: dict[str, Any] = {"trials": len(trials), "cells": len(table)}
    summary["seconds"] = round(time.monotonic() - started_s, 1)
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary


def _inspect(data: DataSettings, records: Sequence[Record]) -> list[Facts]:
    from jobs.train_feed import inspect_records  # which imports Ray

    return inspect_records(records, data)


def _train_all(trials: list[Trial], settings: SweepSettings, lease: Lease) -> list[str]:
    """Train all unfinished trials. Return one message per failed trial."""
    import ray

    from jobs.train_group import share_cpus

    waiting = [trial for trial in trials if not _is_finished(trial)]
    resources, nodes = ray.cluster_resources(), ray.nodes()  # type: ignore[no-untyped-call]
    parallel = settings.run.parallel or max(1, int(resources.get("GPU", 1)))
    of_all = f"of {count(len(trials), 'training')}"
    logger.info("%d %s are to be done, %d at a time", len(waiting), of_all, parallel)
    task = ray.remote(num_cpus=0, max_retries=2)(_train)
    running: dict[Any, Trial] = {}
    failures: list[str] = []
    num_before = num_done = len(trials) - len(waiting)
    started_s = logged_s = time.monotonic()
    failed = set[str]()  # their OUTPUT
    while waiting or running:
        while len(running) < parallel:
            trial = choose_next(waiting, {*failed, *(one.settings.output for one in running.values())})
            if trial is None:
                break
            waiting.remove(trial)
            logger.info("%s: started", trial.name, extra=_event(trial, "started", num_done, trials))
            shared = share_cpus(trial.settings, nodes, parallel)
            running[task.remote(shared, f"{lease.owner} {trial.settings.output}")] = trial
        if not running:  # the others are stacks of trials that failed
            return failures + [f"{trial.name}: a member of the stack failed" for trial in waiting]
        lease.check()
        lease.note({"trials_done": num_done, "trials": len(trials)})
        ready, _ = ray.wait(list(running), timeout=1.0)
        for reference in ready:
            trial, num_done = running.pop(reference), num_done + 1
            try:
                words = trial.name, num_done, len(trials), ray.get(reference)
                logger.info("%s: done (%d of %d); %s", *words, extra=_event(trial, "done", num_done, trials))
            except ray.exceptions.RayError as error:
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                failures.append(f"{trial.name}: {reason}")
                failed.add(trial.settings.output)
                logger.warning("%s: failed: %s", trial.name, reason, extra=_event(trial, "failed", num_done, trials))
        if running and time.monotonic() - logged_s >= PROGRESS_S:
            logged_s = time.monotonic()
            names = ", ".join(trial.name for trial in running.values())
            left_s = seconds_left(num_done - num_before, len(trials) - num_before, logged_s - started_s)
            progress = event("progress", done=num_done, total=len(trials), unit="training", left_s=left_s)
            logger.info("%d %s done; running: %s; %s", num_done, of_all, names, describe_left(left_s), extra=progress)
    return failures


def _event(trial: Trial, state: str, num_done: int, trials: list[Trial]) -> dict[str, Any]:
    return event("trial", name=trial.name, state=state, done=num_done, total=len(trials))


def _is_finished(trial: Trial) -> bool:
    """Return whether a trial is finished.

    Raises:
        ConfigError: it was trained with other settings or data, which start_over has kept.
    """
    from vlsm.training.run import check_finished

    if read_summary(trial.settings.output) is None:
        return False
    try:
        check_finished(trial.settings)
    except ConfigError as error:
        raise ConfigError(f"{trial.name}: {error}") from error
    return True


def _train(settings: Any, holder: str) -> str:
    """Run one training as a Ray task and return its summary as text. Ray repeats a task that died, as `holder`."""
    from jobs.train import train

    summary = train(settings, holder)
    return ", ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, (int, float, str)))


def _evaluate_group(group: TrialGroup) -> list[dict[str, Any]]:
    """Evaluate a group and return the mean Dice per trial, dataset and prompt, as rows for `tabulate`."""
    evaluate(group.settings)
    from vlsm.evaluation.parts import SCORES_SCHEMA

    columns = ["system", "dataset", "prompt_name", "prompt_class", "status", "dice"]
    scores = open_table(storage.join(group.settings.output, "scores.parquet"), SCORES_SCHEMA)
    return average_scores(scores.read(columns), group.trials)


if __name__ == "__main__":
    sys.exit(main())
