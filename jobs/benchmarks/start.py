"""Seconds from a command to its first image, per milestone, for both jobs on one machine."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import vlsm
from jobs.benchmarks.figures import write_json
from jobs.phantoms import write_labelled
from vlsm.errors import ResultError
from vlsm.models import MODELS

_ROOT = Path(__file__).parents[2]
_NUM_IMAGES = 9


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark start`."""
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs per command; the medians count (3)")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated (unet_d and clipseg)")


def measure(args: Namespace) -> int:
    """Measure both jobs over a few drawn images, each in a new process that starts Ray. The jobs log their milestones.

    Models have their published sizes and random weights.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_labelled(folder / "labelled", {"train": _NUM_IMAGES, "val": 1}, seed=0)
        for name in args.model or ("unet_d", "clipseg"):
            options = _options(name, folder)
            vlsm.save_checkpoint(vlsm.build_model(name, **options), folder / name, prompt="lesion")
            for job in ("segment", "train"):
                runs = [_run(job, name, options, folder, repeat) for repeat in range(args.repeats)]
                medians = {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
                rows.append({"job": job, "model": name, "seconds": medians})
                print(f"{job:8} {name:10} {', '.join(f'{key} {value}' for key, value in medians.items())}", flush=True)
    write_json(args.json, "start", {"repeats": args.repeats, "runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"Seconds from the command, medians of {figures['repeats']}, with Ray started by the job itself. "
        "Models have their published sizes.",
        "",
        "| job | model | milestones, s |",
        "|---|---|---|",
    ]
    for row in figures["runs"]:
        milestones = ", ".join(f"{name} {seconds}" for name, seconds in row["seconds"].items())
        lines.append(f"| {row['job']} | `{row['model']}` | {milestones} |")
    return lines


def _options(name: str, folder: Path) -> dict[str, Any]:
    if name != "clipseg":
        return {}
    from vlsm.models.untrained import write_clipseg  # imported here: it imports transformers

    return {"source": str(write_clipseg(folder / "source"))}


def _run(job: str, name: str, options: dict[str, Any], folder: Path, repeat: int) -> dict[str, float]:
    """Run a job, and return the seconds from its command to each milestone and to its end."""
    output = str(folder / f"{job} {name} {repeat}")
    if job == "segment":
        words = [str(folder / "labelled" / "images"), output, "--checkpoint", str(folder / name)]
    else:
        words = [output, "--dataset", f"drawn={folder / 'labelled'}", "--set", f"model={name}"]
        settings = [f"options.{key}={value}" for key, value in options.items()]
        settings += ["optim.epochs=1", "optim.batch_size=4", "run.micro_batch_size=4"]
        words += [word for setting in settings for word in ("--set", setting)]
    started_s = time.time()
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *words],
        cwd=_ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    logged = re.search(r"seconds from the start: (.*)", done.stderr)
    if done.returncode or logged is None:
        raise ResultError(f"jobs.{job} failed: {done.stderr[-2000:]}")
    reached = (milestone.rpartition(" ") for milestone in logged[1].split(", "))
    return {key: float(value) for key, _, value in reached} | {"end": time.time() - started_s}
