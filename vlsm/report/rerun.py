"""The command that goes on with a run, from its record."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from vlsm.config import MemberSettings, SegmentSettings, Settings


def rerun_command(record: dict[str, Any], *more: str) -> str:
    """The command line of a segment run or a training, as a shell takes it.

    Settings are those that were resolved then, but for defaults: a rerun would refuse others.

    Args:
        record: of the run.
        more: words such as "retry_failed=true", to be set as well.
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
    """The tree of all settings that have a default, as plain values."""
    tree: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            tree[name] = _defaults(group)
        elif not info.is_required():
            tree[name] = list(info.default) if isinstance(info.default, tuple) else info.default
    return tree


def _changed(tree: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs, as key=value; JSON is YAML, and a group of settings is told from a setting that is a mapping."""
    for key, value in tree.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from _changed(value, default, f"{prefix}{key}.")
        elif value != default:
            yield f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}"
