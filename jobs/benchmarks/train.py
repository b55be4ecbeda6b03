"""The loop of the train job, against a bare loop over tensors in memory."""

import contextlib
import itertools
import os
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlsm
from jobs.benchmarks.busy import Levels, Turn
from jobs.benchmarks.figures import write_json
from jobs.benchmarks.interleaved_worker import LAST_TIME, TURNS_NAME
from jobs.command import RaySession
from jobs.phantoms import KINDS, write_labelled
from jobs.train import train_with_ray
from jobs.train_feed import inspect_records
from vlsm.config import parse_assignments
from vlsm.models import MODELS
from vlsm.models.costs import build_architecture
from vlsm.training.run import prepare_training
from vlsm.training.settings import TrainSettings

SETUPS = {
    "one worker": (1, 0),
    "two workers": (2, 0),
    "feature cache": (1, 1 << 40),
}  # (workers, bytes of the feature cache)
_BATCH_SIZE = 8


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark train`."""
    parser.add_argument(
        "--model", default="biomedclipseg", choices=MODELS, help="model, at its published size (biomedclipseg)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="option of the model, such as image_size=96"
    )
    parser.add_argument("--setup", action="append", choices=SETUPS, help="may be repeated (default: all)")
    parser.add_argument(
        "--examples", type=int, default=64, metavar="N", help="examples per epoch, 1/4 of them validation (64)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="interleaved epochs of each load; the median counts (5)"
    )
    parser.add_argument(
        "--busy", type=int, action="append", metavar="N", help="busy loops beside the job; may be repeated (0)"
    )
    parser.add_argument(
        "--busy-limit", type=float, default=60, metavar="S", help="longest time of a load with busy loops, in s (60)"
    )
    parser.add_argument(
        "--niceness",
        type=int,
        action="append",
        choices=range(20),
        metavar="N",
        help="what Ray adds to the niceness of its workers; may be repeated (what the job sets, 0; Ray itself has 15)",
    )


def measure(args: Namespace) -> int:
    """Measure examples per second of the train job and of a bare loop in the same process, with interleaved epochs.

    The job reads, trains, validates and scores. The end of an epoch is measured separately: the seconds without
    training, and the seconds of saving during the next epoch. The bare loop has the same batches in memory, normalised
    and with encoded prompts; with the feature cache it also has the features of the frozen towers. It trains, and
    computes the logits of the validation examples. The first epoch of each does not count.

    With several values of --niceness, the job is compared with the bare loop at the first of them, under the same load.
    If not even one epoch ends within --busy-limit, the rate is an upper bound.
    """
    options = parse_assignments(args.option)
    parameters = {"model": args.model, "options": options, "examples": args.examples, "batch_size": _BATCH_SIZE}
    parameters |= {"repeats": args.repeats}
    rows: list[dict[str, Any]] = []
    print(f"{'':14} {'nice-':>5} {'busy':>5} {'job,':>11} {'bare':>8} {'job to':>7} {'end,':>6} {'beside,':>8}")
    print(f"{'setup':14} {'ness':>5} {'loops':>5} {'examples/s':>11} {'loop':>8} {'bare':>7} {'s':>6} {'s':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_val = max(1, args.examples // 4 // len(KINDS))
        write_labelled(folder / "drawn", {"train": args.examples // len(KINDS) - num_val, "val": num_val}, seed=0)
        model = build_architecture(args.model, folder / "parts", "cpu", options)
        vlsm.save_checkpoint(model, folder / "checkpoint", prompt=KINDS[0])
        for setup, niceness in itertools.product(args.setup or SETUPS, args.niceness or [None]):
            for busy, turns in zip(args.busy or [0], _run(folder, setup, niceness, args), strict=True):
                rows.append(_row(setup, busy, turns, args, rows))
                print(_line(rows[-1]), flush=True)
            write_json(args.json, "train", parameters | {"runs": rows})
    return 0


def _row(setup: str, busy: int, turns: list[Turn], args: Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a setup under one load. `turns` are the epochs that ended in time, the last one in part."""
    examples = len(KINDS) * (args.examples // len(KINDS))
    row: dict[str, Any] = {"setup": setup, "busy": busy, "turns": turns, "is_bound": not turns}
    for name in dict.fromkeys(name for turn in turns for name in turn):
        row[name] = statistics.median(turn[name] for turn in turns if name in turn)
    row["job_per_s"] = examples / row.get("steps_s", args.busy_limit)
    row["bare_per_s"] = examples / row["bare_s"] if "bare_s" in row else None
    same = [other for other in rows if (other["setup"], other["busy"]) == (setup, busy)]
    if same and same[0]["bare_per_s"]:
        row["efficiency"] = row["job_per_s"] / same[0]["bare_per_s"]
    else:
        whole = [turn["bare_s"] / turn["steps_s"] for turn in turns if "bare_s" in turn]
        row["efficiency"] = statistics.median(whole) if whole else None
    return row


def _line(row: dict[str, Any]) -> str:
    cells = [row["setup"].ljust(14), _number(row.get("niceness"), "5.0f"), _number(row["busy"], "5.0f")]
    cells += [f"{_bound(row)}{row['job_per_s']:.2f}".rjust(11), _number(row["bare_per_s"], "8.2f")]
    cells += [_number(row["efficiency"], "6.2f") + "x", _number(row.get("end_s"), "6.2f")]
    return " ".join([*cells, _number(row.get("beside_s"), "8.2f")])


def _bound(row: dict[str, Any]) -> str:
    return "< " if row.get("is_bound") else ""


def _number(value: float | None, form: str) -> str:
    """Return a number as text, or a dash if it was not measured."""
    return f"{value:{form}}" if value is not None else "-".rjust(int(form.partition(".")[0]))


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    options = ", ".join(f"{key}={value}" for key, value in figures.get("options", {}).items())
    size = f"with {options}" if options else "at its published size"
    lines = [
        f"Examples a second of training `{figures['model']}` {size}, its towers frozen, in batches of "
        f"{figures['batch_size']}: the job against a bare loop over tensors in memory, with the feature cache over the "
        f"towers' features. Epochs of {figures['examples']} examples, a quarter of them to validate, of both in turns, "
        f"medians of {figures['repeats']}. What the end of an epoch takes is told apart: the seconds "
        "until the job goes on, and those in which checkpoint and state are put on the disk beside the next epoch.",
        "",
        "| | the job | bare loop | job to bare | to the first row's job | end of an epoch, s | beside the next, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        load = f", {row['busy']} busy loops, niceness {_number(row.get('niceness'), '1.0f')}" if "busy" in row else ""
        lines.append(
            f"| {row['setup']}{load} | {_bound(row)}{row['job_per_s']:.1f} | {_number(row['bare_per_s'], '1.1f')} | "
            f"{_bound(row)}{_number(row['efficiency'], '1.2f')}x | "
            f"{_bound(row)}{row['job_per_s'] / figures['runs'][0]['job_per_s']:.2f}x | "
            f"{_number(row.get('end_s'), '1.1f')} | {_number(row.get('beside_s'), '1.1f')} |"
        )
    return lines


def _run(folder: Path, setup: str, niceness: int | None, args: Namespace) -> list[list[Turn]]:
    """Train with one setup, and return for each load the seconds of each pair of epochs (job and bare loop)."""
    workers, cache_bytes = SETUPS[setup]
    output = folder / f"{setup} {niceness}"
    loads = args.busy or [0]
    settings = TrainSettings.model_validate(
        {
            "output": str(output),
            "datasets": {"drawn": str(folder / "drawn")},
            "start_from": str(folder / "checkpoint"),
            "optim": {"epochs": args.repeats * len(loads) + 1, "batch_size": _BATCH_SIZE},
            "run": {
                "workers": workers,
                "micro_batch_size": _BATCH_SIZE // workers,
                "feature_cache_bytes": cache_bytes,
                "max_failures": 0,
            },
        }
    )
    levels = Levels(output / TURNS_NAME, loads, args.repeats, args.busy_limit, lambda turn: LAST_TIME in turn)
    with _added_niceness(niceness), RaySession() as session:
        session.wait()
        records = prepare_training(settings, lambda records: inspect_records(records, settings.data))
        with levels:
            train_with_ray(settings, records, "jobs.benchmarks.interleaved_worker:train_in_turns")
    return levels.turns


@contextlib.contextmanager
def _added_niceness(niceness: int | None) -> Iterator[None]:
    """Return a context in which Ray, if it starts here, adds this to the niceness of its workers; None: as in a job."""
    key = "RAY_worker_niceness"
    before = os.environ.get(key)
    if niceness is not None:
        os.environ[key] = str(niceness)
    try:
        yield
    finally:
        os.environ.pop(key, None)
        if before is not None:
            os.environ[key] = before
