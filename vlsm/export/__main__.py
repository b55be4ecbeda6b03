"""The command that exports the masks of a segment run as files for other tools.

`python -m vlsm.export OUTPUT DIR --format overlays`
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from vlsm import storage
from vlsm.commands import add_allow, new_parser
from vlsm.errors import ConfigError, VlsmError
from vlsm.export.files import FORMATS
from vlsm.export.folder import ExportFolder
from vlsm.export.links import LinkPrefix
from vlsm.runs.links import refuse_inside
from vlsm.runs.results import check_columns, open_results, read_rows
from vlsm.runs.schema import RESULT_SCHEMA
from vlsm.shown import say, say_error, set_up_logging, show
from vlsm.words import count

# options of some formats: the formats, and the argument of their functions
_OPTIONS = {
    "components": (("coco", "cvat"), "components"),
    "together": (("overlays",), "is_together"),
    "polygons": (("label-studio",), "polygons"),
    "link_prefix": (("label-studio", "fiftyone"), "prefixes"),
}
# what a format has in place of files, and where
_UNITS = {
    "coco": ("annotation", " in coco.json"),
    "cvat": ("annotation", " in cvat.zip"),
    "fiftyone": ("annotation", " in labels.json"),
    "label-studio": ("task", ""),
}
_SHARES = ("confidence", "agreement", "area_fraction")  # columns with numbers from 0 to 1


def parse_filter(words: str, schema: pa.Schema = RESULT_SCHEMA) -> tuple[str, str, Any]:
    """Return a filter such as "confidence < 0.6" as (column, operator, value).

    A value for a column of texts is taken as it is written; quotes around it are removed. `null` stands for an absent
    value: "review != null".

    Args:
        words: the filter.
        schema: the columns of the run's output.

    Raises:
        ConfigError: the words do not have this form, the column is unknown, or the value does not fit the column.
    """
    column, operator, text = _split_filter(words)
    check_columns([column], schema)
    try:
        return column, operator, _parse_value(text, schema.field(column).type, operator, column in _SHARES)
    except ValueError as error:
        raise ConfigError(f"--filter {words!r}: {text!r} does not fit the column {column}; {error}") from None


def parse_filters(filters: Sequence[str], output: str) -> list[tuple[str, str, Any]]:
    """Return filters of the command line as (column, operator, value). They may name columns of the run's list.

    Raises:
        ConfigError: as for `parse_filter`, or OUTPUT has no masks.
    """
    is_of_list = any(_split_filter(words)[0] not in RESULT_SCHEMA.names for words in filters)
    schema = open_results(output).schema if is_of_list else RESULT_SCHEMA
    return [parse_filter(words, schema) for words in filters]


def _split_filter(words: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"\s*([^=!<>]+?)\s*(==|=|!=|<=|>=|<|>)\s*(.+?)\s*", words, re.DOTALL)
    if match is None:
        raise ConfigError(f"--filter {words!r} is not of the form 'column operator value', such as 'confidence < 0.6'")
    return match[1], match[2], match[3]


def _parse_value(text: str, column_type: pa.DataType, operator: str, is_share: bool) -> Any:
    """Return the value of a filter as its column has it; `is_share`: the column has numbers from 0 to 1.

    Raises:
        ValueError: the text does not fit the column. The message says what would.
    """
    if text == "null" and operator in ("=", "==", "!="):
        return None
    if pa.types.is_string(column_type):
        is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if is_quoted else text
    if pa.types.is_boolean(column_type) or pa.types.is_temporal(column_type) or pa.types.is_decimal(column_type):
        return _cast(text, column_type)
    if not pa.types.is_primitive(column_type):
        raise ValueError("compare it with null: '= null' or '!= null'")
    try:
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise ValueError("it must be a number") from None
    if is_share and not 0 <= value <= 1:
        raise ValueError("its values are between 0 and 1, such as 0.6")
    return value


def _cast(text: str, column_type: pa.DataType) -> Any:
    """Return the value of a filter for a column of a list that is neither text nor a plain number."""
    try:
        return pa.scalar(text).cast(column_type).as_py()
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"it must be a value of the type {column_type}") from error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    examples = (
        "masks pictures --format overlays --filter 'confidence < 0.6' --limit 50",
        "masks coco --format coco",
        "masks files --format masks --filter 'prompt == polyp'",
    )
    parser = new_parser("vlsm.export", str(main.__doc__), examples)
    parser.add_argument("output", metavar="OUTPUT", help="the OUTPUT of a segment run; local or s3://")
    parser.add_argument("directory", metavar="DIR", help="a local folder for the files")
    parser.add_argument("--format", choices=FORMATS, default="overlays", help="format of the files (default: overlays)")
    parser.add_argument(
        "--filter", action="append", default=[], help="export only matching rows, e.g. 'confidence < 0.6'; repeatable"
    )
    parser.add_argument("--limit", type=int, help="maximum number of rows to export")
    parser.add_argument(
        "--components",
        action="store_true",
        help="with --format coco or cvat: one annotation per connected component of a mask",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="with --format overlays: one picture per image, its prompts in colours with a legend",
    )
    parser.add_argument(
        "--polygons", action="store_true", help="with --format label-studio: polygons in place of brush masks"
    )
    parser.add_argument(
        "--link-prefix",
        action="append",
        default=[],
        metavar="FROM=TO",
        help="with --format label-studio or fiftyone: begin links to images in FROM with TO; repeatable",
    )
    add_allow(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export the masks of a segment run as files."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 0:
        parser.error(f"--limit is {args.limit}; it must be 0 or more")
    for option, (formats, _) in _OPTIONS.items():
        if getattr(args, option) and args.format not in formats:
            needed = " or ".join(formats)
            parser.error(f"--{option.replace('_', '-')} needs --format {needed}, not {args.format}")
    set_up_logging()
    failures: tuple[type[Exception], ...] = (VlsmError, OSError, ValueError, *storage.store_errors())
    try:
        filters = parse_filters(args.filter, args.output)
        options = {name: getattr(args, option) for option, (_, name) in _OPTIONS.items() if getattr(args, option)}
        if "prefixes" in options:
            options["prefixes"] = [LinkPrefix.parse(words) for words in args.link_prefix]
        refuse_inside("DIR", args.directory, args.output)
        with ExportFolder(args.directory, args.allow) as folder:
            num_written = FORMATS[args.format](storage.absolute(args.output), folder, filters, args.limit, **options)
    except failures as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    if filters and not num_written and not folder.num_failed and args.limit != 0:
        say_error(describe_nothing(storage.absolute(args.output), args.filter, filters))
        return 1
    unit, place = _UNITS.get(args.format, ("file", ""))
    say(f"{count(num_written, unit)}{place} below {args.directory}")
    return 1 if folder.num_failed else 0


def describe_nothing(output: str, words: Sequence[str], filters: Sequence[tuple[str, str, Any]]) -> str:
    """Return why filters leave nothing to export.

    Args:
        output: OUTPUT of the run.
        words: the filters as the user wrote them.
        filters: the same, parsed.
    """
    total, num_fitting = (sum(1 for _ in read_rows(output, each, ["kind"])) for each in (None, list(filters)))
    given = " and ".join(f"--filter {show(each)!r}" for each in words)
    if not num_fitting:
        return f"nothing to export: none of {count(total, 'row')} fits {given}"
    are = "fits" if num_fitting == 1 else "fit"
    return f"nothing to export: {num_fitting:,} of {count(total, 'row')} {are} {given}, but none has a mask to export"


if __name__ == "__main__":
    sys.exit(main())
