"""Reads and writes config.yaml, the record of a run: settings, checkpoint or data, software versions and the plan.

It is written before any work on the images starts. A rerun reads it and continues with the same plan. summary.json is
written last, so a run that has it is finished.
"""

import datetime
import math
import os
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlsm import storage
from vlsm.config import Settings, SettingsT, dump_yaml, explain, flatten
from vlsm.documents import read_json, read_yaml
from vlsm.errors import ConfigError, ResultError
from vlsm.runs.extremes import EMPTY, MASKS, WHOLE_IMAGE
from vlsm.runs.facts import DESCRIPTIVE, describe_fact
from vlsm.shown import hide_secrets_in
from vlsm.version import FORMAT, __version__, newer_format

RECORD_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
ACTIONS = {"start_over", "retry_failed", "update"}  # settings of one command, not of the run
_ADVICE = "remove it, and the same command writes it again"
_LONGEST_VALUE = 200  # letters of a value in a message
_POOL_KEYS = ("actors", "_per_actor")
_PACKAGES = (
    "ray torch torchvision transformers pillow simplejpeg cykooz-resizer pyarrow fsspec s3fs obstore scipy".split()
)


def make_record(settings: Settings, facts: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.yaml.

    Args:
        settings: resolved settings, with the values that a checkpoint would decide.
        facts: other values that decide the results, such as a checkpoint's digest.
        plan: the size of the plan.
    """
    return {
        "format": FORMAT,
        "config": settings.model_dump(mode="json", exclude=ACTIONS),
        **facts,
        "plan": plan,
        "versions": {"vlsm": __version__} | {package: _version(package) for package in _PACKAGES},
        "git_revision": _git_revision(),
        "planned_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def create_record(output: str, record: dict[str, Any]) -> bool:
    """Write config.yaml if there is none. Returns whether this call has written it; of several jobs, only one does."""
    return storage.create_bytes(storage.join(output, RECORD_NAME), _dump(record))


def write_record(output: str, record: dict[str, Any]) -> None:
    """Write config.yaml into the output folder, or replace it."""
    storage.write_bytes(storage.join(output, RECORD_NAME), _dump(record))


def _dump(record: dict[str, Any]) -> bytes:
    """Return a record as YAML, without passwords and signatures of locations: each command gives them again."""
    return dump_yaml(hide_secrets_in(record)).encode()


def read_record(output: str) -> dict[str, Any] | None:
    """Return the content of config.yaml, or None if there is no planned run.

    Raises:
        ConfigError: config.yaml is not the record of a run, or a newer version has written it.
    """
    uri = storage.join(output, RECORD_NAME)
    if not storage.exists(uri):
        return None
    try:
        record = read_yaml(uri, uri, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{error}; it is not the record of a run: choose another OUTPUT") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("config", "plan")):
        raise ConfigError(f"{uri} is not the record of a run; choose another OUTPUT")
    if message := newer_format(record.get("format"), uri):
        raise ConfigError(message)
    return record


def read_summary(output: str) -> dict[str, Any] | None:
    """Return the content of summary.json, or None if the run is not finished.

    Raises:
        ResultError: summary.json is damaged.
    """
    uri = storage.join(output, SUMMARY_NAME)
    if not storage.exists(uri):
        return None
    try:
        return dict(read_json(uri, uri, ResultError))
    except (ResultError, ValueError, TypeError) as error:
        raise ResultError(f"{uri} is damaged: {error}; {_ADVICE}") from error


def read_segment_summary(output: str, num_images: int, num_rows: int) -> dict[str, Any] | None:
    """Return the content of summary.json of a segment run, or None if the run is not finished.

    Args:
        output: OUTPUT of the run.
        num_images: number of images in its plan.
        num_rows: number of rows in its plan.

    Raises:
        ResultError: it is damaged, or claims more than the plan.
    """
    if (summary := read_summary(output)) is None:
        return None
    uri = storage.join(output, SUMMARY_NAME)
    counts: list[Any] = [summary.get(key) for key in ("ok", "failed", "vanished", "rows")]
    reasons = summary.get("failed_by_reason")
    more = [summary.get(key, 0) for key in (MASKS, EMPTY, WHOLE_IMAGE)]  # absent in those of earlier versions
    numbers = [*counts, *more, *(reasons.values() if isinstance(reasons, dict) else [None])]
    rates = [summary.get(key, 0) for key in ("seconds", "images_per_s")]
    if not all(type(number) is int and number >= 0 for number in numbers) or not all(map(_is_finite, rates)):
        raise ResultError(f"{uri} is damaged: its numbers are no counts; {_ADVICE}")
    if sum(counts[:3]) > num_images or counts[3] > num_rows:
        raise ResultError(
            f"{uri} is damaged: it claims {sum(counts[:3]):,} images and {counts[3]:,} rows, but the plan has "
            f"{num_images:,} and {num_rows:,}; {_ADVICE}"
        )
    return summary


def _is_finite(number: object) -> bool:
    return type(number) in (int, float) and math.isfinite(number)  # type: ignore[arg-type]


def settings_of(tree: dict[str, Any], settings: type[SettingsT]) -> SettingsT:
    """Return recorded settings, checked.

    Raises:
        ResultError: config.yaml is damaged, so that these are no settings.
    """
    try:
        return settings.model_validate(tree)
    except ValidationError as error:
        raise ResultError(f"config.yaml is damaged: {explain(error, settings)[:500]}") from error


def describe_differences(record: dict[str, Any], settings: Settings, facts: dict[str, Any]) -> list[str]:
    """Return the differences between a recorded run and a new command that would change the results.

    Settings under `run` may differ. A checkpoint may move: its content is compared, not its location. If an earlier
    version did not record a setting, the setting's default is compared. A fact that it did not record is not compared.
    Passwords and signatures of locations are not compared.

    Args:
        record: the record of the run.
        settings: settings of the new command, as for `make_record`.
        facts: facts of the new command, as for `make_record`.

    Returns:
        A phrase for each difference.
    """
    trees = _with_defaults(record["config"], type(settings)), settings.model_dump(mode="json", exclude=ACTIONS)
    before, now = (flatten(_deciding(hide_secrets_in(tree))) for tree in trees)
    phrases = [
        _describe_values(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    for key, value in facts.items():
        if key in record.keys() - DESCRIPTIVE and record[key] != value:
            phrases += describe_fact(key, record, trees[1], facts, _describe_values(key, record[key], value))
    return phrases


def _describe_values(key: object, before: object, now: object) -> str:
    return f"{key!s:.80} (there {_brief(before)}, now {_brief(now)})"


def _brief(value: object) -> str:
    text = repr(value)  # a record of other people may hold megabytes
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _with_defaults(tree: dict[str, Any], settings: type[Settings]) -> dict[str, Any]:
    """Return recorded settings with the defaults of absent settings, or unchanged if they are no longer valid."""
    try:
        return settings.model_validate(tree).model_dump(mode="json", exclude=ACTIONS)
    except ValidationError:
        return tree


def _deciding(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded settings that decide the results."""
    # allow_equal_masks only allows a run; vlsm.runs.lifecycle has a rule for carry
    others = ("run", "output", "members", "systems", "allow_equal_masks", "carry")
    deciding = {key: value for key, value in tree.items() if key not in others}
    deciding |= {key: _without_run(deciding[key]) for key in ("train", "evaluate") if key in deciding}  # of a sweep
    if isinstance(models := deciding.get("models"), dict):
        deciding["models"] = {name: _without_run(model) for name, model in models.items()}
    systems, members = tree.get("systems"), _deciding_members(tree.get("members"))
    groups = {name: _deciding_members(each) for name, each in systems.items()} if isinstance(systems, dict) else systems
    return deciding | ({"members": members} if members else {}) | ({"systems": groups} if groups else {})


def _without_run(settings: Any) -> Any:
    """Return the settings of one job of a sweep without `run`."""
    return {key: value for key, value in settings.items() if key != "run"} if isinstance(settings, dict) else settings


def _deciding_members(members: Any) -> Any:
    """Return the settings of members that decide the results. A damaged record may have something else there."""
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        return members
    return [
        {key: value for key, value in member.items() if key != "checkpoint" and not str(key).endswith(_POOL_KEYS)}
        for member in members
    ]


def forget_run(output: str, names: Iterable[str] = (), folders: Iterable[tuple[str, str]] = ()) -> None:
    """Remove the files of an earlier run from an output folder, the record first. All other files stay.

    Args:
        output: the output folder.
        names: names of files besides the record and the summary.
        folders: pairs of a folder and the prefix of its files' names.
    """
    for name in (RECORD_NAME, SUMMARY_NAME, *names):
        storage.remove(storage.join(output, name))
    for folder, prefix in folders:
        for name in storage.list_names(storage.join(output, folder)):
            if name.startswith((prefix, f".{prefix}")):  # ".": a temporary file of a killed process
                storage.remove(storage.join(output, folder, name))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # some packages do not exist on every platform
        return None


def _git_revision() -> str | None:
    """Return the git commit of the running source, with "-dirty" if the source was changed after it, or None.

    The source of a submitted job has no git history. The submitter can set the commit in VLSM_GIT_REVISION.
    """
    if revision := os.environ.get("VLSM_GIT_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), *"describe --always --dirty --abbrev=40 --exclude=*".split()]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
