"""The status of an evaluation or a sweep, read from storage alone: its segment runs or trainings, and its table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.commands import shell_command
from vlsm.errors import ResultError
from vlsm.report.rerun import rerun_command
from vlsm.runs.lease import PATIENCE_S, Holder, read_holder
from vlsm.runs.record import SUMMARY_NAME, read_record, read_summary, settings_of
from vlsm.words import count


@dataclass(frozen=True)
class JobStatus:
    """The status of a job that consists of other runs.

    Attributes:
        kind: "evaluation" or "sweep".
        is_finished: whether the job has written its summary.
        done, planned: finished segment runs of an evaluation, or trainings of a sweep, and all of them.
        parts: one sentence for each of them that has begun and is not finished.
        silent_s: seconds since the last sign of life of the job, or None if it gave none.
        next_steps: one sentence for each next step.
    """

    kind: str
    is_finished: bool
    done: int
    planned: int
    parts: list[str]
    silent_s: float | None
    next_steps: list[str]


def read_job_status(output: str, record: dict[str, Any], now_s: float) -> JobStatus | None:
    """Return the status of an evaluation or a sweep, or None if the record is of something else.

    Raises:
        ResultError: a file is damaged.
    """
    kind = "evaluation" if "runs" in record["plan"] else "sweep" if "trials" in record["plan"] else None
    if kind is None:
        return None
    runs = list(_segment_runs(output, record) if kind == "evaluation" else _trainings(output, record))
    is_finished = read_summary(output) is not None
    holder = None if is_finished else read_holder(output, now_s)
    done = [name for name, uri in runs if storage.exists(storage.join(uri, SUMMARY_NAME))]
    begun = [(name, uri) for name, uri in runs if name not in done and read_record(uri) is not None]
    parts = [f"{name} has begun: {shell_command('jobs.status', uri)}" for name, uri in begun]
    steps = list(_next_steps(output, record, is_finished, holder))
    silent_s = holder.silent_s if holder else None
    return JobStatus(kind, is_finished, len(done), len(runs), parts, silent_s, steps)


def _segment_runs(output: str, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and OUTPUT of each segment run of an evaluation."""
    runs = record["plan"]["runs"]
    if not isinstance(runs, dict) or not all(isinstance(run, str) for run in runs.values()):
        raise ResultError(f"config.yaml of {output!r} is damaged: its plan names no runs")
    for name, run in runs.items():
        yield f"system {name}", storage.join(output, run)


def _trainings(output: str, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and OUTPUT of each training of a sweep, below OUTPUT wherever that lies now."""
    from vlsm.evaluation.sweep import SweepSettings, plan_trial_groups

    settings = settings_of(record["config"] | {"output": output}, SweepSettings)
    for group in plan_trial_groups(settings):
        for trial in group.trials:
            yield trial.name, trial.settings.output


def _next_steps(output: str, record: dict[str, Any], is_finished: bool, holder: Holder | None) -> Iterator[str]:
    if is_finished:
        yield f"nothing is left to do; the table is {storage.join(output, 'table.md')}"
        return
    is_alive = holder is not None and not holder.is_dead and holder.silent_s < PATIENCE_S
    state = "it runs; if it does not" if is_alive else "it seems not to run; if so"
    yield f"{state}, this command resumes it: {rerun_command(output, record)}"


def describe_job(status: JobStatus) -> list[str]:
    """Return lines that describe a status to a person."""
    noun = "system segmented" if status.kind == "evaluation" else "training finished"
    return [f"done: {status.done:,} of {count(status.planned, noun.split()[0])} {noun.split()[1]}", *status.parts]
