"""The command: masks of a finished run as files that other tools read.

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
    """A filter such as "confidence < 0.6" as (column, operator, value); the value is read as YAML.

    Raises:
        ConfigError: it is not of this form.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(==|=|!=|<=|>=|<|>)\s*(.+)", words)
    if found is None:
        raise ConfigError(f"--filter {words!r} is not of the form 'column operator value', such as 'confidence < 0.6'")
    return found[1], found[2], yaml.safe_load(found[3])


def main(argv: list[str] | None = None) -> int:
    """Write the masks of a segment run as files."""
    parser = argparse.ArgumentParser(prog="python -m vlsm.export", description=main.__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="the OUTPUT of a segment run; local or s3://")
    parser.add_argument("directory", metavar="DIR", help="a local folder for the files")
    parser.add_argument("--format", choices=FORMATS, default="overlays", help="what to write (default: overlays)")
    parser.add_argument(
        "--filter", action="append", default=[], help="only such rows, such as 'confidence < 0.6'; repeatable"
    )
    parser.add_argument("--limit", type=int, help="rows at most")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        filters = [parse_filter(words) for words in args.filter]
        count = FORMATS[args.format](storage.absolute(args.output), args.directory, filters, args.limit)
    except (VlsmError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    what = "annotations in coco.json" if args.format == "coco" else "files"
    print(f"{count:,} {what} below {args.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
