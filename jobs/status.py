"""Print the progress of a run or a sweep from its files alone: without Ray, during the run or after it."""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from jobs.command import EXIT_CODES, run_command
from vlsm import storage
from vlsm.commands import new_parser
from vlsm.report.status import describe_status, read_status
from vlsm.shown import say


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    examples = ("masks", "s3://bucket/masks --json", "trained")
    parser = new_parser("jobs.status", str(__doc__), examples, epilog=EXIT_CODES)
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of any of these; local or s3://")
    parser.add_argument("--json", action="store_true", help="print one JSON line, for programs")
    parser.add_argument("--exact", action="store_true", help="read all part files of a large run, not only a sample")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)

    def work() -> dict[str, Any] | None:
        output = storage.absolute(args.output)
        with storage.name_errors("OUTPUT", output):
            status = read_status(output, args.exact)
        if args.json:
            return asdict(status)
        say("\n".join(describe_status(status)))
        return None

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
