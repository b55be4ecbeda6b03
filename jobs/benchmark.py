"""Measurements of speed. Each figure is a ratio of two things that are measured in one run.

vlsm benchmark models --json models.json
vlsm benchmark gpu --json gpu.json
vlsm benchmark pipeline --json pipeline.json
vlsm benchmark cost --json cost.json
vlsm benchmark peers --json peers.json
vlsm benchmark decode --folder photographs --json decode.json
vlsm benchmark decoders --checkpoint checkpoint --json decoders.json
vlsm benchmark output --folder masks --json output.json
vlsm benchmark train --json train.json
vlsm benchmark learner --json learner.json
vlsm benchmark nodes --json nodes.json
vlsm benchmark s3 --json s3.json
vlsm benchmark start --json start.json
vlsm benchmark fleet --actors 8 --json fleet.json
vlsm benchmark scale --rows 10000 --rows 1000000
vlsm benchmark torture
vlsm benchmark fuzz --minutes 5
vlsm benchmark section

Each writes its figures with --json. `section` writes the tables of all files in `jobs/measured` to README.md there.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vlsm.commands import new_parser

BENCHMARKS = {
    "models": "each model on CPUs, against the plain way",
    "gpu": "the segment job's work on one GPU, and each model; needs no Ray",
    "pipeline": "the steady state of the segment job, against the bare model loop",
    "cost": "CPU time of an image from S3 to Parquet, outside of the model, by process",
    "peers": "the segment job, against the usual ways to run CLIPSeg without it",
    "decode": "decoding files and resizing them to the model input, in several libraries",
    "decoders": "JPEGs decoded on a GPU, against the CPU: pixels, masks, speed; needs no Ray",
    "output": "masks in Parquet, against PNG files",
    "train": "the loop of the train job, against a bare loop",
    "learner": "the training step on one GPU in every way, against a bare loop; needs no Ray",
    "nodes": "both jobs on two nodes, against one node",
    "s3": "CPU time of a client for reading an image from S3, over HTTP and over TLS",
    "start": "seconds from a command to its first image",
    "scale": "the segment job over archives of growing size",
    "fleet": "many GPUs under one driver, simulated",
    "torture": "the segment job under faults: killed processes, lost nodes, a failing store, a full disk",
    "fuzz": "damaged files, against every reader",
}
_ON_GPU = {"gpu", "decoders", "learner"}
MEASURED = Path(__file__).parent / "measured"  # figures, as benchmarks have written them
PAGE = MEASURED / "README.md"
_TITLE = """\
# Measured

`python -m jobs.benchmark section` writes this page from the files in this folder. The benchmarks write these files with
`--json` ([jobs/README.md](../README.md#benchmarks) has their commands). Do not edit the page.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(words).parse_args(words)
    if args.measure is None:
        PAGE.write_text(measured_page(), encoding="utf-8")
        return 0
    return int(args.measure(args))


def make_parser(words: Sequence[str] = ()) -> ArgumentParser:
    """Return the parser of the command line. It knows the arguments of the benchmark that the first word names."""
    parser = new_parser("jobs.benchmark", str(__doc__))
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, about in BENCHMARKS.items():
        command = commands.add_parser(name, help=about)
        if name in words[:1]:  # import only this one: others may need packages that are not installed
            module = _module(name)
            command.description = module.measure.__doc__
            module.add_arguments(command)
            command.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
            command.set_defaults(measure=module.measure)
    commands.add_parser("section", help="write jobs/measured/README.md").set_defaults(measure=None)
    return parser


def measured_page() -> str:
    """Return the page of measured figures, from the files in `jobs/measured`.

    A table holds the figures of one benchmark on one machine. If several files have them, their `runs` are joined.
    """
    from jobs.benchmarks.figures import name_machine  # here: it imports torch, which --help need not wait for

    tables: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(MEASURED.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        table = tables.setdefault((figures["benchmark"], name_machine(figures)), figures)
        if table is not figures:
            table["runs"] += figures["runs"]
    lines = [_TITLE]
    measured = dict.fromkeys(name for name, _ in tables)
    for name in measured:
        lines += [f"## {name}", "", f"{BENCHMARKS[name][0].upper()}{BENCHMARKS[name][1:]}.", ""]
        for (benchmark, machine), figures in tables.items():
            if benchmark == name:
                lines += [f"`python -m jobs.benchmark {name}` on {machine}:", "", *_module(name).tell(figures), ""]
    for where, names in (("", BENCHMARKS.keys() - _ON_GPU), (", on a GPU", _ON_GPU)):
        missing = [f"`{name}`" for name in BENCHMARKS if name in names and name not in measured]
        lines += [f"Still to be measured{where}: {', '.join(missing)}.", ""] if missing else []
    return "\n".join(lines)


def _module(name: str) -> Any:
    return import_module(f"jobs.benchmarks.{name}")


if __name__ == "__main__":
    sys.exit(main())
