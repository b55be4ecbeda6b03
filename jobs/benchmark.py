"""What the README claims about speed, each figure a ratio of two things measured in one run.

python -m jobs.benchmark models --json models.json
python -m jobs.benchmark gpu --json gpu.json
python -m jobs.benchmark pipeline --json pipeline.json
python -m jobs.benchmark peers --json peers.json
python -m jobs.benchmark decode --folder photographs --json decode.json
python -m jobs.benchmark output --folder masks --json output.json
python -m jobs.benchmark train --json train.json
python -m jobs.benchmark nodes --json nodes.json
python -m jobs.benchmark start --json start.json
python -m jobs.benchmark scale --rows 10000 --rows 1000000
python -m jobs.benchmark torture
python -m jobs.benchmark section

Each writes its figures with --json; `section` writes the README's tables of all such files in `jobs/measured`.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path
from typing import Any

from jobs.benchmarks.figures import name_machine

BENCHMARKS = {
    "models": "each model on CPUs against the plain way",
    "gpu": "each model on one GPU; needs no ray",
    "pipeline": "the segment job's steady state against the bare model loop",
    "peers": "the segment job against the usual ways without it",
    "decode": "files to the model's square, in several libraries",
    "output": "masks in Parquet against PNG files",
    "train": "the train job's loop against a bare one",
    "nodes": "both jobs on two nodes against one",
    "start": "from a command to its first image",
    "scale": "the segment job as its archive grows",
    "torture": "the segment job, disturbed in every way",
}
MEASURED = Path(__file__).parent / "measured"  # figures that the README shows, as benchmarks have written them
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m jobs.benchmark", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    words = sys.argv[1:] if argv is None else argv
    for name, about in BENCHMARKS.items():
        command = commands.add_parser(name, help=about)
        if name in words[:1]:  # no other is imported: a machine need not have what all of them need
            module = _module(name)
            command.description = module.measure.__doc__
            module.add_arguments(command)
            command.add_argument("--json", metavar="FILE", help="where to write the figures too")
            command.set_defaults(measure=module.measure)
    commands.add_parser("section", help="the README's section of measured figures").set_defaults(measure=None)
    args = parser.parse_args(argv)
    if args.measure is None:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}{measured_section()}{end}{after}", encoding="utf-8")
        return 0
    return int(args.measure(args))


def measured_section() -> str:
    """The README's section of measured figures, from the files in `jobs/measured`.

    What one benchmark has measured on one machine is one table; of several files the `runs` are joined.
    """
    tables: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(MEASURED.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        table = tables.setdefault((figures["benchmark"], name_machine(figures)), figures)
        if table is not figures:
            table["runs"] += figures["runs"]
    lines = []
    for (name, machine), figures in tables.items():
        lines += [f"`python -m jobs.benchmark {name}` on {machine}:", "", *_module(name).tell(figures), ""]
    owed = [f"`{name}`" for name in BENCHMARKS if name not in {name for name, _ in tables}]
    lines += [f"Still to be measured: {', '.join(owed)}.", ""] if owed else []
    return "\n".join(lines)


def _module(name: str) -> Any:
    return import_module(f"jobs.benchmarks.{name}")


if __name__ == "__main__":
    sys.exit(main())
