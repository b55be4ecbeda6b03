"""The command that writes the report of a run as one HTML file.

`python -m vlsm.report OUTPUT [FILE]`
"""

import sys

from vlsm.errors import ConfigError, VlsmError
from vlsm.report.write import write_report
from vlsm.shown import Parser, say, say_error, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run: one HTML file to open in a browser."""
    parser = Parser(prog="python -m vlsm.report", description=main.__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of a segment, train or evaluate run; local or s3://")
    parser.add_argument("file", metavar="FILE", nargs="?", help="a local path (default: OUTPUT's name with .html)")
    args = parser.parse_args(argv)
    set_up_logging()
    try:
        path = write_report(args.output, args.file)
    except (VlsmError, OSError, ValueError) as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
