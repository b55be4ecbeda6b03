"""A run to look at: one HTML file with figures, charts and pictures that needs no network.

`python -m vlsm.report OUTPUT [FILE]`
"""

import argparse
import logging
import sys
from pathlib import Path

from vlsm import storage
from vlsm.errors import ConfigError, VlsmError
from vlsm.reporting.evaluations import evaluation_page
from vlsm.reporting.page import Page, render
from vlsm.reporting.segmentations import segmentation_page
from vlsm.reporting.trainings import training_page


def write_report(output: str, file: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        output: OUTPUT of a segment, train or evaluate run, finished or not, local or on an object store.
        file: a local path; the name of OUTPUT with `.html`, in the current folder, unless told.

    Returns:
        Where it was written.

    Raises:
        ConfigError: there is no run at OUTPUT.
    """
    output = storage.absolute(output)
    name = output.rpartition("/")[2]
    path = Path(f"{name}.html" if file is None else file)
    text = render(_page(output, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _page(output: str, title: str) -> Page:
    """What is told of the run, by what its folder holds."""
    with storage.name_errors("OUTPUT", output):
        names = storage.list_names(output)
    if "scores.parquet" in names:
        return evaluation_page(output, title)
    if "examples.parquet" in names:
        return training_page(output, title)
    return segmentation_page(output, title)


def main(argv: list[str] | None = None) -> int:
    """Write a run's report: one HTML file to open in a browser."""
    parser = argparse.ArgumentParser(prog="python -m vlsm.report", description=main.__doc__)
    parser.add_argument("output", metavar="OUTPUT", help="of a segment, train or evaluate run; local or s3://")
    parser.add_argument("file", metavar="FILE", nargs="?", help="a local path (default: OUTPUT's name with .html)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        path = write_report(args.output, args.file)
    except (VlsmError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
