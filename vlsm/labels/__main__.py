"""The command that makes a training list of masks that people have corrected in an annotation tool.

`python -m vlsm.labels IN MANIFEST --format label-studio --run OUTPUT`
"""

import argparse
import json
import shlex
import statistics
import sys
from typing import Any

from vlsm import storage
from vlsm.commands import add_allow, new_parser
from vlsm.errors import ConfigError, ManifestError, VlsmError
from vlsm.export.__main__ import parse_filters
from vlsm.labels.files import FORMATS
from vlsm.labels.importing import OUTCOMES, Counts, Summary, import_labels
from vlsm.shown import say, say_error, set_up_logging, show
from vlsm.words import count


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    examples = (
        "project.json corrected.csv --format label-studio --run masks",
        "task.zip corrected.parquet --format cvat --run s3://bucket/masks",
        "marks.csv accepted.csv --format marks --run masks",
    )
    epilog = "exit codes: 0 done, 1 some reviews were refused or the import failed, 2 usage or a file is wrong"
    parser = new_parser("vlsm.labels", str(main.__doc__), examples, epilog=epilog)
    parser.add_argument("source", metavar="IN", help="the export of the tool: a file, or a folder of files")
    parser.add_argument("manifest", metavar="MANIFEST", help="the list to write: .parquet, .csv or .jsonl")
    parser.add_argument(
        "--format", choices=FORMATS, required=True, help="format of IN; marks: saved by the report of the run"
    )
    parser.add_argument("--run", required=True, metavar="OUTPUT", help="the segment run whose masks were reviewed")
    parser.add_argument(
        "--filter", action="append", default=[], help="the filters of the export: other masks were not reviewed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line, for programs")
    add_allow(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make a training list of masks that people have corrected, and compare them with the predictions."""
    args = make_parser().parse_args(argv)
    set_up_logging()
    failures: tuple[type[Exception], ...] = (VlsmError, OSError, *storage.store_errors())
    try:
        filters = parse_filters(args.filter, args.run)
        summary = import_labels(args.source, args.format, args.run, args.manifest, filters, args.allow)
    except failures as error:
        say_error(error)
        return 2 if isinstance(error, ConfigError | ManifestError) else 1
    say(json.dumps(as_record(summary)) if args.json else describe(summary, args.manifest))
    return 1 if summary.num_refused else 0


def as_record(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON holds it: totals, and the same by prompt with the Dice of the predictions."""
    prompts = {
        prompt: {name: counts.outcomes[name] for name in (*OUTCOMES, "emptied")} | _dice(counts)
        for prompt, counts in summary.prompts.items()
    }
    totals = {name: summary.total(name) for name in (*OUTCOMES, "emptied")}
    return totals | {"refused": summary.num_refused, "planned": summary.num_planned, "prompts": prompts}


def _dice(counts: Counts) -> dict[str, float | None]:
    if not counts.dice:
        return {"dice_mean": None, "dice_median": None}
    return {"dice_mean": statistics.fmean(counts.dice), "dice_median": statistics.median(counts.dice)}


def describe(summary: Summary, manifest: str) -> str:
    """Return a summary as lines of text."""
    reviewed = sum(map(summary.total, OUTCOMES))
    lines = [
        f"{count(reviewed, 'mask')} of {summary.num_planned:,} reviewed: {summary.total('accepted'):,} accepted, "
        f"{summary.total('corrected'):,} corrected ({summary.total('emptied'):,} of them emptied), "
        f"{summary.total('rejected'):,} rejected; {summary.num_refused:,} refused"
    ]
    for prompt, counts in summary.prompts.items():
        if counts.dice:
            mean, median = _dice(counts).values()
            lines.append(
                f"{show(prompt)}: Dice of the predictions {mean:.3f} on average, median {median:.3f}, "
                f"over {count(len(counts.dice), 'mask')}"
            )
    kept = summary.total("accepted") + summary.total("corrected")
    advice = f"; train with --dataset {shlex.quote(f'NAME={manifest}')}" if kept else ""
    lines.append(f"{count(kept, 'example')} in {manifest}{advice}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
