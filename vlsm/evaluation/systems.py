"""Systems to compare: checkpoints, ensembles and existing masks, each with its records and their prompts."""

import hashlib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlsm import storage
from vlsm.checkpoints import digest_files, parse_settings
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.splits import GIVE
from vlsm.errors import ConfigError, ResultError
from vlsm.evaluation.groups import check_groups
from vlsm.evaluation.matching import match_images
from vlsm.evaluation.places import allow_images
from vlsm.evaluation.prompts import match_texts, needs_stored, report_stored, texts_of
from vlsm.evaluation.reviewed import leave_out_rejected
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.runs.carried import carried_names
from vlsm.runs.facts import checkpoint_fact
from vlsm.runs.lifecycle import resolve_settings
from vlsm.runs.plan import plan_of
from vlsm.runs.record import read_record, read_segment_summary
from vlsm.runs.results import open_results
from vlsm.shown import hide_secrets_in, public_uri
from vlsm.training.missing import require_complete
from vlsm.training.origin import count_known, describe_differences_to_training
from vlsm.training.sampling import find_prompt
from vlsm.words import count

logger = logging.getLogger("vlsm")


@dataclass(frozen=True)
class Target:
    """A record to score, and its prompts.

    Attributes:
        record: image and label.
        image_id: id of the image in the system's segment run, or None if the run does not have the image.
        texts: prompt texts by prompt name.
    """

    record: Record
    image_id: str | None
    texts: dict[str, str]


@dataclass(frozen=True)
class System:
    """A checkpoint, an ensemble or existing masks to score.

    Attributes:
        name: name of the system in the tables.
        output: OUTPUT of the segment run with the system's masks.
        segment: settings of that segment run, or None if the masks already exist (--masks).
        targets: one target per record.
        presence_threshold: presence, or else highest probability, from which an image counts as showing the finding;
            None: any foreground pixel counts.
        num_known: number of targets whose image a checkpoint of the system has learned from, as far as that is known.
    """

    name: str
    output: str
    segment: SegmentSettings | None
    targets: list[Target]
    presence_threshold: float | None = None
    num_known: int = 0

    @property
    def num_rows(self) -> int:
        """Number of planned rows of scores."""
        return sum(len(target.texts) for target in self.targets)


def name_systems(settings: EvaluateSettings) -> EvaluateSettings:
    """Return the settings with a named system for each checkpoint, and with a baseline.

    Raises:
        ConfigError: two systems have the same name, or the baseline is not a system.
    """
    systems = {name: (MemberSettings(checkpoint=uri),) for name, uri in _name_checkpoints(settings.checkpoints)}
    names = [*systems, *settings.systems, *settings.masks]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two systems have the name {repeated[0]!r}; give each system a different name")
    baseline = settings.baseline or names[0]
    if baseline not in names:
        raise ConfigError(f"baseline is {baseline!r}; it must be one of the systems: {', '.join(names)}")
    return settings.model_copy(update={"checkpoints": (), "systems": systems | settings.systems, "baseline": baseline})


def _name_checkpoints(uris: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield the name and the location of each checkpoint.

    The name is that of the checkpoint's folder. A folder with the name `checkpoint`, as training writes it, takes the
    name of its parent folder.
    """
    counts: Counter[str] = Counter()
    for uri in uris:
        parts = [part for part in storage.split_scheme(public_uri(uri))[1].split("/") if part] or ["checkpoint"]
        name = parts[-2] if parts[-1] == "checkpoint" and len(parts) > 1 else parts[-1]
        counts[name] += 1
        yield (name if counts[name] == 1 else f"{name}-{counts[name]}"), uri


def read_test_records(settings: EvaluateSettings) -> list[Record]:
    """Return the records to score, without repeated records; each has a `where` of its own in its dataset.

    Raises:
        ConfigError, ManifestError: a dataset cannot be read, or has no records in this split.
    """
    unique_records: dict[str, Record] = {}
    num_all, data = 0, settings.data.allowing(settings.run.allow).grouping(settings.columns_of_groups)
    by_name: dict[str, list[Record]] = {}
    for name, uri in settings.datasets.items():
        with storage.name_errors(f"dataset {name}", uri):
            by_name[name] = read_dataset(name, uri, data)
    data.refuse_unknown([*by_name, *(record.dataset for records in by_name.values() for record in records)])
    _require_complete(by_name, settings)
    for name, records in by_name.items():
        split_records = _choose_split(records, settings)
        if not split_records:
            splits = ", ".join(sorted({record.split for record in records})) or "none"
            raise ConfigError(f"dataset {name} has no records of split {settings.split}; it has {splits}")
        num_all += len(split_records)
        for record in split_records:
            stated = record.stated() | {"prompts": sorted(record.prompts.items())}
            key = repr([(key, value) for key, value in stated.items() if key not in ("where", "group", "further")])
            unique_records.setdefault(key, record)
    if num_repeated := num_all - len(unique_records):
        logger.info(
            "ignored, because another record has the same image, label and prompts: %s", count(num_repeated, "record")
        )
    return _name_records(list(unique_records.values()))


def _choose_split(records: Iterable[Record], settings: EvaluateSettings) -> list[Record]:
    return [record for record in records if settings.split in ("all", record.split)][: settings.limit]


def _require_complete(by_name: Mapping[str, Sequence[Record]], settings: EvaluateSettings) -> None:
    """Raise one error if records have no split, or if those to score lack a prompt."""
    scored = {id(record) for records in by_name.values() for record in _choose_split(records, settings)}

    def choose(record: Record) -> None:
        if id(record) in scored or (settings.split != "all" and not record.split):
            for prompt in settings.prompts:
                find_prompt(record, prompt, "", "prompts")

    advice = f"{GIVE}; --set split=all scores all records, also those that a model was trained on"
    records = [record for records in by_name.values() for record in records]
    require_complete(records, choose, None if settings.split == "all" else advice)


def _name_records(records: Sequence[Record]) -> list[Record]:
    """Return the records with a `where` that no other record of the dataset has, because scores name a record by it.

    One row of a list can give a record for each slice of a volume, and for each class of a mask.
    """
    shared = Counter((record.dataset, record.where) for record in records)
    named, numbers = [], Counter[tuple[str, str]]()
    for record in records:
        is_slice = shared[record.dataset, record.where] > 1 and record.image_selector is not None
        where = f"{record.where}, {record.image_selector}" if is_slice else record.where
        numbers[record.dataset, where] += 1
        number = numbers[record.dataset, where]
        named.append(replace(record, where=where if number == 1 else f"{where}, mask {number}"))
    return named


def plan_systems(settings: EvaluateSettings) -> tuple[list[System], dict[str, Any]]:
    """Return the systems to score, and the facts besides the settings that decide their scores.

    Args:
        settings: settings as `name_systems` returns them.

    Raises:
        VlsmError: a dataset, a checkpoint or a segment run cannot be used.
    """
    records, of_review = leave_out_rejected(read_test_records(settings), settings)
    systems, digests, checkpoints = [], {}, {}
    folders = _name_folders(settings.systems)
    image_ids, is_stored_used = _name_images(records), needs_stored(records, settings)
    for name, members in settings.systems.items():
        own_prompt, digests[name], checkpoints[name], presence = _read_members(name, members, settings, is_stored_used)
        report_stored(name, records, own_prompt, settings)
        for member in members:
            if sentence := describe_differences_to_training(member.checkpoint, settings.data, settings.prompts):
                logger.warning("%s", sentence)
        if num_known := count_known([member.checkpoint for member in members], records):
            of_all = f"{num_known:,} of the {len(records):,} images on which it is scored"
            logger.warning("system %s learned from %s, itself or by its members: its scores are too good", name, of_all)
        texts = texts_of(records, own_prompt, settings, with_robustness=True)
        _refuse_unknown_texts(name, members, {text for each in texts for text in each.values()})
        targets = [Target(*each) for each in zip(records, image_ids, texts, strict=True)]
        source = storage.join(settings.output, "inputs", f"{folders[name]}-{_digest_images(targets)}.parquet")
        output = storage.join(settings.output, "runs", folders[name])
        segment = settings.segment_settings(source, output, members, own_prompt)
        segment = allow_images(segment, records, settings.datasets.values())
        systems.append(System(name, output, segment, targets, settings.presence_threshold or presence, num_known))
    run_ids, of_runs = {}, set[str]()
    for name, uri in settings.masks.items():
        with storage.name_errors(f"masks {name}", uri):
            own_prompt, run_ids[name] = _check_masks(name, uri, is_stored_used)
            of_runs.update(carried_names(open_results(uri).schema) if settings.columns_of_groups else ())
            matched_ids, run_prompts = match_images(name, uri, records)
        report_stored(name, records, own_prompt, settings)
        texts = texts_of(records, own_prompt, settings, with_robustness=False)
        texts = match_texts(name, records, texts, run_prompts)
        targets = [Target(*each) for each in zip(records, matched_ids, texts, strict=True)]
        systems.append(System(name, uri, None, targets, settings.presence_threshold))
    check_groups(records, of_runs, settings)
    digest = hashlib.sha256(json.dumps([hide_secrets_in(record.stated()) for record in records]).encode()).hexdigest()
    return systems, {
        "checkpoint_digests": digests,
        "checkpoints": checkpoints,
        "mask_runs": run_ids,
        "records_digest": digest,
        "num_records": dict(Counter(record.dataset for record in records)),
        **of_review,
    }


def _read_members(
    name: str, members: tuple[MemberSettings, ...], settings: EvaluateSettings, is_stored_used: bool
) -> tuple[str, list[str], list[dict[str, Any]], float | None]:
    """Return the prompt stored in a system's checkpoints, their digests, their facts, and the threshold of presence.

    Only a single checkpoint has this threshold: the highest mean probability of several is another figure.
    """
    _, checkpoints = resolve_settings(settings.segment_settings("", "", members, ""))
    pairs = zip(checkpoints, members, strict=True)
    stored = [parse_settings(one.files, member.checkpoint) for one, member in pairs]
    prompts = list(dict.fromkeys(one.prompt for one in stored))
    calibration = stored[0].calibration if len(stored) == 1 else None
    presence = calibration.presence_threshold if calibration else None
    if len(prompts) > 1 and is_stored_used:
        raise ConfigError(
            f"system {name}: its checkpoints store different prompts, {', '.join(map(repr, prompts))}; choose one: "
            f"--set 'prompts=[text:{prompts[0]}]'"
        )
    return prompts[0], [digest_files(one.files) for one in checkpoints], list(map(checkpoint_fact, stored)), presence


def _check_masks(name: str, uri: str, is_stored_used: bool) -> tuple[str, str]:
    """Return the first prompt and the run_id of a finished segment run."""
    record = read_record(uri)
    if record is None or "run_id" not in record:
        raise ConfigError(f"masks {name}: there is no segment run in {uri!r}; give the OUTPUT of a segment run")
    plan = plan_of(record, uri)
    if read_segment_summary(uri, plan.num_images, plan.num_rows) is None:
        raise ConfigError(f"masks {name}: the segment run in {uri!r} is not finished; run it again")
    prompts = record["config"].get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ResultError(f"masks {name}: config.yaml of {uri!r} is damaged: its prompts are {prompts!r}")
    if len(prompts) > 1 and is_stored_used:
        raise ConfigError(
            f"masks {name}: the segment run has several prompts, {', '.join(map(repr, prompts))}; choose one: "
            f"--set 'prompts=[text:{prompts[0]}]'"
        )
    return prompts[0], record["run_id"]


def _refuse_unknown_texts(name: str, members: Sequence[MemberSettings], texts: set[str]) -> None:
    """Raise a ConfigError if a member's own texts stand for prompts that no record has."""
    for member in members:
        if unknown := [text for text in member.prompts if text not in texts]:
            known = ", ".join(map(repr, sorted(texts)[:10]))
            raise ConfigError(
                f"systems: {name}: prompts names {unknown[0]!r}, which is no prompt here; prompts are {known}"
            )


def _name_folders(names: Iterable[str]) -> dict[str, str]:
    """Return a readable folder name for each system; the names are also unique on disks that ignore case."""
    folders: dict[str, str] = {}
    for name in names:
        plain_name = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "system"
        used_names = {folder.lower() for folder in folders.values()}
        candidates = (
            plain_name if number == 1 else f"{plain_name}-{number}" for number in range(1, len(used_names) + 2)
        )
        folders[name] = next(folder for folder in candidates if folder.lower() not in used_names)
    return folders


def _name_images(records: Sequence[Record]) -> list[str]:
    """Return an image_id per record: the dataset's name, the path below its images' common folder, the selector."""
    uris = defaultdict(list)
    for record in records:
        uris[record.dataset].append(public_uri(record.image_uri))
    lengths = {dataset: os.path.commonprefix(image_uris).rfind("/") + 1 for dataset, image_uris in uris.items()}
    ids = [f"{record.dataset}/{public_uri(record.image_uri)[lengths[record.dataset] :]}" for record in records]
    selectors = [record.image_selector for record in records]
    return [id if selector is None else f"{id}#{selector}" for id, selector in zip(ids, selectors, strict=True)]


def list_images(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Return the rows of the manifest of a system's segment run: one per image, with all of its prompt texts."""
    texts: dict[tuple[str | None, str, str | None], dict[str, None]] = defaultdict(dict)
    for target in targets:
        image = target.image_id, target.record.image_uri, target.record.image_selector
        texts[image] |= dict.fromkeys(target.texts.values())
    rows = [
        {"image_id": image_id, "image_uri": image_uri, "selector": selector, "prompts": [*image_texts]}
        for (image_id, image_uri, selector), image_texts in texts.items()
    ]
    # without selectors the rows are as in earlier versions: their digest names the INPUT of an interrupted run
    return rows if any(row["selector"] for row in rows) else [_without_selector(row) for row in rows]


def _without_selector(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "selector"}


def _digest_images(targets: Iterable[Target]) -> str:
    """Return 8 hex digits for the manifest's file name. A segment run recognizes its INPUT by name, not by content."""
    return hashlib.sha256(json.dumps(hide_secrets_in(list_images(targets))).encode()).hexdigest()[:8]
