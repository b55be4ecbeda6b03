"""What a job says at its end: where things are, and the command that comes next."""

import shlex
from typing import Any

from vlsm import storage
from vlsm.commands import call, shell_command
from vlsm.training.history import MEAN


def count(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural: "1 image", "1,200 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def segment_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a segment run.

    Args:
        output: OUTPUT of the run.
        summary: content of its summary.json.
    """
    have = "has" if summary["ok"] == 1 else "have"
    lines = [f"{count(summary['ok'], 'image')} of {summary['planned']:,} {have} masks, in {_join(output, 'masks')}"]
    if summary["failed"]:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in summary["failed_by_reason"].items())
        lines.append(f"{count(summary['failed'], 'image')} failed ({reasons}): the rows with status failed say why")
    return [*lines, f"look: {shell_command('vlsm.report', output)}"]


def train_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a training; arguments as for `segment_ending`."""
    has_mean = len(summary["dice"]) > 4  # of one dataset in val and test, the mean says nothing new
    shown = {name: dice for name, dice in summary["dice"].items() if has_mean or not name.endswith(f" {MEAN}")}
    scores = ", ".join(f"{dice:.3f} on {name}" for name, dice in shown.items())
    checkpoint = shlex.quote(summary["checkpoint"])
    return [
        f"best epoch {summary['best_epoch']} of {summary['epochs']}, Dice {scores}; checkpoint: {checkpoint}",
        f"look: {shell_command('vlsm.report', output)}",
        f"use it: {call('jobs.segment')} INPUT OUTPUT --checkpoint {checkpoint}",
    ]


def evaluate_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of an evaluation; arguments as for `segment_ending`."""
    return [f"all scores: {_join(output, 'scores.parquet')}", f"look: {shell_command('vlsm.report', output)}"]


def sweep_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a sweep; arguments as for `segment_ending`."""
    tables = f"{_join(output, 'table.md')} and {_join(output, 'table.csv')}"
    return [f"{count(summary['trials'], 'training')}, the table is in {tables}"]


def _join(output: str, name: str) -> str:
    return shlex.quote(storage.join(output, name))
