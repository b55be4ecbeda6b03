"""The command that exports the masks of a segment run as files for other tools.

`python -m vlsm.export OUTPUT DIR --format overlays`
"""

import argparse
import logging
import re
import sys
from typing import Any

import yaml

from vlsm import storage
from vlsm.errors import ConfigError, VlsmError
from vlsm.export.files import FORMATS


def parse_filter(words: str) -> tuple[str, str, Any]:
    """Return a filter such as "confidence < 0.6" as (column, operator, value); the value is parsed as YAML.

    Raises:
        ConfigError: the words do not have this form.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(==|=|!=|<=|>=|<|>)\s*(.+)", words)
    if match is None:
        raise ConfigError(f"--filter {words!r} is not of the form 'column operator value', such as 'confidence < 0.6'")
    return match[1], match[2], yaml.safe_load(match[3])


def main(argv: list[str] | None = None) -> int:
    """Export the masks of a segment run as files."""
    parser = argparse.ArgumentParser(prog="python -m vlsm.export", description=main.__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="the OUTPUT of a segment run; local or s3://")
    parser.add_argument("directory", metavar="DIR", help="a local folder for the files")
    parser.add_argument("--format", choices=FORMATS, default="overlays", help="format of the files (default: overlays)")
    parser.add_argument(
        "--filter", action="append", default=[], help="export only matching rows, e.g. 'confidence < 0.6'; repeatable"
    )
    parser.add_argument("--limit", type=int, help="maximum number of rows to export")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        filters = [parse_filter(words) for words in args.filter]
        count = FORMATS[args.format](storage.absolute(args.output), args.directory, filters, args.limit)
    except (VlsmError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    unit = "annotations in coco.json" if args.format == "coco" else "files"
    print(f"{count:,} {unit} below {args.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
