"""Read all parts of a segment run, and check one row per planned image and prompt, and every mask against its row."""

import argparse
import sys
from typing import Any

from tqdm import tqdm

from jobs.command import EXIT_CODES, run_command
from vlsm import storage
from vlsm.commands import new_parser
from vlsm.errors import ConfigError, ResultError
from vlsm.runs.verify import Proof, verify_run
from vlsm.shown import say
from vlsm.words import count

_NUM_PRINTED = 100


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("jobs.verify", str(__doc__), ("masks", "s3://bucket/masks"), epilog=EXIT_CODES)
    parser.add_argument("output", metavar="OUTPUT", help="OUTPUT of a segment run; local or s3://")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON on a terminal too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)
    return run_command(lambda: verify(storage.absolute(args.output)), as_json=args.json)


def verify(output: str) -> dict[str, Any]:
    """Check a run against its plan, and return the counts as a dict.

    Raises:
        ConfigError: there is no run at OUTPUT.
        ResultError: the run is not finished, or differs from its plan. The first 100 differences are printed before.
    """
    proof: Proof | None = None
    with storage.name_errors("OUTPUT", output), tqdm(unit="row", disable=not sys.stderr.isatty()) as bar:
        for proof in verify_run(output):
            bar.total = proof.plan.num_rows
            bar.update(proof.counts["rows"] - bar.n)
    if proof is None:
        raise ConfigError(f"nothing is planned in {output!r}")
    for difference in proof.differences[:_NUM_PRINTED]:
        say(difference)
    if len(proof.differences) > _NUM_PRINTED:
        say(f"... and {len(proof.differences) - _NUM_PRINTED:,} more")
    if not proof.is_finished and len(proof.differences) == 1:
        raise ResultError(f"the run in {output!r} is not finished; its rows so far are as planned")
    if proof.differences:
        raise ResultError(f"{count(len(proof.differences), 'difference')} between {output!r} and its plan")
    counts = proof.counts
    say(
        f"planned: {count(proof.plan.num_images, 'image')} and {count(proof.plan.num_rows, 'row')}; found: "
        f"{count(counts['rows'], 'row')}, one for each, in {count(counts['parts'], 'part')}; "
        f"{count(counts['masks'], 'mask')} checked, all as their rows say",
        file=sys.stderr,
    )
    return {"planned": proof.plan.num_images, **{key: counts[key] for key in sorted(counts)}}


if __name__ == "__main__":
    sys.exit(main())
