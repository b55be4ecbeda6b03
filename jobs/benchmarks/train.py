"""The train job's loop against a bare loop over tensors in memory."""

import json
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlsm
from jobs.benchmarks.figures import write_json
from jobs.command import ray_session
from jobs.feeding import Loaded, inspect_records
from jobs.group import Work
from jobs.train import execute
from jobs.train_worker import Worker
from vlsm.images import normalize
from vlsm.losses import segmentation_losses
from vlsm.models import MODELS
from vlsm.models.costs import build_architecture
from vlsm.models.prompts import PromptCache
from vlsm.phantoms import KINDS, write_labelled
from vlsm.recipe import TrainSettings
from vlsm.training_run import prepare_training

SETUPS = {"one worker": (1, 0), "two workers": (2, 0), "feature cache": (1, 1 << 40)}  # workers, bytes of the cache
_TURNS_NAME = "turns.json"
_BATCH_SIZE = 8


def add_arguments(parser: ArgumentParser) -> None:
    """Those of `python -m jobs.benchmark train`."""
    parser.add_argument(
        "--model", default="biomedclipseg", choices=MODELS, help="at its published size (biomedclipseg)"
    )
    parser.add_argument("--setup", action="append", choices=SETUPS, help="all of them by default")
    parser.add_argument("--examples", type=int, default=96, metavar="N", help="of an epoch, a quarter to validate (96)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="epochs in turns; the median counts (5)")


def measure(args: Namespace) -> int:
    """Examples a second of the train job, and of a bare loop in the same process: an epoch of each in turns.

    An epoch of the job is all that it does: reading, learning, validating, scores, saving. The bare loop has the
    same batches in memory, normalised, its prompts encoded, and with the feature cache what the frozen towers make of
    them; it learns, and computes the validation's logits. The first turn does not count.
    """
    rows = []
    print(f"{'setup':14} {'job, examples/s':>16} {'bare':>8} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_val = max(1, args.examples // 4 // len(KINDS))
        write_labelled(folder / "drawn", {"train": args.examples // len(KINDS) - num_val, "val": num_val}, seed=0)
        model = build_architecture(args.model, folder / "parts", "cpu")
        vlsm.save_checkpoint(model, folder / "checkpoint", prompt=KINDS[0])
        for setup in args.setup or SETUPS:
            turns = _run(folder, setup, args.repeats)
            job_s, bare_s = (statistics.median(turn[name] for turn in turns[1:]) for name in ("job_s", "bare_s"))
            examples = len(KINDS) * (args.examples // len(KINDS))
            row = {"setup": setup, "job_per_s": examples / job_s, "bare_per_s": examples / bare_s, "turns": turns}
            rows.append(row | {"efficiency": bare_s / job_s})
            print(f"{setup:14} {examples / job_s:16.2f} {examples / bare_s:8.2f} {bare_s / job_s:6.2f}x", flush=True)
    told = {"model": args.model, "examples": args.examples, "batch_size": _BATCH_SIZE, "repeats": args.repeats}
    write_json(args.json, "train", told | {"rows": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """The README's lines of what was measured."""
    lines = [
        f"Examples a second of training `{figures['model']}` at its published size, its towers frozen, in batches of "
        f"{figures['batch_size']}: the job, with all that an epoch of {figures['examples']} examples (a quarter "
        f"of them to validate) takes, against a bare loop over tensors in memory; medians of {figures['repeats']} epochs each, "
        "in turns. With the feature cache the bare loop has the towers' features in memory.",
        "",
        "| | the job | bare loop | job to bare |",
        "|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['setup']} | {row['job_per_s']:.1f} | {row['bare_per_s']:.1f} | {row['efficiency']:.2f}x |"
        )
    return lines


def _run(folder: Path, setup: str, repeats: int) -> list[dict[str, float]]:
    """The seconds of the turns."""
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
    with ray_session(log_to_driver=False):
        records = prepare_training(settings, lambda records: inspect_records(records, settings.data))
        execute(settings, records, _train_in_turns)
    return list(json.loads((output / _TURNS_NAME).read_text(encoding="utf-8")))


def _train_in_turns(work: Work) -> None:
    torch.set_num_threads(work.num_threads)
    _InTurns(work).run()


@dataclass(frozen=True)
class _Batch:
    """What the bare loop has in memory of one micro-batch."""

    pixel_values: Tensor
    targets: Tensor
    prompts: Any
    features: Any


class _InTurns(Worker):
    """A worker that does an epoch of the bare loop after each of its own."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._prompt_cache = PromptCache(self.learner.model)
        self._train = self._keep(self.feed.stream(self.plan.train(0)))
        self._val = self._keep(self.feed.stream(self.plan.evaluate("val", 0)))
        self._turns: list[dict[str, float]] = []
        self._started_s = time.perf_counter()

    def end_epoch(self, epoch: int) -> None:
        """The worker's own epoch ends here."""
        super().end_epoch(epoch)
        between_s = time.perf_counter()
        self._train_barely()
        ended_s = time.perf_counter()
        self._turns.append({"job_s": between_s - self._started_s, "bare_s": ended_s - between_s})
        if self.rank == 0:
            Path(self.output, _TURNS_NAME).write_text(json.dumps(self._turns), encoding="utf-8")
        self._started_s = time.perf_counter()

    def _keep(self, stream: Iterable[Loaded]) -> list[_Batch]:
        return [self._prepare(*loaded) for loaded in stream]

    @torch.no_grad()
    def _prepare(self, batch: Any, images: np.ndarray, masks: np.ndarray) -> _Batch:
        model = self.learner.model
        pixel_values = normalize(torch.from_numpy(images), model.image_spec)
        features = model.encode_towers(pixel_values) if self.features is not None else None
        prompts = list(batch.prompts) if model.learns_text else self._prompt_cache.encode(batch.prompts)
        return _Batch(pixel_values, torch.from_numpy(masks)[:, None].float(), prompts, features)

    def _train_barely(self) -> None:
        network, optimizer, optim = self.learner.network, self.learner.optimizer, self.settings.optim
        learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        network.train()
        for batch in self._train:
            logits = network(batch.pixel_values, batch.prompts, batch.features)
            segmentation_losses(logits, batch.targets, optim.dice_weight, optim.ce_weight).mean().backward()
            torch.nn.utils.clip_grad_norm_(learning, optim.clip_norm or np.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        network.eval()
        with torch.no_grad():
            for batch in self._val:
                network(batch.pixel_values, batch.prompts, batch.features)
