"""The command that writes the report of a run as one HTML file.

`python -m vlsm.report OUTPUT [FILE]`
"""

import argparse
import sys

from vlsm.commands import add_allow, new_parser
from vlsm.errors import ConfigError, VlsmError
from vlsm.shown import say, say_error, set_up_logging

_EXAMPLES = ("masks", "trained pages/training.html", "masks review.html --gallery 1000 --gallery-px 640")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("vlsm.report", str(main.__doc__), _EXAMPLES)
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of a segment, train or evaluate run; local or s3://")
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: beside OUTPUT, with its name and .html")
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        help="most masks of a segment run in the gallery, for a review; up to 26 kB each. Default: 240",
    )
    parser.add_argument(
        "--gallery-px",
        type=int,
        metavar="PX",
        help="longer side of their pictures in pixels; 640 take up to 60 kB each. Default: 400",
    )
    add_allow(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run: one HTML file to open in a browser."""
    args = make_parser().parse_args(argv)
    from vlsm.report.reviews import Gallery  # here, so that --help does not wait for it
    from vlsm.report.write import write_report

    set_up_logging()
    given = {"cards": args.gallery, "side_px": args.gallery_px}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        uri = write_report(args.output, args.file, args.allow, Gallery(**given) if given else None)
    except (VlsmError, OSError, ValueError) as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    say(uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
