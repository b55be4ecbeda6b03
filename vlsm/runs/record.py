"""config.yaml of a run: what was asked, with which checkpoint or data and software, and what was planned.

It is written after the plan and before any work: its presence means that the plan is complete, so that a rerun goes on
with that plan instead of listing the archive again.
"""

import datetime
import os
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlsm import storage
from vlsm.config import Settings, dump_yaml, flatten
from vlsm.errors import ConfigError
from vlsm.version import FORMAT, __version__, newer_format

RECORD_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
_ACTIONS = {"start_over", "retry_failed", "update"}  # what is to be done now, no part of what a run is
_POOL_KEYS = ("actors", "_per_actor")
_PACKAGES = "ray torch torchvision transformers pillow simplejpeg cykooz-resizer pyarrow fsspec s3fs scipy".split()


def make_record(settings: Settings, facts: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The content of config.yaml.

    Args:
        settings: resolved: nothing that decides a result is left to a checkpoint any more.
        facts: what else decides the results, such as a checkpoint's digest.
        plan: how much is to be done.
    """
    return {
        "format": FORMAT,
        "config": settings.model_dump(mode="json", exclude=_ACTIONS),
        **facts,
        "plan": plan,
        "versions": {"vlsm": __version__} | {package: _version(package) for package in _PACKAGES},
        "git_revision": _git_revision(),
        "planned_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def create_record(output: str, record: dict[str, Any]) -> bool:
    """Put config.yaml where there is none; whether this call has put it, of all that try at once."""
    return storage.create_bytes(storage.join(output, RECORD_NAME), dump_yaml(record).encode())


def write_record(output: str, record: dict[str, Any]) -> None:
    """Put config.yaml into the output folder."""
    storage.write_bytes(storage.join(output, RECORD_NAME), dump_yaml(record).encode())


def read_record(output: str) -> dict[str, Any] | None:
    """What config.yaml says, or None where there is no planned run.

    Raises:
        ConfigError: OUTPUT holds a config.yaml that is not a run's, or a newer version has written it.
    """
    uri = storage.join(output, RECORD_NAME)
    if not storage.exists(uri):
        return None
    try:
        record = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError:
        record = None
    if not isinstance(record, dict) or not {"config", "plan"} <= record.keys():
        raise ConfigError(f"{uri} is not the record of a run; choose another OUTPUT")
    if message := newer_format(record.get("format"), uri):
        raise ConfigError(message)
    return record


def describe_differences(record: dict[str, Any], settings: Settings, facts: dict[str, Any]) -> list[str]:
    """What would change an output if this run went on there, one phrase per differing key; arguments as for a record.

    How a run is carried out (`run`) may change, and a checkpoint may move: its content counts. A setting or fact that
    an earlier version did not record is not compared by its absence: the setting counts as its default.
    """
    trees = _with_defaults(record["config"], type(settings)), settings.model_dump(mode="json", exclude=_ACTIONS)
    before, now = (flatten(_deciding(tree)) for tree in trees)
    known = {key: value for key, value in facts.items() if key in record}
    before |= {key: record[key] for key in known}
    now |= known
    return [
        f"{key} (there {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _with_defaults(tree: dict[str, Any], settings: type[Settings]) -> dict[str, Any]:
    """Recorded settings with the defaults of those that are absent; unchanged where they are not valid any more."""
    try:
        return settings.model_validate(tree).model_dump(mode="json", exclude=_ACTIONS)
    except ValidationError:
        return tree


def _deciding(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record that decide what comes out, and not where and how."""
    deciding = {key: value for key, value in tree.items() if key not in ("run", "output", "members", "systems")}
    groups = {name: list(map(_deciding_member, members)) for name, members in tree.get("systems", {}).items()}
    members = list(map(_deciding_member, tree.get("members", ())))
    return deciding | ({"members": members} if members else {}) | ({"systems": groups} if groups else {})


def _deciding_member(member: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in member.items() if key != "checkpoint" and not key.endswith(_POOL_KEYS)}


def forget_run(output: str, names: Iterable[str] = (), folders: Iterable[tuple[str, str]] = ()) -> None:
    """Remove an earlier run's files, and nothing else, from an output folder; its record first.

    Args:
        output: the folder.
        names: of files besides the record and the summary.
        folders: pairs of a folder and what the names of its files begin with.
    """
    for name in (RECORD_NAME, SUMMARY_NAME, *names):
        storage.remove(storage.join(output, name))
    for folder, prefix in folders:
        for name in storage.list_names(storage.join(output, folder)):
            if name.startswith((prefix, f".{prefix}")):  # the second: what a killed process has not put in place
                storage.remove(storage.join(output, folder, name))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # some are not on every platform
        return None


def _git_revision() -> str | None:
    """The commit of the source that runs, with "-dirty" where it was changed since.

    A submitted job's source travels without its history: whoever submits it tells the commit in VLSM_GIT_REVISION.
    """
    if told := os.environ.get("VLSM_GIT_REVISION"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), *"describe --always --dirty --abbrev=40 --exclude=*".split()]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
