"""The command that resumes a run, built from its config.yaml."""

import json
from collections.abc import Iterator
from typing import Any

from vlsm import storage
from vlsm.commands import shell_command
from vlsm.config import MemberSettings, SegmentSettings, Settings
from vlsm.errors import ResultError
from vlsm.runs.record import ACTIONS


def rerun_command(output: str, record: dict[str, Any], *more: str) -> str:
    """Return the shell command that resumes a segment run, a training, an evaluation or a sweep.

    The command has all resolved settings of the run that differ from the defaults. A rerun with other settings is
    refused. Settings of one command, such as `start_over`, are left out: anybody may have written them into the file.

    Args:
        output: OUTPUT of the run, where it is now.
        record: content of the run's config.yaml.
        more: further settings, such as "retry_failed=true".

    Raises:
        ResultError: the record has no such settings.
    """
    config = {name: value for name, value in record["config"].items() if name not in {"output", *ACTIONS}}
    try:
        module, words, defaults = _split_words(config, output)
        words += [f"--set={word}" for word in [*_changed(config, defaults), *more]]
        return shell_command(module, *words)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ResultError(f"config.yaml of {output!r} is damaged: it has no settings of a run: {error!r}") from error


def _split_words(config: dict[str, Any], output: str) -> tuple[str, list[str], dict[str, Any]]:
    """Return the module, its arguments, which are removed from the settings, and the defaults of the settings.

    A location is made absolute, so that no argument begins with a dash.
    """
    if "datasets" in config:
        module, settings = _module_of(config)
        words = [f"--dataset={name}={storage.absolute(uri)}" for name, uri in config.pop("datasets").items()]
        return module, [output, *words], _defaults(settings)
    words, members = [storage.absolute(config.pop("input")), output], config.get("members", [])
    if all(member == _defaults(MemberSettings) | {"checkpoint": member["checkpoint"]} for member in members):
        words += [f"--checkpoint={member['checkpoint']}" for member in config.pop("members", [])]
    return "jobs.segment", words, _defaults(SegmentSettings)


def _module_of(config: dict[str, Any]) -> tuple[str, type[Settings]]:
    """Return the module and the settings of a job with datasets."""
    if "systems" in config:
        from vlsm.evaluation.settings import EvaluateSettings

        return "jobs.evaluate", EvaluateSettings
    if "models" in config:
        from vlsm.evaluation.sweep import SweepSettings

        return "jobs.sweep", SweepSettings
    from vlsm.training.settings import TrainSettings

    return "jobs.train", TrainSettings


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
