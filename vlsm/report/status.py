"""The status of a run, read from storage alone: it works while the run is active and after it has died."""

import datetime
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlsm import storage
from vlsm.commands import shell_command
from vlsm.errors import ConfigError, ResultError
from vlsm.report.job_status import JobStatus, describe_job, read_job_status
from vlsm.report.rerun import rerun_command
from vlsm.runs.alive import read_signs
from vlsm.runs.compare import compare_run, failed_by_reason, sample_run
from vlsm.runs.extremes import EMPTY, MASKS, WHOLE_IMAGE, describe_extremes
from vlsm.runs.lease import PATIENCE_S, Holder, read_holder
from vlsm.runs.plan import Plan, count_planned, plan_of
from vlsm.runs.record import read_record, read_segment_summary, read_summary
from vlsm.runs.results import shard_of
from vlsm.training.history import History, read_history
from vlsm.words import count

_MOST_READ = 256  # parts of a few hundred kilobytes; of more parts only a sample is read, unless exact is asked for
_LONGEST_S = 1e10
_RECENT_S = 600.0  # window of the rate


@dataclass(frozen=True)
class SegmentStatus:
    """The status of a segment run.

    Attributes:
        is_finished: whether the run has compared its rows with its plan and written its summary.
        is_listing: whether INPUT is still being listed, so that the plan is not complete.
        is_exact: whether all parts were read; False if only a sample was read.
        planned_images, planned_parts: images and parts of the plan so far.
        parts: number of written parts.
        rows, ok, failed, vanished: number of rows in the written parts, and of images by status.
        failed_by_reason: number of failed images by reason.
        images_per_s: rate of the last ten minutes, or None if fewer than two parts were written in this time, or if no
            job works on the run.
        seconds_left: remaining time at this rate, or None if the rate is unknown.
        silent_s: seconds since the last write or sign of life, or None if there was none.
        next_steps: one sentence for each next step.
        is_running: whether a job gives signs of life; None if no job has left any, as those of earlier versions.
        jobs: a phrase for each job that works on the run, or that has ended before the run was finished.
        warning: a sentence if most masks are empty or cover the whole image, or None.
    """

    is_finished: bool
    is_listing: bool
    is_exact: bool
    planned_images: int
    planned_parts: int
    parts: int
    rows: int
    ok: int
    failed: int
    vanished: int
    failed_by_reason: dict[str, int]
    images_per_s: float | None
    seconds_left: float | None
    silent_s: float | None
    next_steps: list[str]
    is_running: bool | None = None
    jobs: list[str] = field(default_factory=list)
    warning: str | None = None


@dataclass(frozen=True)
class TrainingStatus:
    """The status of a training. Attributes that are not listed have the same meaning as in `SegmentStatus`.

    Attributes:
        epochs, planned_epochs: finished epochs, and epochs of the plan.
        monitor: validation metric that chooses the best epoch, "dice" or "loss".
        best_epoch, best: number of the best epoch so far, from 1, and its value; None before the first epoch has ended.
        seconds_per_epoch: median duration of an epoch.
        is_running: whether a job gives signs of life; None if no job holds the run's lease.
        running: the job that holds the lease and its progress, or None.
    """

    is_finished: bool
    epochs: int
    planned_epochs: int
    monitor: str
    best_epoch: int | None
    best: float | None
    seconds_per_epoch: float | None
    seconds_left: float | None
    silent_s: float | None
    next_steps: list[str]
    is_running: bool | None = None
    running: str | None = None


@dataclass(frozen=True)
class StartingStatus:
    """The status of a run that has no plan yet. All attributes have the same meaning as in `SegmentStatus`."""

    is_finished: bool
    is_running: bool
    jobs: list[str]
    silent_s: float
    next_steps: list[str]


Status = SegmentStatus | TrainingStatus | JobStatus | StartingStatus


def read_status(output: str, exact: bool = False, now_s: float | None = None) -> Status:
    """Return the status of a run.

    Args:
        output: OUTPUT of a segment run, a training, an evaluation or a sweep, finished or not.
        exact: read all parts of a segment run, and not only a sample if there are many.
        now_s: current time in seconds since 1970; default: the clock's time.

    Raises:
        ConfigError: there is no such run at OUTPUT.
    """
    record, now_s = read_record(output), time.time() if now_s is None else now_s
    if record is not None and "run_id" in record:
        return _segment_status(output, record, exact, now_s)
    if record is not None and "epochs" in record["plan"]:
        return _training_status(output, record, now_s)
    if record is not None and (status := read_job_status(output, record, now_s)) is not None:
        return status
    if record is None and (starting := _starting_status(output, now_s)):
        return starting
    there = "" if storage.exists(output) else ", which does not exist"
    raise ConfigError(
        f"there is no run in {output!r}{there}; it must be the OUTPUT of a segment run, a training, an evaluation or a "
        "sweep"
    )


def _segment_status(output: str, record: dict[str, Any], exact: bool, now_s: float) -> SegmentStatus:
    plan = plan_of(record, output)
    if not plan.is_complete:
        num_images, num_shards = count_planned(output, plan.id)
        plan = replace(plan, num_images=num_images, num_shards=num_shards)
    times = storage.list_times(storage.join(output, "masks"))
    numbered = sorted((shard, times[name]) for name in times if (shard := shard_of(name)) is not None)
    written = {shard: time_s for shard, time_s in numbered if shard < plan.num_shards}
    summary = read_segment_summary(output, plan.num_images, plan.num_rows)
    exact = exact or summary is not None or len(written) <= _MOST_READ
    counts = summary or _count(output, plan, record["run_id"], list(written), exact)
    num_done = counts["ok"] + counts["failed"] + counts["vanished"]
    signs = [sign for sign in read_signs(output, now_s) if sign.is_alive or summary is None]
    is_running = any(sign.is_alive for sign in signs) if signs else None
    is_still = summary is not None or is_running is False
    rate = None if is_still else _rate(sorted(written.values()), num_done / max(1, len(written)), now_s)
    newest_s = max([*written.values(), *storage.list_times(storage.join(output, "manifest")).values()], default=None)
    silences = [sign.silent_s for sign in signs] + ([] if newest_s is None else [max(0.0, now_s - newest_s)])
    return SegmentStatus(
        is_finished=summary is not None,
        is_listing=not plan.is_complete,
        is_exact=exact,
        planned_images=plan.num_images,
        planned_parts=plan.num_shards,
        parts=len(written),
        **{key: counts[key] for key in ("rows", "ok", "failed", "vanished", "failed_by_reason")},
        images_per_s=rate and round(rate, 2),
        seconds_left=(plan.num_images - num_done) / rate if rate else 0.0 if summary else None,
        silent_s=min(silences, default=None),
        next_steps=list(_next_steps(output, record, summary is not None, counts["failed"], is_running)),
        is_running=is_running,
        jobs=list(map(str, signs)),
        warning=describe_extremes(counts),
    )


def _starting_status(output: str, now_s: float) -> StartingStatus | None:
    """Return the status of an OUTPUT without a record, or None if no job has given a sign of life there."""
    jobs = [(sign.is_alive, str(sign), sign.silent_s) for sign in read_signs(output, now_s)]
    if holder := read_holder(output, now_s):
        is_alive = _is_alive(holder)
        jobs.append((is_alive, f"{'running' if is_alive else 'ended'}: {_name_holder(holder)}", holder.silent_s))
    if not jobs:
        return None
    is_running = any(is_alive for is_alive, *_ in jobs)
    step = "look again when it has planned its work" if is_running else "it has planned nothing: run its command again"
    return StartingStatus(
        is_finished=False,
        is_running=is_running,
        jobs=[job for _, job, _ in jobs],
        silent_s=min(silent_s for *_, silent_s in jobs),
        next_steps=[step],
    )


def _count(output: str, plan: Plan, run_id: str, written: list[int], exact: bool) -> dict[str, Any]:
    """Return the counts of rows and images in the written parts, with the keys of a summary."""
    if exact:
        counts, scale = compare_run(output, plan, run_id).counts if written else {}, 1.0
    else:
        shards = written[:: -(-len(written) // _MOST_READ)]
        counts, scale = sample_run(output, plan, run_id, shards), len(written) / len(shards)
    scaled = {key: round(value * scale) for key, value in counts.items()}
    totals = {key: scaled.get(key, 0) for key in ("rows", "ok", "failed", "vanished", MASKS, EMPTY, WHOLE_IMAGE)}
    return totals | {"failed_by_reason": failed_by_reason(scaled)}


def _rate(times: Sequence[float], images_per_part: float, now_s: float) -> float | None:
    """Return images per second since the oldest recent part. That part was begun earlier, so it is not counted."""
    recent = [time_s for time_s in times if time_s > now_s - _RECENT_S]
    if len(recent) < 2:
        return None
    return (len(recent) - 1) * images_per_part / max(1.0, now_s - recent[0])


def _next_steps(
    output: str, record: dict[str, Any], is_finished: bool, num_failed: int, is_running: bool | None
) -> Iterator[str]:
    if is_running and is_finished:
        yield "a job works on it, as to update it: look again when the job has ended"
    elif not is_finished:
        state = "no job works on it;"
        if is_running:
            state = "a job works on it; if it ends before the run is finished,"
        elif is_running is None and "run_id" in record:  # after an upgrade during a run
            state = "no job gives signs of life; if no job of an earlier version, which gives none, works on it,"
        yield f"{state} this command resumes it: {rerun_command(output, record)}"
    elif num_failed:
        yield f"this command repeats the failed images: {rerun_command(output, record, 'retry_failed=true')}"
    elif "run_id" in record:
        yield f"nothing is left to do; this command verifies it: {shell_command('jobs.verify', output)}"
    else:
        yield f"nothing is left to do; the checkpoint is {storage.join(output, 'checkpoint')}"


def _training_status(output: str, record: dict[str, Any], now_s: float) -> TrainingStatus:
    stored, num_planned = read_history(output), record["plan"]["epochs"]
    optim = record["config"].get("optim")
    monitor = optim.get("monitor") if isinstance(optim, dict) else None
    if type(num_planned) is not int or num_planned < 0 or monitor not in ("dice", "loss"):
        raise ResultError(
            f"config.yaml of {output!r} is damaged: it plans {num_planned!r} epochs, and monitors {monitor!r}"
        )
    history = History([row for row in stored.rows if row.split != "test"], stored.ties)
    num_done = max((row.epoch for row in history.rows), default=0)
    best_epoch = history.best_epoch(monitor) or None
    per_epoch = {row.epoch: row.seconds for row in history.rows}
    seconds = statistics.median(per_epoch.values()) if per_epoch else None
    newest_s = max((row.finished_at for row in stored.rows), default=None)
    is_finished = read_summary(output) is not None
    holder = None if is_finished else read_holder(output, now_s)
    # a job with a lease writes a heartbeat; runs of earlier versions write only at the end of an epoch
    times = [holder.silent_s] if holder else [] if newest_s is None else [max(0.0, now_s - newest_s)]
    silent_s = min(times, default=None)
    is_running = None if holder is None else _is_alive(holder)
    return TrainingStatus(
        is_finished=is_finished,
        epochs=num_done,
        planned_epochs=num_planned,
        monitor=monitor,
        best_epoch=best_epoch,
        best=history.monitored(monitor)[best_epoch - 1] if best_epoch else None,
        seconds_per_epoch=seconds,
        seconds_left=0.0 if is_finished else None if seconds is None else seconds * (num_planned - num_done),
        silent_s=silent_s,
        is_running=is_running,
        running=None if holder is None else _describe_holder(holder),
        next_steps=list(_next_steps(output, record, is_finished, 0, is_running)),
    )


def _is_alive(holder: Holder) -> bool:
    return holder.silent_s < PATIENCE_S and not holder.is_dead


def _name_holder(holder: Holder) -> str:
    return f"{holder.job}, process {holder.pid} on {holder.host}, since {holder.since}"


def _describe_holder(holder: Holder) -> str:
    """Return the job that holds a lease, and how far it is, as a phrase."""
    progress, where = holder.progress or {}, _name_holder(holder)
    numbers = [progress.get(key) for key in ("epoch", "epochs", "step", "steps")]
    if not all(type(number) is int for number in numbers):
        return f"{where}; before its first step"
    return "{}; epoch {} of {}, step {} of {}".format(where, *numbers)


def describe_status(status: Status) -> list[str]:
    """Return lines that describe a status to a person."""
    if isinstance(status, JobStatus):
        kind, lines, has_signs = status.kind, describe_job(status), True
    elif isinstance(status, TrainingStatus):
        kind, lines, has_signs = "training", _describe_training(status), status.running is not None
    else:
        kind, lines, has_signs = "segment run", list(status.jobs), bool(status.jobs)
    if isinstance(status, SegmentStatus):
        lines += _describe_segments(status)
    if status.silent_s is not None:
        lines.append(f"last {'sign of life' if has_signs else 'write'}: {_duration(status.silent_s)} ago")
    if isinstance(status, StartingStatus):
        state = "starting"
    else:
        state = f"{'finished' if status.is_finished else 'not finished'} ({kind})"
    return [f"state: {state}", *lines, *status.next_steps]


def _describe_segments(status: SegmentStatus) -> list[str]:
    about = "" if status.is_exact else "about "
    num_done = status.ok + status.failed + status.vanished
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in status.failed_by_reason.items())
    listing = "INPUT is not listed to its end" if status.is_running is False else "INPUT is still being listed"
    so_far = f" so far: {listing}" if status.is_listing else ""
    lines = [
        f"planned: {count(status.planned_images, 'image')} in {count(status.planned_parts, 'part')}{so_far}",
        f"done: {about}{count(num_done, 'image')} ({100 * num_done / max(1, status.planned_images):.1f} %), "
        f"{count(status.parts, 'part')}, {about}{count(status.rows, 'row')}",
        f"images: {about}{status.ok:,} ok, {about}{status.failed:,} failed{f' ({reasons})' if reasons else ''}, "
        f"{about}{status.vanished:,} vanished",
    ]
    lines += [f"warning: {status.warning}"] if status.warning else []
    if status.images_per_s and status.seconds_left is not None:
        scope = " for the images planned so far" if status.is_listing else ""
        lines.append(f"rate: {status.images_per_s:,.1f} images/s, {_duration(status.seconds_left)} left{scope}")
    return lines


def _describe_training(status: TrainingStatus) -> list[str]:
    lines = [f"epochs: {status.epochs} of {status.planned_epochs}"]
    if status.running is not None:
        lines.append(f"{'running' if status.is_running else 'not running any more'}: {status.running}")
    if status.best is not None:
        lines.append(f"best: {status.monitor} {status.best:.4f} of validation, epoch {status.best_epoch}")
    if status.seconds_per_epoch is not None and status.seconds_left is not None:
        kind = "left" if status.is_running else "of work left"
        left = f", {_duration(status.seconds_left)} {kind}" if not status.is_finished else ""
        lines.append(f"time: {_duration(status.seconds_per_epoch)} per epoch{left}")
    return lines


def _duration(seconds: float) -> str:
    if not abs(seconds) < _LONGEST_S:  # of a damaged file; also NaN
        return "an unknown time"
    return str(datetime.timedelta(seconds=round(seconds)))
