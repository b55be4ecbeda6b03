"""Seconds from a command to its first image, per milestone, for both jobs on one machine."""

import json
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
_FLOOR = "libraries alone"
# what a model's process imports besides ray.data and torch
_LIBRARIES: dict[str, list[str]] = {
    "pixel": [],
    "unet_d": [],
    "clipseg": ["transformers.models.clipseg.modeling_clipseg"],
}
_LOAD_LIBRARIES = """
import importlib, json, os, sys, time
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
import ray
ray.init("local", include_dashboard=False, log_to_driver=False)
reached = {"Ray": time.time()}
@ray.remote
class Actor:
    def load(self, names):
        for name in names:
            importlib.import_module(name)
        return time.time()
reached["libraries"] = ray.get(Actor.remote().load.remote(["ray.data", "torch", *sys.argv[1:]]))
print(json.dumps(reached))
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark start`."""
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs per command; the medians count (3)")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated (unet_d and clipseg)")


def measure(args: Namespace) -> int:
    """Measure both jobs over a few drawn images, each in a new process that starts Ray. The jobs log their milestones.

    Models have their published sizes and random weights. "libraries alone" is the floor of a segment run: Ray
    starts, and an actor imports ray.data, torch and the library of the model, with nothing else on the machine.
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
                rows.append({"job": job, "model": name, "seconds": _medians(runs)})
                _show(rows[-1])
            if name in _LIBRARIES:
                runs = [_load_libraries(_LIBRARIES[name]) for _ in range(args.repeats)]
                rows.append({"job": _FLOOR, "model": name, "seconds": _medians(runs)})
                _show(rows[-1])
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
    if any(row["job"] == _FLOOR for row in figures["runs"]):
        lines += [
            "",
            f"`{_FLOOR}`: a process starts Ray, and an actor imports `ray.data`, torch and the model's library.",
        ]
    return lines


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}


def _show(row: dict[str, Any]) -> None:
    told = ", ".join(f"{key} {value}" for key, value in row["seconds"].items())
    print(f"{row['job']:15} {row['model']:10} {told}", flush=True)


def _load_libraries(names: list[str]) -> dict[str, float]:
    """Return the seconds from the command until Ray has started, and until an actor of its has the libraries."""
    started_s = time.time()
    command = [sys.executable, "-c", _LOAD_LIBRARIES, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResultError(f"Ray and the libraries did not start: {done.stderr[-2000:]}")
    reached = json.loads(done.stdout.splitlines()[-1])
    return {key: time_s - started_s for key, time_s in reached.items()}


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
