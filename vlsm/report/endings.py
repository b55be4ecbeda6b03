"""What a job says at its end: where things are, and the command that comes next."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from vlsm import storage
from vlsm.archive.places import lies_outside
from vlsm.commands import call, shell_command
from vlsm.config import SegmentSettings
from vlsm.locations import own_place
from vlsm.runs.extremes import describe_extremes
from vlsm.training.history import MEAN
from vlsm.training.settings import TrainSettings
from vlsm.words import count


def segment_ending(settings: SegmentSettings, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a segment run.

    Args:
        settings: settings of the run.
        summary: content of its summary.json.
    """
    output = settings.output
    have = "has" if summary["ok"] == 1 else "have"
    folder = storage.join(output, "masks")
    lines = [f"{count(summary['ok'], 'image')} of {summary['planned']:,} {have} masks, in {shlex.quote(folder)}"]
    if summary["failed"]:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in summary["failed_by_reason"].items())
        lines.append(f"{count(summary['failed'], 'image')} failed ({reasons}): the rows with status failed say why")
    lines += [f"warning: {warning}"] if (warning := describe_extremes(summary)) else []
    read = f"read: pandas.read_parquet({json.dumps(folder, ensure_ascii=False)})"  # OUTPUT itself has other files too
    return [*lines, read, _look(output, [settings.input, *settings.run.allow])]


def train_ending(settings: TrainSettings, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a training; arguments as for `segment_ending`."""
    sources = [*settings.datasets.values(), *settings.external.values()]
    has_mean = len(summary["dice"]) > 4  # of one dataset in val and test, the mean says nothing new
    shown = {name: dice for name, dice in summary["dice"].items() if has_mean or not name.endswith(f" {MEAN}")}
    scores = ", ".join(f"{dice:.3f} on {name}" for name, dice in shown.items())
    checkpoint = shlex.quote(summary["checkpoint"])
    return [
        f"best epoch {summary['best_epoch']} of {summary['epochs']}, Dice {scores}; checkpoint: {checkpoint}",
        _look(settings.output, [*sources, *settings.run.allow]),
        f"use it: {call('jobs.segment')} INPUT OUTPUT --checkpoint {checkpoint}",
    ]


def evaluate_ending(output: str, sources: Sequence[str]) -> list[str]:
    """Return the last lines of an evaluation.

    Args:
        output: OUTPUT of the evaluation.
        sources: locations of its datasets, and the places of run.allow.
    """
    return [f"all scores: {_join(output, 'scores.parquet')}", _look(output, sources)]


def sweep_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a sweep; arguments as for `segment_ending`."""
    tables = f"{_join(output, 'table.md')} and {_join(output, 'table.csv')}"
    return [f"{count(summary['trials'], 'training')}, the table is in {tables}"]


def _look(output: str, sources: Sequence[str]) -> str:
    """Return the command for the report. Of an OUTPUT in a store it must allow the places of the images elsewhere."""
    outside = [source for source in sources if lies_outside(source, output, ())]
    places = [own_place(place) if "://" in place else place for place in outside]
    words = [word for place in dict.fromkeys(places) for word in ("--allow", place)]
    return f"look: {shell_command('vlsm.report', output, *words)}"


def _join(output: str, name: str) -> str:
    return shlex.quote(storage.join(output, name))
