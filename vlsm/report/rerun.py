"""The command that resumes a run, built from its config.yaml."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from vlsm.config import MemberSettings, SegmentSettings, Settings


def rerun_command(record: dict[str, Any], *more: str) -> str:
    """Return the shell command that resumes a segment run or a training.

    The command has all resolved settings of the run that differ from the defaults. A rerun with other settings is
    refused.

    Args:
        record: content of the run's config.yaml.
        more: further settings, such as "retry_failed=true".
    """
    config = dict(record["config"])
    output = config.pop("output")
    if "datasets" in config:
        from vlsm.training.settings import TrainSettings

        datasets = config.pop("datasets")
        words = ["jobs.train", output, *(f"--dataset={name}={uri}" for name, uri in datasets.items())]
        defaults = _defaults(TrainSettings)
    else:
        members = config.get("members", [])
        words = ["jobs.segment", config.pop("input"), output]
        if all(member == _defaults(MemberSettings) | {"checkpoint": member["checkpoint"]} for member in members):
            words += [f"--checkpoint={member['checkpoint']}" for member in config.pop("members", [])]
        defaults = _defaults(SegmentSettings)
    words += [f"--set={word}" for word in [*_changed(config, defaults), *more]]
    return " ".join(["python -m", *map(shlex.quote, words)])


def _defaults(settings: type[Settings]) -> dict[str, Any]:
    """Return the default values of all settings that have one, as a tree of plain values."""
    tree: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            tree[name] = _defaults(group)
        elif not info.is_required():
            tree[name] = list(info.default) if isinstance(info.default, tuple) else info.default
    return tree


def _changed(tree: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield each setting that differs from its default as key=value. Values are JSON, which is also valid YAML.

    A dictionary whose default is empty is one setting, such as `options`, and not a group of settings.
    """
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from _changed(value, default, f"{prefix}{key}.")
        elif value != default:
            yield f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}"
