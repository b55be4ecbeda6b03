"""The loop of the train job, against a bare loop over tensors in memory."""

import json
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import vlsm
from jobs.benchmarks.figures import write_json
from jobs.benchmarks.interleaved_worker import TURNS_NAME
from jobs.command import RaySession
from jobs.phantoms import KINDS, write_labelled
from jobs.train import train_with_ray
from jobs.train_feed import inspect_records
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
    parser.add_argument("--setup", action="append", choices=SETUPS, help="may be repeated (default: all)")
    parser.add_argument(
        "--examples", type=int, default=64, metavar="N", help="examples per epoch, 1/4 of them validation (64)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved epochs; the median counts (5)")


def measure(args: Namespace) -> int:
    """Measure examples per second of the train job and of a bare loop in the same process, with interleaved epochs.

    The job reads, trains, validates and scores. The end of an epoch is measured separately: the seconds without
    training, and the seconds of saving during the next epoch. The bare loop has the same batches in memory, normalised
    and with encoded prompts; with the feature cache it also has the features of the frozen towers. It trains, and
    computes the logits of the validation examples. The first epoch of each does not count.
    """
    parameters = {"model": args.model, "examples": args.examples, "batch_size": _BATCH_SIZE, "repeats": args.repeats}
    rows: list[dict[str, Any]] = []
    print(f"{'setup':14} {'job, examples/s':>16} {'bare':>8} {'ratio':>7} {'end, s':>7} {'beside, s':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_val = max(1, args.examples // 4 // len(KINDS))
        write_labelled(folder / "drawn", {"train": args.examples // len(KINDS) - num_val, "val": num_val}, seed=0)
        model = build_architecture(args.model, folder / "parts", "cpu")
        vlsm.save_checkpoint(model, folder / "checkpoint", prompt=KINDS[0])
        for setup in args.setup or SETUPS:
            turns = _run(folder, setup, args.repeats)
            medians = {name: statistics.median(turn[name] for turn in turns[1:]) for name in turns[0]}
            examples = len(KINDS) * (args.examples // len(KINDS))
            row: dict[str, Any] = {"setup": setup, **medians, "turns": turns}
            row |= {"job_per_s": examples / row["steps_s"], "bare_per_s": examples / row["bare_s"]}
            row["efficiency"] = statistics.median(turn["bare_s"] / turn["steps_s"] for turn in turns[1:])
            rows.append(row)
            print(
                "{setup:14} {job_per_s:16.2f} {bare_per_s:8.2f} {efficiency:6.2f}x "
                "{end_s:7.2f} {beside_s:10.2f}".format(**row),
                flush=True,
            )
            write_json(args.json, "train", parameters | {"runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"Examples a second of training `{figures['model']}` at its published size, its towers frozen, in batches of "
        f"{figures['batch_size']}: the job against a bare loop over tensors in memory, with the feature cache over the "
        f"towers' features. Epochs of {figures['examples']} examples, a quarter of them to validate, of both in turns, "
        f"medians of {figures['repeats']}. What the end of an epoch takes is told apart: the seconds "
        "until the job goes on, and those in which checkpoint and state are put on the disk beside the next epoch.",
        "",
        "| | the job | bare loop | job to bare | to the first row's job | end of an epoch, s | beside the next, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        lines.append(
            f"| {row['setup']} | {row['job_per_s']:.1f} | {row['bare_per_s']:.1f} | {row['efficiency']:.2f}x | "
            f"{row['job_per_s'] / figures['runs'][0]['job_per_s']:.2f}x | "
            f"{row['end_s']:.1f} | {row['beside_s']:.1f} |"
        )
    return lines


def _run(folder: Path, setup: str, repeats: int) -> list[dict[str, float]]:
    """Train with one setup, and return the seconds of each pair of epochs (job and bare loop)."""
    workers, cache_bytes = SETUPS[setup]
    output = folder / setup
    settings = TrainSettings.model_validate(
        {
            "output": str(output),
            "datasets": {"drawn": str(folder / "drawn")},
            "start_from": str(folder / "checkpoint"),
            "optim": {"epochs": repeats + 1, "batch_size": _BATCH_SIZE},
            "run": {
                "workers": workers,
                "micro_batch_size": _BATCH_SIZE // workers,
                "feature_cache_bytes": cache_bytes,
                "max_failures": 0,
            },
        }
    )
    with RaySession() as session:
        session.wait()
        records = prepare_training(settings, lambda records: inspect_records(records, settings.data))
        train_with_ray(settings, records, "jobs.benchmarks.interleaved_worker:train_in_turns")
    return list(json.loads((output / TURNS_NAME).read_text(encoding="utf-8")))
