"""A segment run from its settings to its proof: what comes before and after the work, without a cluster.

OUTPUT/config.yaml       resolved settings, checkpoint digest, versions, what is planned
OUTPUT/manifest/         the plan itself
OUTPUT/masks/part-*      the result
OUTPUT/summary.json      written last: its presence means complete
"""

import itertools
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlsm import storage
from vlsm.archive.archive import Archive, open_archive
from vlsm.checkpoints import CheckpointSettings, digest_files, read_checkpoint, read_settings
from vlsm.config import ReviewSettings, SegmentSettings
from vlsm.errors import ConfigError, ResultError, VlsmError
from vlsm.images.formats import Look
from vlsm.images.preprocess import Square
from vlsm.runs.compare import RunState
from vlsm.runs.plan import Plan, list_plans, new_plan_id, remove_plan, write_plan
from vlsm.runs.planner import Planner
from vlsm.runs.record import (
    SUMMARY_NAME,
    create_record,
    describe_differences,
    forget_run,
    make_record,
    read_record,
    write_record,
)
from vlsm.runs.updates import update_plan

logger = logging.getLogger("vlsm")


@dataclass(frozen=True)
class Member:
    """A checkpoint of a run: its files by name, and the input of its model."""

    files: dict[str, bytes]
    square: Square


@dataclass(frozen=True)
class Run:
    """A planned run: resolved settings, each member's files and image size in pixels, how much there is to do.

    `run_id` is the same as long as OUTPUT is this run's: it signs the parts. While its plan is not complete, a planner
    is to go on with it.
    """

    settings: SegmentSettings
    members: tuple["Member", ...]
    plan: Plan
    run_id: str


def resolve_settings(settings: SegmentSettings) -> tuple[SegmentSettings, tuple[Member, ...]]:
    """The settings with the checkpoints' prompt and threshold where none were given, and the checkpoints.

    Raises:
        CheckpointError: there is no usable checkpoint.
        ConfigError: the members' prompts or thresholds differ, and none were given.
    """
    settings, checkpoints = _resolve(settings)
    return settings, _read_members(settings, checkpoints)


def _resolve(settings: SegmentSettings) -> tuple[SegmentSettings, list[CheckpointSettings]]:
    """The resolved settings and each member's checkpoint.yaml; no weights are read."""
    own: list[CheckpointSettings] = []
    for uri in (member.checkpoint for member in settings.members):
        with storage.name_errors("checkpoint", uri):
            own.append(read_settings(uri))
    resolved: dict[str, Any] = {}
    prompts = settings.prompts or tuple(settings.classes) or None
    for key, given in (("prompt", prompts), ("threshold", settings.threshold)):
        found = list(dict.fromkeys(getattr(checkpoint, key) for checkpoint in own))
        if key == "threshold" and all(checkpoint.calibration for checkpoint in own):  # each has one of its own
            weights = [member.weight for member in settings.members]
            found = [round(sum(w * c.threshold for w, c in zip(weights, own, strict=True)) / sum(weights), 4)]
        if given is None and len(found) > 1:
            raise ConfigError(
                f"the members have the {key}s {', '.join(map(repr, found))}: say which counts, --set "
                + (f"'prompts=[{found[0]}]'" if key == "prompt" else f"threshold={found[0]}")
            )
        resolved[key] = found[0]
    update = {
        "prompts": prompts or (resolved["prompt"],),
        "threshold": settings.threshold or resolved["threshold"],
        "review": _resolve_review(settings.review, own),
    }
    return settings.model_copy(update=update), own


def _read_members(settings: SegmentSettings, checkpoints: list[CheckpointSettings]) -> tuple[Member, ...]:
    members: list[Member] = []
    for member, checkpoint in zip(settings.members, checkpoints, strict=True):
        with storage.name_errors("checkpoint", member.checkpoint):
            members.append(Member(read_checkpoint(member.checkpoint), checkpoint.image.spec.square))
    return tuple(members)


def _resolve_review(review: ReviewSettings, checkpoints: list[CheckpointSettings]) -> ReviewSettings:
    """With what a single checkpoint's calibration tells; what holds for its confidence does not for an ensemble's."""
    calibration = checkpoints[0].calibration
    if len(checkpoints) > 1 or calibration is None:
        return review
    known = {"min_confidence": calibration.min_confidence, "area_fraction": calibration.area_fraction}
    return review.model_copy(update={key: value for key, value in known.items() if getattr(review, key) is None})


def open_input(settings: SegmentSettings, after: tuple[str, str | None] | None = None) -> Archive:
    """The archive of a run, found to hold one image at least, or what of it follows an image_uri and selector.

    Raises:
        ConfigError: INPUT does not exist, or holds no images.
    """
    with storage.name_errors("INPUT", settings.input):
        archive = open_archive(
            settings.input,
            settings.prompts or (),
            settings.output,
            settings.run.allow,
            after,
            Look(settings.slices, settings.tile),
        )
        if after is not None:
            return archive
        rows = iter(archive.rows)
        first = next(rows, None)
    if first is None:
        others = f", but {_describe_skipped(archive)}" if archive.skipped else ""
        raise ConfigError(f"INPUT {settings.input!r} holds no images{others}")
    archive.rows = itertools.chain([first], rows)
    return archive


def prepare_run(settings: SegmentSettings, begin: Callable[[], None] = lambda: None) -> Run:
    """Plan a run, or take it up again where OUTPUT already holds its plan; all that can be wrong is found here.

    Args:
        settings: of the run.
        begin: called where there is work to do, as soon as every path and setting is known to be right. The weights are
            read and the archive is planned after that, so that something slow, such as a cluster, starts meanwhile.

    Raises:
        ConfigError: a setting or a path is wrong, or OUTPUT belongs to a run with other settings.
        CheckpointError, ManifestError: the checkpoint or the manifest is of no use.
    """
    settings, checkpoints = _resolve(settings)
    output = settings.output
    with storage.name_errors("OUTPUT", output):
        record = None if settings.start_over else read_record(output)
        is_new = record is None
        archive = open_input(settings) if record is None else None
        if record is None or not (
            describe_differences(record, settings, {}) or storage.exists(storage.join(output, SUMMARY_NAME))
        ):
            begin()
        members = _read_members(settings, checkpoints)
        facts = {"checkpoint_digests": [digest_files(member.files) for member in members]}
        if record is None:
            record = _plan_run(settings, facts, archive or open_input(settings))
        if differences := describe_differences(record, settings, facts):
            raise ConfigError(
                f"OUTPUT {output!r} belongs to a run with other settings: {'; '.join(differences)}; "
                "choose another OUTPUT, or --set start_over=true to forget that run"
            )
        if settings.update and not is_new and record["plan"]["is_complete"]:
            record = _update_plan(settings, record)
    return Run(settings, members, Plan(**record["plan"]), record["run_id"])


def _plan_run(settings: SegmentSettings, facts: dict[str, Any], archive: Archive) -> dict[str, Any]:
    """The record of a new plan, or of the one that another job has made at the same time."""
    output = settings.output
    if settings.start_over:
        forget_run(output, folders=(("masks", "part-"), ("manifest", "plan-")))
    elif any(name.startswith("part-") for name in storage.list_names(storage.join(output, "masks"))):
        raise ConfigError(f"OUTPUT {output!r} holds masks of a run without config.yaml; choose another OUTPUT")
    if archive.is_listed:
        plan = Plan(new_plan_id(), is_complete=False, kinds=settings.kinds)
    else:  # it is quickly read, and what is wrong with it is to be said before anything is begun
        plan = write_plan(output, archive.rows, settings.shard_rows, settings.kinds)
    record = make_record(settings, {"run_id": uuid.uuid4().hex, **facts}, asdict(plan))
    others = list_plans(output) - {plan.id}
    if not create_record(output, record):
        remove_plan(output, plan.id)
        logger.info("another job has planned this run at the same time: its plan counts")
        return read_record(output) or record
    for plan_id in others:  # of jobs that died, or that are a moment late and will find this one
        remove_plan(output, plan_id)
    if plan.is_complete:
        _describe_plan(plan, archive)
    return record


def make_planner(run: Run) -> Planner:
    """What goes on with the incomplete plan of a run, and puts it into its record in the end."""
    settings = run.settings

    def save(plan: Plan, archive: Archive | None) -> None:
        record = read_record(settings.output)
        if record is None or record["plan"]["id"] != plan.id:
            raise ResultError(f"another job has planned {settings.output!r} anew meanwhile; run it again")
        write_record(settings.output, record | {"plan": asdict(plan)})
        _describe_plan(plan, archive or Archive(rows=()))

    return Planner(settings.output, run.plan, settings.shard_rows, lambda after: open_input(settings, after), save)


def _describe_plan(plan: Plan, archive: Archive) -> None:
    skipped = f"; passed over {_describe_skipped(archive)}" if archive.skipped else ""
    logger.info("planned %d images, %d rows%s", plan.num_images, plan.num_rows, skipped)


def _update_plan(settings: SegmentSettings, record: dict[str, Any]) -> dict[str, Any]:
    """The record with a plan of the archive as it is now; the same record where the archive is as it was."""
    output, before = settings.output, Plan(**record["plan"])
    archive = open_input(settings)
    plan, update = update_plan(output, before, archive.rows, settings.shard_rows)
    logger.info("since the last plan %d images are new, %d changed, %d vanished", *asdict(update).values())
    if not any(asdict(update).values()):
        remove_plan(output, plan.id)
        return record
    storage.remove(storage.join(output, SUMMARY_NAME))
    record = record | {"plan": asdict(plan)}
    write_record(output, record)
    remove_plan(output, before.id)
    return record


def check_failed_share(settings: SegmentSettings, num_images: int, num_failed: int, first_errors: list[str]) -> None:
    """Nothing, or a VlsmError where too large a share of the images failed, with some of their reasons."""
    if num_failed > settings.run.max_failed_fraction * num_images:
        raise VlsmError(
            f"{num_failed:,} of {num_images:,} images failed, more than run.max_failed_fraction "
            f"{settings.run.max_failed_fraction}: {'; '.join(first_errors) or 'see the rows with status failed'}; "
            "mend the cause and --set retry_failed=true (of archives, --set update=true as well), or allow more"
        )


def read_summary(output: str) -> dict[str, Any] | None:
    """The summary of a finished run, or None where it is not finished.

    Raises:
        ResultError: there is one that somebody has damaged.
    """
    uri = storage.join(output, SUMMARY_NAME)
    if not storage.exists(uri):
        return None
    try:
        return dict(json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError) as error:
        raise ResultError(f"{uri} is damaged; without it the same command counts all rows again: {error}") from error


def failed_by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """Of the counts of a run (`RunState.counts`): how many images failed for which reason."""
    return {key.partition(": ")[2]: counts[key] for key in sorted(counts) if key.startswith("failed: ")}


def finish_run(run: Run, state: RunState, num_before: int, seconds: float) -> dict[str, Any]:
    """Write summary.json and return it, if every planned row is there once.

    Args:
        run: the run.
        state: its parts as they are now, compared with the plan.
        num_before: images that were done when this run of the job began.
        seconds: how long it took.

    Raises:
        ResultError: the rows are not those planned, or another job has planned anew.
        VlsmError: too large a share of the images failed; all rows are there.
    """
    output, plan, counts = run.settings.output, run.plan, state.counts
    if state.pending or (state.num_done, counts["rows"]) != (plan.num_images, plan.num_rows):
        raise ResultError(
            f"{counts['rows']} rows of {state.num_done} images are there; planned were {plan.num_rows} of "
            f"{plan.num_images}; run it again"
        )
    if (record := read_record(output)) is None or record["plan"] != asdict(plan):
        raise ResultError(f"another job has planned {output!r} anew meanwhile; run it again")
    check_failed_share(run.settings, state.num_done, counts["failed"], [])
    summary = {
        "planned": plan.num_images,
        **{status: counts[status] for status in ("ok", "failed", "vanished")},
        "failed_by_reason": failed_by_reason(counts),
        "rows": counts["rows"],
        "parts": plan.num_shards,
        "done_before": num_before,
        "seconds": round(seconds, 1),
        "images_per_s": round((state.num_done - num_before) / seconds, 2),
    }
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary


def _describe_skipped(archive: Archive) -> str:
    return ", ".join(f"{count:,} {suffix}" for suffix, count in archive.skipped.most_common(5))
