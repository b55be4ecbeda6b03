"""Train and compare models on datasets, with prompts and seeds: a matrix of trials, and the table of its results.

    plan -> a training per trial, as many at once as the cluster holds -> an evaluation per cell -> one table

Every trial is a run of `jobs.train` in a folder of its own and every cell one of `jobs.evaluate`: a rerun goes on with
what is missing of them.
"""

import json
import sys
import time
from pathlib import PurePath
from typing import Any

from jobs.command import RaySession, logger, make_parser, parse_pairs, run_command
from jobs.evaluate import evaluate
from vlsm import storage
from vlsm.config import dump_yaml, load_settings
from vlsm.errors import ConfigError, VlsmError
from vlsm.evaluation.sweep import (
    Cell,
    SweepSettings,
    Trial,
    plan_cells,
    read_models,
    tabulate,
    write_csv,
    write_markdown,
)
from vlsm.runs.lifecycle import read_summary
from vlsm.runs.record import SUMMARY_NAME, create_record, describe_differences, forget_run, make_record, read_record

_LOG_INTERVAL_S = 30.0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("jobs.sweep", str(__doc__).partition("\n")[0], SweepSettings)
    parser.add_argument("output", metavar="OUTPUT", help="folder for trials, evaluations and the table")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=URI", help="as for jobs.train")
    args = parser.parse_args(argv)

    def work() -> dict[str, Any] | None:
        arguments: dict[str, Any] = {"output": storage.absolute(args.output)}
        if args.dataset:
            arguments["datasets"] = parse_pairs("--dataset", args.dataset)
        settings = load_settings(SweepSettings, args.config, args.set, arguments)
        folder = storage.absolute(str(PurePath(args.config or ".").parent))
        settings = settings.model_copy(update={"models": read_models(settings.models, folder)})
        if not args.dry_run:
            return sweep(settings)
        print(dump_yaml(settings.model_dump(mode="json")), end="")
        for cell in plan_cells(settings):
            print("\n".join(f"# {trial.name}" for trial in cell.trials))
        return None

    return run_command(work)


def sweep(settings: SweepSettings) -> dict[str, Any]:
    """Run the job to its end and return its summary.

    Raises:
        VlsmError: the settings are wrong, or a trial could not be finished; a rerun goes on with the others' results.
    """
    cells, output = plan_cells(settings), settings.output
    if settings.start_over:
        forget_run(output, ("table.md", "table.csv"))
    record = make_record(settings, {}, {"trials": sum(len(cell.trials) for cell in cells)})
    with storage.name_errors("OUTPUT", output):
        create_record(output, record)
        if differences := describe_differences(read_record(output) or record, settings, {}):
            raise ConfigError(
                f"OUTPUT {output!r} belongs to a sweep with other settings: {'; '.join(differences)}; choose another "
                "OUTPUT, or --set start_over=true, which keeps what is trained"
            )
    if summary := read_summary(output):
        logger.info("%s is finished: there is nothing to do", output)
        return summary
    started_s = time.monotonic()
    with RaySession(log_to_driver=False) as session:
        session.wait()
        failures = _train_all([trial for cell in cells for trial in cell.trials], settings)
        if failures:
            raise VlsmError(f"{len(failures)} trials failed: {'; '.join(failures[:3])}; the same command goes on")
        rows = [row for cell in cells for row in _evaluate_cell(cell)]
    table = tabulate(rows, settings)
    markdown = write_markdown(table, settings)
    storage.write_bytes(storage.join(output, "table.csv"), write_csv(table).encode())
    storage.write_bytes(storage.join(output, "table.md"), markdown.encode())
    logger.info("%s/table.md:\n%s", output, markdown)
    summary = {"trials": record["plan"]["trials"], "cells": len(table)}
    summary["seconds"] = round(time.monotonic() - started_s, 1)
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary


def _train_all(trials: list[Trial], settings: SweepSettings) -> list[str]:
    """Train what is not trained yet; why some could not be, a sentence each."""
    import ray

    waiting = [trial for trial in trials if read_summary(trial.settings.output) is None]
    parallel = settings.run.parallel or max(1, int(ray.cluster_resources().get("GPU", 1)))
    logger.info("%d of %d trials are to be trained, %d at once", len(waiting), len(trials), parallel)
    task = ray.remote(num_cpus=0, max_retries=2)(_train)
    running: dict[Any, Trial] = {}
    failures: list[str] = []
    num_done, said_s = len(trials) - len(waiting), time.monotonic()
    while waiting or running:
        while waiting and len(running) < parallel:
            trial = waiting.pop(0)
            logger.info("%s: begun", trial.name)
            running[task.remote(trial.settings)] = trial
        ready, _ = ray.wait(list(running), timeout=1.0)
        for reference in ready:
            trial, num_done = running.pop(reference), num_done + 1
            try:
                logger.info("%s: done (%d of %d); %s", trial.name, num_done, len(trials), ray.get(reference))
            except ray.exceptions.RayError as error:
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                failures.append(f"{trial.name}: {reason}")
                logger.warning("%s: failed: %s", trial.name, reason)
        if time.monotonic() - said_s >= _LOG_INTERVAL_S:
            said_s = time.monotonic()
            names = ", ".join(trial.name for trial in running.values())
            logger.info("%d of %d trials are done; running: %s", num_done, len(trials), names)
    return failures


def _train(settings: Any) -> str:
    """A task: one training, and a word of how it went."""
    from jobs.train import train

    summary = train(settings)
    return ", ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, (int, float, str)))


def _evaluate_cell(cell: Cell) -> list[dict[str, Any]]:
    """The mean Dice of every trial of a cell on every dataset, as `vlsm.evaluation.sweep.tabulate` takes them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    evaluate(cell.settings)
    fs, path = storage.open_uri(storage.join(cell.settings.output, "scores.parquet"))
    table = pq.read_table(
        path, filesystem=fs, columns=["system", "dataset", "prompt_name", "prompt_class", "status", "dice"]
    )
    table = table.filter(pc.field("status") == "ok")
    means = table.group_by(["system", "dataset", "prompt_name", "prompt_class"]).aggregate([("dice", "mean")])
    known = {trial.system: trial for trial in cell.trials}
    return [
        {
            "trained_on": known[row["system"]].dataset,
            "dataset": row["dataset"],
            "prompt": row["prompt_name"],
            "prompt_class": row["prompt_class"],
            "model": known[row["system"]].model,
            "seed": known[row["system"]].seed,
            "dice": row["dice_mean"],
        }
        for row in means.to_pylist()
    ]


if __name__ == "__main__":
    sys.exit(main())
