"""Re-read everything of a segment run and prove it: one row for each planned image and prompt, each mask as it says."""

import argparse
import sys
from typing import Any

from tqdm import tqdm

from jobs.command import EXIT_CODES, run_command
from vlsm import storage
from vlsm.errors import ConfigError, ResultError
from vlsm.runs.verify import Proof, verify_run

_SHOWN = 100


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.verify", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument("output", metavar="OUTPUT", help="the OUTPUT of a segment run; local or s3://")
    args = parser.parse_args(argv)
    return run_command(lambda: verify(storage.absolute(args.output)))


def verify(output: str) -> dict[str, Any]:
    """The proof of a run, as figures.

    Raises:
        ConfigError: there is no run at OUTPUT.
        ResultError: it is not proved; the differences are printed before.
    """
    proof: Proof | None = None
    with storage.name_errors("OUTPUT", output), tqdm(unit="row", disable=not sys.stderr.isatty()) as bar:
        for proof in verify_run(output):
            bar.total = proof.plan.num_rows
            bar.update(proof.counts["rows"] - bar.n)
    if proof is None:
        raise ConfigError(f"nothing is planned in {output!r}")
    for difference in proof.differences[:_SHOWN]:
        print(difference)
    if len(proof.differences) > _SHOWN:
        print(f"... and {len(proof.differences) - _SHOWN:,} more")
    if proof.differences:
        raise ResultError(f"{len(proof.differences):,} differences between {output!r} and its plan")
    counts = proof.counts
    print(
        f"{proof.plan.num_images:,} images and {proof.plan.num_rows:,} rows were planned; there are {counts['rows']:,} "
        f"rows, one for each, in {counts['parts']:,} parts; {counts['masks']:,} masks are as their rows say",
        file=sys.stderr,
    )
    return {"planned": proof.plan.num_images, **{key: counts[key] for key in sorted(counts)}}


if __name__ == "__main__":
    sys.exit(main())
