"""Prepares a segment run before the work on its images, and proves it complete after the work. It needs no cluster.

OUTPUT/config.yaml       resolved settings, checkpoint digests, versions, the size of the plan
OUTPUT/manifest/         the plan
OUTPUT/masks/part-*      the masks
OUTPUT/summary.json      written last: a run that has it is complete
"""

import itertools
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlsm import storage
from vlsm.archive.archive import Archive, open_archive
from vlsm.archive.carried import Carry
from vlsm.checkpoints import CheckpointSettings, check_files, digest_files, read_checkpoint, read_settings
from vlsm.commands import call
from vlsm.config import ReviewSettings, SegmentSettings
from vlsm.errors import ConfigError, ResultError, VlsmError
from vlsm.events import event
from vlsm.images.formats import Look
from vlsm.images.grey_levels import STORED
from vlsm.images.preprocess import Square
from vlsm.runs.carried import RESERVED
from vlsm.runs.compare import RunState, failed_by_reason, images_by_rule
from vlsm.runs.extremes import EMPTY, MASKS, WHOLE_IMAGE
from vlsm.runs.facts import checkpoint_fact
from vlsm.runs.links import check_links
from vlsm.runs.plan import Plan, list_plans, new_plan_id, plan_of, remove_plan, write_plan
from vlsm.runs.planner import Planner
from vlsm.runs.record import (
    SUMMARY_NAME,
    create_record,
    describe_differences,
    forget_run,
    make_record,
    read_record,
    settings_of,
    write_record,
)
from vlsm.runs.updates import update_plan
from vlsm.segmentation.blind import check_prompts, watch_prompts
from vlsm.segmentation.embeddings import check_embedding
from vlsm.words import count

logger = logging.getLogger("vlsm")


@dataclass(frozen=True)
class Member:
    """A checkpoint of a run: the content of its files by name, and of its checkpoint.yaml."""

    files: dict[str, bytes]
    settings: CheckpointSettings

    @property
    def square(self) -> Square:
        """The input square of its model."""
        return self.settings.image.spec.square


@dataclass(frozen=True)
class Run:
    """A planned run.

    Attributes:
        settings: resolved settings.
        members: the checkpoints, one or an ensemble.
        plan: the size of the plan. If it is not complete, `make_planner` continues it.
        run_id: marks the parts of this run. It changes only if OUTPUT is started over.
    """

    settings: SegmentSettings
    members: tuple[Member, ...]
    plan: Plan
    run_id: str


def resolve_settings(settings: SegmentSettings) -> tuple[SegmentSettings, tuple[Member, ...]]:
    """Return the settings and the checkpoints; the checkpoints decide the prompt and threshold that are not set.

    Raises:
        CheckpointError: a checkpoint is missing or cannot be used.
        ConfigError: the prompt or threshold is not set, and the members have different ones; or no member reads the
            text of several prompts.
    """
    settings, checkpoints = _resolve(settings)
    check_prompts(settings, checkpoints)
    check_embedding(settings, checkpoints)
    return settings, _read_members(settings, checkpoints)


def _resolve(settings: SegmentSettings) -> tuple[SegmentSettings, list[CheckpointSettings]]:
    """Return the resolved settings and the checkpoint.yaml of each member; read no weights."""
    checkpoints: list[CheckpointSettings] = []
    for uri in (member.checkpoint for member in settings.members):
        with storage.name_errors("checkpoint", uri):
            checkpoints.append(read_settings(uri))
    resolved: dict[str, Any] = {}
    prompts = settings.prompts or tuple(settings.classes) or None
    for key, given in (("prompt", prompts), ("threshold", settings.threshold)):
        values = list(dict.fromkeys(getattr(checkpoint, key) for checkpoint in checkpoints))
        if key == "threshold" and all(checkpoint.calibration for checkpoint in checkpoints):
            # thresholds of calibrated members are expected to differ: take their weighted mean
            weights = [member.weight for member in settings.members]
            total = sum(weight * c.threshold for weight, c in zip(weights, checkpoints, strict=True))
            values = [round(total / sum(weights), 4)]
        if given is None and len(values) > 1:
            raise ConfigError(
                f"the members have different {key}s: {', '.join(map(repr, values))}; choose one, --set "
                + (f"'prompts=[{values[0]}]'" if key == "prompt" else f"threshold={values[0]}")
            )
        resolved[key] = values[0]
    update = {
        "prompts": prompts or (resolved["prompt"],),
        "threshold": settings.threshold or resolved["threshold"],
        "review": _resolve_review(settings.review, checkpoints),
    }
    return settings.model_copy(update=update), checkpoints


def _resolve_review(review: ReviewSettings, checkpoints: list[CheckpointSettings]) -> ReviewSettings:
    """Return the review settings; the calibration of a single checkpoint decides the values that are not set."""
    calibration = checkpoints[0].calibration
    if len(checkpoints) > 1 or calibration is None:  # one model's limits do not fit the confidence of an ensemble
        return review
    known = {"min_confidence": calibration.min_confidence, "area_fraction": calibration.area_fraction}
    return review.model_copy(update={key: value for key, value in known.items() if getattr(review, key) is None})


def _read_members(settings: SegmentSettings, checkpoints: list[CheckpointSettings]) -> tuple[Member, ...]:
    members: list[Member] = []
    for member, checkpoint in zip(settings.members, checkpoints, strict=True):
        with storage.name_errors("checkpoint", member.checkpoint):
            files = read_checkpoint(member.checkpoint)
            check_files(files, member.checkpoint)
            members.append(Member(files, checkpoint))
    return tuple(members)


def open_input(
    settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings], after: tuple[str, str | None] | None = None
) -> Archive:
    """Return the archive of a run, which has at least one image.

    Args:
        settings: resolved settings of the run.
        checkpoints: the checkpoint.yaml of each member; `vlsm.segmentation.blind` has a rule for the prompts of a list.
        after: image_uri and selector of an image; return only the images after it, of which there may be none.

    Raises:
        ConfigError: INPUT does not exist, or holds no images, or a list has prompts that the rule forbids.
    """
    with storage.name_errors("INPUT", settings.input):
        archive = open_archive(
            settings.input,
            settings.prompts or (),
            settings.output,
            settings.run.allow,
            after,
            Look(settings.slices, settings.tile, settings.fields, settings.columns, settings.frames),
            Carry("all" if settings.carry is None else settings.carry, RESERVED),
        )
        archive.rows = watch_prompts(archive.rows, settings, checkpoints, may_stop=not archive.is_listed)
        if after is not None:
            return archive
        rows = iter(archive.rows)
        first = next(rows, None)
    if first is None:
        others = f", but {_describe_skipped(archive)}" if archive.skipped else ""
        raise ConfigError(f"INPUT {settings.input!r} holds no images{others}")
    archive.rows = itertools.chain([first], rows)
    return archive


def _describe_skipped(archive: Archive) -> str:
    return ", ".join(f"{count:,} {suffix}" for suffix, count in archive.skipped.most_common(5))


def prepare_run(
    settings: SegmentSettings, begin: Callable[[], None] = lambda: None, announce: Callable[[], None] = lambda: None
) -> Run:
    """Check all inputs, and return a new run, or the run that OUTPUT already has.

    Args:
        settings: settings of the run.
        begin: called if there is work to do, once all paths and settings are checked. The weights are read and the
            archive is planned afterwards. A slow start, such as a cluster's, can run in parallel.
        announce: called before anything is written to OUTPUT.

    Raises:
        ConfigError: a setting or a path is wrong, or OUTPUT belongs to a run with other settings.
        CheckpointError, ManifestError: the checkpoint or the manifest cannot be used.
    """
    if storage.absolute(settings.input) == storage.absolute(settings.output):
        raise ConfigError(f"OUTPUT {settings.output!r} is INPUT; choose another OUTPUT")
    settings, checkpoints = _resolve(settings)
    output = settings.output
    with storage.name_errors("OUTPUT", output):
        check_links(output)
        record = None if settings.start_over else read_record(output)
        is_new = record is None
        settings = _resolve_carry(settings, record)
        if record is None:
            check_prompts(settings, checkpoints)
            check_embedding(settings, checkpoints)
            storage.check_writable(output)
        archive = open_input(settings, checkpoints) if record is None else None
        if record is None or not describe_differences(record, settings, {}):
            _start_work(settings, record, begin, announce)
        members = _read_members(settings, checkpoints)
        facts = {
            "checkpoint_digests": [digest_files(member.files) for member in members],
            "checkpoints": list(map(checkpoint_fact, checkpoints)),
        }
        if record is None:
            _tell_calibration(settings, checkpoints)
            record = _plan_run(settings, facts, archive or open_input(settings, checkpoints))
        if differences := describe_differences(record, settings, facts):
            raise ConfigError(
                f"OUTPUT {output!r} belongs to a run with other settings: {'; '.join(differences)}; "
                "choose another OUTPUT, or --set start_over=true to forget that run"
            )
        if settings.update and not is_new and plan_of(record, output).is_complete:
            record = _update_run(settings, checkpoints, record)
    return Run(settings, members, plan_of(record, output), record["run_id"])


def _resolve_carry(settings: SegmentSettings, record: dict[str, Any] | None) -> SegmentSettings:
    """Return the settings with `carry`, if it is not set: all in a new run, else as in the run that OUTPUT has.

    Runs of earlier versions carry nothing, until a command with `update` and `carry` says otherwise.

    Raises:
        ConfigError: the run has other columns, and the command does not update it.
    """
    if record is None:
        return settings if settings.carry is not None else settings.model_copy(update={"carry": "all"})
    before = settings_of(settings.model_dump() | {"carry": record["config"].get("carry", ())}, SegmentSettings).carry
    if settings.carry not in (None, before) and not settings.update:
        raise ConfigError(
            f"OUTPUT {settings.output!r} belongs to a run with carry {_show_carry(before)}, now it is "
            f"{_show_carry(settings.carry)}; --set update=true gives its rows these columns, without segmenting again"
        )
    return settings if settings.carry is not None else settings.model_copy(update={"carry": before})


def _show_carry(carry: str | tuple[str, ...] | None) -> str:
    return carry if isinstance(carry, str) else f"[{', '.join(carry or ())}]"


def _start_work(
    settings: SegmentSettings,
    record: dict[str, Any] | None,
    begin: Callable[[], None],
    announce: Callable[[], None],
) -> None:
    """Call what `prepare_run` calls if there is work to do."""
    is_finished = record is not None and storage.exists(storage.join(settings.output, SUMMARY_NAME))
    if not is_finished:
        begin()
    if not is_finished or settings.update:
        announce()


def _tell_calibration(settings: SegmentSettings, checkpoints: list[CheckpointSettings]) -> None:
    pairs = zip(settings.members, checkpoints, strict=True)
    if bare := [member.checkpoint for member, checkpoint in pairs if checkpoint.calibration is None]:
        text = "%s: not calibrated, so `confidence` says how sure the model is, not how good a mask is; see %s"
        logger.info(text, ", ".join(bare), call("vlsm.calibration"))


def _plan_run(settings: SegmentSettings, facts: dict[str, Any], archive: Archive) -> dict[str, Any]:
    """Plan a new run and return its record, or another job's record if that job has planned it at the same time."""
    output = settings.output
    if settings.start_over:
        forget_run(output, folders=(("masks", "part-"), ("manifest", "plan-")))
    elif any(name.startswith("part-") for name in storage.list_names(storage.join(output, "masks"))):
        raise ConfigError(f"OUTPUT {output!r} holds masks but no config.yaml; choose another OUTPUT")
    if archive.is_listed:
        plan = Plan(new_plan_id(), is_complete=False, kinds=settings.kinds)
    else:  # a manifest is read quickly, and its errors must be reported before any work starts
        plan = write_plan(output, archive.rows, settings.shard_rows, settings.kinds, archive.carried)
    record = make_record(settings, {"run_id": uuid.uuid4().hex, **facts}, asdict(plan))
    others = list_plans(output) - {plan.id}
    if not create_record(output, record):
        remove_plan(output, plan.id)
        logger.info("another job has planned this run at the same time: its plan is used")
        return read_record(output) or record
    for plan_id in others:  # plans of dead jobs, or of slower jobs, which will use this plan
        remove_plan(output, plan_id)
    if plan.is_complete:
        _describe_plan(plan, archive)
    return record


def _describe_plan(plan: Plan, archive: Archive) -> None:
    skipped = f"; skipped {_describe_skipped(archive)}" if archive.skipped else ""
    planned = event("planned", images=plan.num_images, rows=plan.num_rows)
    logger.info(
        "planned %s, %s%s", count(plan.num_images, "image"), count(plan.num_rows, "row"), skipped, extra=planned
    )


def _update_run(
    settings: SegmentSettings, checkpoints: Sequence[CheckpointSettings], record: dict[str, Any]
) -> dict[str, Any]:
    """Plan the archive again and return the new record, or the same record if the archive has not changed."""
    output, before = settings.output, plan_of(record, settings.output)
    archive = open_input(settings, checkpoints)
    if before.carried and archive.is_listed and settings.carry:
        raise ConfigError(
            f"the images of {output!r} have the columns {', '.join(list(before.carried)[:20])}, but INPUT "
            f"{settings.input!r} is no list any more, and no folder of Parquet files alone; carry=[] drops the columns"
        )
    plan, update = update_plan(output, before, archive.rows, settings.shard_rows, archive.carried)
    *counts, num_renewed, num_relisted = asdict(update).values()
    logger.info("images since the last plan: %d new, %d changed, %d vanished", *counts)
    if num_renewed:
        logger.info("another signature of %s: the plan has it now", count(num_renewed, "image"))
    if num_relisted:
        logger.info("other columns of the list for %s: their rows get them", count(num_relisted, "image"))
    if not any(asdict(update).values()):
        remove_plan(output, plan.id)
        return record
    storage.remove(storage.join(output, SUMMARY_NAME))
    config = record["config"] | {"carry": settings.model_dump(mode="json")["carry"]}
    record = record | {"config": config, "plan": asdict(plan)}
    write_record(output, record)
    remove_plan(output, before.id)
    return record


def make_planner(run: Run) -> Planner:
    """Return a planner that continues the incomplete plan of a run, and writes the complete plan into its record."""
    settings = run.settings

    def save(plan: Plan, archive: Archive | None) -> None:
        record = read_record(settings.output)
        if record is None or record["plan"].get("id") != plan.id:
            raise ResultError(
                f"another job has planned {settings.output!r} again in the meantime; run the command again"
            )
        write_record(settings.output, record | {"plan": asdict(plan)})
        _describe_plan(plan, archive or Archive(rows=()))

    def open_after(after: tuple[str, str | None] | None) -> Archive:
        # what is listed while the run works has no further columns
        return open_input(settings.model_copy(update={"carry": ()}), [member.settings for member in run.members], after)

    return Planner(settings.output, run.plan, settings.shard_rows, open_after, save)


def finish_run(run: Run, state: RunState, num_before: int, seconds: float) -> dict[str, Any]:
    """Check that every planned row is written once, then write summary.json and return it.

    Args:
        run: the run.
        state: the comparison of all its parts with the plan.
        num_before: number of images that were done before this job.
        seconds: duration of this job.

    Raises:
        ResultError: the rows differ from the planned rows, or another job has planned the run again.
        VlsmError: all rows are written, but the fraction of failed images is too large.
    """
    output, plan, counts = run.settings.output, run.plan, state.counts
    if state.pending or (state.num_done, counts["rows"]) != (plan.num_images, plan.num_rows):
        raise ResultError(
            f"{output!r} has {counts['rows']} rows of {state.num_done} images; it must have {plan.num_rows} rows of "
            f"{plan.num_images} images; run the command again"
        )
    if (record := read_record(output)) is None or plan_of(record, output) != plan:
        raise ResultError(f"another job has planned {output!r} again in the meantime; run the command again")
    check_failed_share(run.settings, state.num_done, counts["failed"], [])
    summary = {
        "planned": plan.num_images,
        **{status: counts[status] for status in ("ok", "failed", "vanished")},
        "failed_by_reason": failed_by_reason(counts),
        "grey_levels": images_by_rule(counts),
        "rows": counts["rows"],
        **{key: counts[key] for key in (MASKS, EMPTY, WHOLE_IMAGE)},
        "parts": plan.num_shards,
        "done_before": num_before,
        "seconds": round(seconds, 1),
        "images_per_s": round((state.num_done - num_before) / seconds, 2),
    }
    if rules := {rule: number for rule, number in images_by_rule(counts).items() if rule != STORED}:
        logger.info(
            "deep grey values became 8 bits by these rules: %s; vlsm/README.md explains them, and the setting "
            "`window` replaces them",
            ", ".join(f"{rule} ({count(number, 'image')})" for rule, number in rules.items()),
        )
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary


def check_failed_share(settings: SegmentSettings, num_images: int, num_failed: int, first_errors: list[str]) -> None:
    """Raise a VlsmError with some reasons if the fraction of failed images is above `run.max_failed_fraction`."""
    if num_failed > settings.run.max_failed_fraction * num_images:
        raise VlsmError(
            f"{num_failed:,} of {count(num_images, 'image')} failed, more than run.max_failed_fraction "
            f"{settings.run.max_failed_fraction}: {'; '.join(first_errors) or 'see the rows with status failed'}; "
            "repair the cause and --set retry_failed=true (for a repaired tar or zip file, --set update=true as well), "
            "or set a higher run.max_failed_fraction"
        )
