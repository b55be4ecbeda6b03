"""The command `python -m vlsm.models`, which prints the table of models."""

import argparse

from vlsm.commands import new_parser
from vlsm.config import describe_settings
from vlsm.errors import CheckpointError
from vlsm.models import check_name
from vlsm.models.options import OPTIONS
from vlsm.shown import say, say_error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("vlsm.models", str(main.__doc__), ("", "clipseg"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the options of this model instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print every model: parameters, also those that each trainable lets learn, side of its input, cost in GFLOP."""
    name = make_parser().parse_args(argv).name
    if name:
        try:
            check_name(name)
            say("\n".join(describe_settings(OPTIONS[name])))
        except CheckpointError as error:
            say_error(error)
            return 2
        return 0
    from vlsm.models.costs import LEARNING, measure_costs  # late import: it loads the libraries of all models

    learning = tuple(f"{trainable} (M)" for trainable in LEARNING)
    numbers = ("parameters (M)", *learning, "image side (px)", "GFLOP, first prompt", "GFLOP, next prompt")
    heads = ("model", *numbers, "default weights")
    rows = [
        (
            cost.name,
            f"{cost.num_parameters / 1e6:.1f}",
            *("-" if number is None else f"{number / 1e6:.1f}" for number in cost.num_trainable.values()),
            str(cost.image_size),
            f"{cost.image_gflop:.1f}",
            f"{cost.prompt_gflop:.1f}",
            cost.source,
        )
        for cost in measure_costs()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        say("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
