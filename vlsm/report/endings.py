"""What a job says at its end: where things are, and the command that comes next."""

import shlex
from typing import Any

from vlsm import storage
from vlsm.commands import call


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
    return [*lines, f"look: {_command('vlsm.report', output)}"]


def train_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a training; arguments as for `segment_ending`."""
    scores = ", ".join(f"{dice:.3f} on {name}" for name, dice in summary["dice"].items())
    checkpoint = summary["checkpoint"]
    return [
        f"best epoch {summary['best_epoch']} of {summary['epochs']}, Dice {scores}; checkpoint: {_quote(checkpoint)}",
        f"look: {_command('vlsm.report', output)}",
        f"use it: {call('jobs.segment')} INPUT OUTPUT --checkpoint {_quote(checkpoint)}",
    ]


def evaluate_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of an evaluation; arguments as for `segment_ending`."""
    return [f"all scores: {_join(output, 'scores.parquet')}", f"look: {_command('vlsm.report', output)}"]


def sweep_ending(output: str, summary: dict[str, Any]) -> list[str]:
    """Return the last lines of a sweep; arguments as for `segment_ending`."""
    tables = f"{_join(output, 'table.md')} and {_join(output, 'table.csv')}"
    return [f"{count(summary['trials'], 'training')}, the table is in {tables}"]


def _join(output: str, name: str) -> str:
    return _quote(storage.join(output, name))


def _command(module: str, *words: str) -> str:
    return " ".join([call(module), *map(_quote, words)])


def _quote(word: str) -> str:
    return shlex.quote(word)
