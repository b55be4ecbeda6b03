"""All commands by name, and the parts of a command line that they share."""

import argparse
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from vlsm import storage
from vlsm.config import Settings, describe_settings
from vlsm.shown import Parser, say

_INDENT = 6  # of the second line of a setting

# name for `vlsm NAME`: the module for `python -m MODULE`, and what it does
COMMANDS = {
    "segment": ("jobs.segment", "segment an archive of images"),
    "train": ("jobs.train", "train a model on labelled datasets"),
    "evaluate": ("jobs.evaluate", "score and compare models on labelled datasets"),
    "sweep": ("jobs.sweep", "train and compare many models"),
    "status": ("jobs.status", "progress of a segment run, a training, an evaluation or a sweep"),
    "verify": ("jobs.verify", "prove that every planned image has its rows"),
    "report": ("vlsm.report", "an HTML page about a segment run, a training or an evaluation"),
    "export": ("vlsm.export", "masks as files for other tools"),
    "labels": ("vlsm.labels", "masks that people have corrected, as a labelled dataset"),
    "publish": ("vlsm.publish", "a proved run as a table of Delta Lake, Iceberg, Lance or DuckDB"),
    "select": ("vlsm.select", "a list of the images to label next"),
    "datasets": ("vlsm.datasets", "what labelled datasets are taken for"),
    "calibrate": ("vlsm.calibration", "temperature and threshold of a checkpoint"),
    "checkpoints": ("vlsm.checkpoints", "make a checkpoint from pretrained weights"),
    "models": ("vlsm.models", "all models and their options"),
    "demo": ("jobs.demo", "the whole workflow on drawn images"),
    "benchmark": ("jobs.benchmark", "measurements of speed"),
}


def call(module: str) -> str:
    """Return how this process calls a command: `vlsm segment` or `python -m jobs.segment`, as the user began."""
    names = {name for name, (home, _) in COMMANDS.items() if home == module}
    return f"vlsm {names.pop()}" if names and PurePath(sys.argv[0]).name == "vlsm" else f"python -m {module}"


def shell_command(module: str, *words: str) -> str:
    """Return the shell command that runs a command with these words, each quoted: they come from files and users."""
    return " ".join([call(module), *map(shlex.quote, words)])


def new_parser(
    module: str,
    description: str,
    examples: Sequence[str] = (),
    settings: type[Settings] | None = None,
    common: Sequence[str] = (),
    epilog: str = "",
) -> argparse.ArgumentParser:
    """Return the parser of a command. Its help begins with examples.

    Args:
        module: module of the command.
        description: what the command does, in one sentence.
        examples: the words of example commands, without the command itself.
        settings: the settings that --set takes, if any; --help-settings lists all of them.
        common: keys of the settings that --help shows.
        epilog: the end of the help.
    """
    storage.expect_answers()  # whoever has a parser is a command, with a person who waits
    shown = "\n".join([f"  {call(module)} {words}".rstrip() for words in examples])  # to be copied: not wrapped
    description, *lines = _wrap([description, epilog])
    if settings is not None:
        head = "settings that people change, as --set key=value (--help-settings lists all):"
        lines = [*_wrap([head, *describe_settings(settings, common)]), "", *lines]
    parser = Parser(
        prog=call(module),
        description=f"{description}\n\nexamples:\n{shown}" if examples else description,
        epilog="\n".join(lines).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if settings is not None:
        parser.add_argument(
            "--help-settings", action=_ShowSettings, settings=settings, help="list all settings and exit"
        )
    return parser


def _wrap(texts: Sequence[str]) -> list[str]:
    """Return texts of a help with lines that fit the terminal. In a pipe, as to grep, one line stays one line."""
    if not sys.stdout.isatty():
        return list(texts)
    return ["\n".join(map(_wrap_line, text.split("\n"))) for text in texts]


def _wrap_line(line: str) -> str:
    indent = " " * _INDENT if line.startswith(" ") else ""
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False))


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add --allow to a command that reads the images of an OUTPUT again; see `vlsm.archive.places.lies_outside`."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PLACE",
        help="images outside of the bucket of an OUTPUT in a store may be read below this folder; repeatable",
    )


class _ShowSettings(argparse.Action):
    """Print all settings of a command, with their defaults, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, settings: type[Settings], **options: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **options)
        self.settings = settings

    def __call__(self, parser: argparse.ArgumentParser, *words: Any) -> None:
        say("\n".join(["settings, as --set key=value or in --config FILE:", *_wrap(describe_settings(self.settings))]))
        parser.exit()
