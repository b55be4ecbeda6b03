"""config.yaml of a run: what was asked, with which checkpoint and software, and what was planned.

It is written after the manifest and before any work: its presence means that the plan is complete, so that a rerun goes
on with that plan instead of listing the archive again.
"""

import datetime
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import vlsm
from vlsm import storage
from vlsm.config import SegmentSettings, dump_yaml, flatten
from vlsm.errors import ConfigError
from vlsm.manifest import Plan

RECORD_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
_PACKAGES = ("ray", "torch", "torchvision", "transformers", "pillow", "pyarrow", "fsspec", "s3fs")


def make_record(settings: SegmentSettings, checkpoint_digest: str, plan: Plan) -> dict[str, Any]:
    """The content of config.yaml; settings are resolved: prompts and threshold are no longer left to the checkpoint."""
    return {
        "config": settings.model_dump(mode="json", exclude={"start_over"}),
        "checkpoint_digest": checkpoint_digest,
        "plan": asdict(plan),
        "versions": {"vlsm": vlsm.__version__} | {package: version(package) for package in _PACKAGES},
        "git_revision": _git_revision(),
        "planned_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_record(output: str, record: dict[str, Any]) -> None:
    """Put config.yaml into the output folder."""
    storage.write_bytes(storage.join(output, RECORD_NAME), dump_yaml(record).encode())


def read_record(output: str) -> dict[str, Any] | None:
    """What config.yaml says, or None where there is no planned run.

    Raises:
        ConfigError: OUTPUT holds a config.yaml that is not a run's.
    """
    uri = storage.join(output, RECORD_NAME)
    if not storage.exists(uri):
        return None
    try:
        record = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError:
        record = None
    if not isinstance(record, dict) or not {"config", "checkpoint_digest", "plan"} <= record.keys():
        raise ConfigError(f"{uri} is not the record of a run; choose another OUTPUT")
    return record


def describe_differences(record: dict[str, Any], settings: SegmentSettings, checkpoint_digest: str) -> list[str]:
    """What would change an output's rows if this run went on there, one phrase per differing key.

    How a run is carried out (`run`) may change, and a checkpoint may move: its content counts.
    """
    before, now = (
        flatten({key: value for key, value in tree.items() if key not in ("run", "output", "checkpoint")})
        for tree in (record["config"], settings.model_dump(mode="json", exclude={"start_over"}))
    )
    before["checkpoint_digest"], now["checkpoint_digest"] = record["checkpoint_digest"], checkpoint_digest
    return [
        f"{key} (there {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def forget_run(output: str) -> None:
    """Remove an earlier run's files, and nothing else, from an output folder; its record first."""
    for name in (RECORD_NAME, SUMMARY_NAME):
        storage.remove(storage.join(output, name))
    for folder, prefix in (("masks", "part-"), ("manifest", "manifest-")):
        for name in storage.list_names(storage.join(output, folder)):
            if name.startswith(prefix):
                storage.remove(storage.join(output, folder, name))


def _git_revision() -> str | None:
    """The commit of the source that runs, where it runs from a clone."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
