"""What is compared: checkpoints, ensembles and masks that exist, each with its records and what it is told of them."""

import hashlib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlsm import storage
from vlsm.checkpoints import digest_files, parse_settings
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.errors import ConfigError
from vlsm.evaluation.matching import match_images
from vlsm.evaluation.prompts import texts_of
from vlsm.evaluation.settings import OWN, EvaluateSettings
from vlsm.runs.lifecycle import read_summary, resolve_settings
from vlsm.runs.record import read_record
from vlsm.training.datasets import Record, read_dataset

logger = logging.getLogger("vlsm")


@dataclass(frozen=True)
class Target:
    """A record that is scored, and what a system is told of it.

    Attributes:
        record: image and label.
        image_id: in the system's segment run; None where it has no such image.
        texts: by the name of the prompt.
    """

    record: Record
    image_id: str | None
    texts: dict[str, str]


@dataclass(frozen=True)
class System:
    """What is scored.

    Attributes:
        name: in the tables.
        output: of its segment run.
        segment: the settings of that run; None where it is done and somebody else's.
        targets: one for each record.
    """

    name: str
    output: str
    segment: SegmentSettings | None
    targets: list[Target]

    @property
    def num_rows(self) -> int:
        """Scores that are planned."""
        return sum(len(target.texts) for target in self.targets)


def name_systems(settings: EvaluateSettings) -> EvaluateSettings:
    """The settings with each checkpoint as a system of a name, and with a baseline.

    Raises:
        ConfigError: a name stands there twice, or the baseline is none of them.
    """
    systems = {name: (MemberSettings(checkpoint=uri),) for name, uri in _name_all(settings.checkpoints)}
    names = [*systems, *settings.systems, *settings.masks]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two systems are called {twice[0]!r}; each has a name of its own")
    baseline = settings.baseline or names[0]
    if baseline not in names:
        raise ConfigError(f"baseline is {baseline!r}; it must be one of the systems: {', '.join(names)}")
    return settings.model_copy(update={"checkpoints": (), "systems": systems | settings.systems, "baseline": baseline})


def _name_all(uris: Sequence[str]) -> Iterable[tuple[str, str]]:
    """A name for each checkpoint: its folder's, or its run's where training has called that just `checkpoint`."""
    seen: Counter[str] = Counter()
    for uri in uris:
        parts = [part for part in storage.split_scheme(uri)[1].split("/") if part] or ["checkpoint"]
        name = parts[-2] if parts[-1] == "checkpoint" and len(parts) > 1 else parts[-1]
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), uri


def read_records(settings: EvaluateSettings) -> list[Record]:
    """The records that are scored, each once.

    Raises:
        ConfigError, ManifestError: a dataset cannot be read, or has none in this split.
    """
    found: dict[tuple[str, ...], Record] = {}
    num_all = 0
    for name, uri in settings.datasets.items():
        with storage.name_errors(f"dataset {name}", uri):
            records = read_dataset(name, uri)
        own = [record for record in records if record.split == settings.split][: settings.limit]
        if not own:
            splits = ", ".join(sorted({record.split for record in records})) or "none"
            raise ConfigError(f"dataset {name} has no records of split {settings.split}; it has {splits}")
        num_all += len(own)
        for record in own:
            key = (record.dataset, record.image_uri, record.mask_uri, repr(sorted(record.prompts.items())))
            found.setdefault(key, record)
    if num_all > len(found):
        logger.info("%d records repeat an image with its label and prompts: each counts once", num_all - len(found))
    return list(found.values())


def plan_systems(settings: EvaluateSettings) -> tuple[list[System], dict[str, Any]]:
    """The systems of settings from `name_systems`, and what decides their scores beside the settings.

    Raises:
        VlsmError: a dataset, a checkpoint or a segment run is of no use.
    """
    records = read_records(settings)
    systems, digests = [], {}
    folders = _name_folders(settings.systems)
    image_ids = _name_images(records)
    for name, members in settings.systems.items():
        own, digests[name] = _read_members(name, members, settings)
        texts = texts_of(records, own, settings, with_robustness=True)
        targets = [Target(*each) for each in zip(records, image_ids, texts, strict=True)]
        source = storage.join(settings.output, "inputs", f"{folders[name]}-{_digest_images(targets)}.parquet")
        output = storage.join(settings.output, "runs", folders[name])
        segment = _allow_images(settings.segment_settings(source, output, members, own), records)
        systems.append(System(name, output, segment, targets))
    run_ids = {}
    for name, uri in settings.masks.items():
        with storage.name_errors(f"masks {name}", uri):
            own, run_ids[name] = _check_masks(name, uri, settings)
            matched = match_images(name, uri, records)
        texts = texts_of(records, own, settings, with_robustness=False)
        systems.append(System(name, uri, None, [Target(*each) for each in zip(records, matched, texts, strict=True)]))
    digest = hashlib.sha256(json.dumps([asdict(record) for record in records]).encode()).hexdigest()
    return systems, {"checkpoint_digests": digests, "mask_runs": run_ids, "records_digest": digest}


def _read_members(name: str, members: tuple[MemberSettings, ...], settings: EvaluateSettings) -> tuple[str, list[str]]:
    """A system's own prompt, and the digests of its checkpoints."""
    _, found = resolve_settings(settings.segment_settings("", "", members, ""))
    pairs = zip(found, members, strict=True)
    owns = list(dict.fromkeys(parse_settings(one.files, member.checkpoint).prompt for one, member in pairs))
    if len(owns) > 1 and OWN in settings.prompts:
        raise ConfigError(
            f"system {name}: its members' own prompts are {', '.join(map(repr, owns))}; say which counts, "
            f"--set 'prompts=[text:{owns[0]}]'"
        )
    return owns[0], [digest_files(one.files) for one in found]


def _allow_images(segment: SegmentSettings, records: Sequence[Record]) -> SegmentSettings:
    """The settings of a segment run that may read the images of its list though they lie in another store.

    Lists in object stores may not, since anybody may have put them there; this one is the evaluation's own.
    """
    folders = sorted({record.image_uri.rsplit("/", 1)[0] for record in records})
    run = segment.run.model_copy(update={"allow": (*segment.run.allow, *folders)})
    is_local = storage.split_scheme(segment.input)[0] in ("file", "local")
    return segment if is_local else segment.model_copy(update={"run": run})


def _check_masks(name: str, uri: str, settings: EvaluateSettings) -> tuple[str, str]:
    """The prompt and the id of a finished segment run."""
    record = read_record(uri)
    if record is None or "run_id" not in record:
        raise ConfigError(f"masks {name}: there is no segment run in {uri!r}; it must be the OUTPUT of one")
    if read_summary(uri) is None:
        raise ConfigError(f"masks {name}: the segment run in {uri!r} is not finished; run it again")
    prompts = record["config"]["prompts"]
    if len(prompts) > 1 and OWN in settings.prompts:
        raise ConfigError(
            f"masks {name}: the run has the prompts {', '.join(map(repr, prompts))}; say which counts, "
            f"--set 'prompts=[text:{prompts[0]}]'"
        )
    return prompts[0], record["run_id"]


def _name_folders(names: Iterable[str]) -> dict[str, str]:
    """A readable name of a folder for each system, that no other has even where a disk takes A and a for the same."""
    folders: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "system"
        taken = {folder.lower() for folder in folders.values()}
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(taken) + 2))
        folders[name] = next(folder for folder in numbered if folder.lower() not in taken)
    return folders


def _name_images(records: Sequence[Record]) -> list[str]:
    """Of each record the image_id of its image: its dataset, and its path below the folder that all of that have."""
    uris = defaultdict(list)
    for record in records:
        uris[record.dataset].append(record.image_uri)
    lengths = {dataset: os.path.commonprefix(own).rfind("/") + 1 for dataset, own in uris.items()}
    return [f"{record.dataset}/{record.image_uri[lengths[record.dataset] :]}" for record in records]


def list_images(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """The images of a system as the rows of a list for its segment run: each once, with all texts that it is told."""
    texts: dict[tuple[str | None, str], dict[str, None]] = defaultdict(dict)
    for target in targets:
        texts[target.image_id, target.record.image_uri] |= dict.fromkeys(target.texts.values())
    return [{"image_id": key[0], "image_uri": key[1], "prompts": [*own]} for key, own in texts.items()]


def _digest_images(targets: Iterable[Target]) -> str:
    """So that a list of other images or texts has another name: a segment run tells its INPUT by that."""
    return hashlib.sha256(json.dumps(list_images(targets)).encode()).hexdigest()[:8]
