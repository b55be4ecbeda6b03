"""The command that writes the report of a run as one HTML file.

`python -m vlsm.report OUTPUT [FILE]`
"""

import argparse
import sys

from vlsm.commands import add_allow, new_parser
from vlsm.errors import ConfigError, VlsmError
from vlsm.shown import say, say_error, set_up_logging


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("vlsm.report", str(main.__doc__), ("masks", "trained pages/training.html"))
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of a segment, train or evaluate run; local or s3://")
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: beside OUTPUT, with its name and .html")
    add_allow(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run: one HTML file to open in a browser."""
    args = make_parser().parse_args(argv)
    from vlsm.report.write import write_report  # here, so that --help does not wait for it

    set_up_logging()
    try:
        uri = write_report(args.output, args.file, args.allow)
    except (VlsmError, OSError, ValueError) as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    say(uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
