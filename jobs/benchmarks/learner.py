"""The training step on one device, in every way that a run can ask for, against a bare loop. It needs no Ray."""

import contextlib
import copy
import itertools
import logging
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from jobs.benchmarks.figures import alternate, write_json
from jobs.phantoms import KINDS, draw_phantom
from vlsm.config import parse_assignments
from vlsm.errors import VlsmError
from vlsm.images.preprocess import Square
from vlsm.models import MODELS
from vlsm.models.contract import SegmentationModel
from vlsm.models.costs import build_architecture
from vlsm.models.prompts import PromptCache
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import History
from vlsm.training.learner import Learner, Score
from vlsm.training.losses import segmentation_losses
from vlsm.training.memory import explain_out_of_memory
from vlsm.training.parallel import is_sharded
from vlsm.training.sampling import MicroBatch
from vlsm.training.settings import TrainSettings
from vlsm.training.staging import stage


@dataclass(frozen=True)
class Way:
    """One way to train."""

    precision: str = "bf16"
    trainable: str = "decoder"
    compile: bool = False
    fsdp: bool = False
    has_cache: bool = False


WAYS = {
    "fp32": Way("fp32"),
    "bf16": Way(),
    "fp16": Way("fp16"),
    "compiled": Way(compile=True),
    "feature cache": Way(has_cache=True),
    "all weights": Way(trainable="all"),
    "FSDP": Way(trainable="all", fsdp=True),
}
_NUM_IMAGES = 16


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark learner`."""
    parser.add_argument("--model", default="clipseg", choices=MODELS, help="model, at its published size (clipseg)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="option of the model, such as image_size=96"
    )
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples of a step (16)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a round (20)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved rounds; the median counts (3)")
    parser.add_argument("--device", default="cuda", help="torch device (cuda); cpu tries the benchmark without a GPU")


def measure(args: Namespace) -> int:
    """Measure examples per second of the learner and of a bare loop, in turns, with the same model and optimiser.

    The learner gets images from the CPU's memory, as in the train job: it copies, normalises, trains and scores them.
    The bare loop has normalised images and encoded prompts on the device. Both have the same precision, and with the
    feature cache the bare loop has the features on the device. FSDP runs in a group of one process. At the end, the
    model asks for more memory than there is, and the message of the job is printed. A way that fails does not end the
    benchmark, but its exit code is 1.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --device cpu tries the benchmark without one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    options, device = parse_assignments(args.option), torch.device(args.device)
    figures: dict[str, Any] = {
        "model": args.model, "options": options, "batch_size": args.batch_size, "steps": args.steps,
        "repeats": args.repeats, "runs": [], "failed": {}, "out_of_memory": None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }  # fmt: skip
    print(f"{'way':14} {'learner, /s':>11} {'bare, /s':>9} {'ratio':>6} {'first step, s':>13} {'GB':>6} {'loss':>15}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_architecture(args.model, folder, "cpu", options)
        for name in dict.fromkeys(args.way or WAYS):
            way = WAYS[name]
            if way.has_cache and not model.set_trainable("decoder").has_frozen_towers:
                print(f"{name:14} left out: {args.model} has no towers")
                continue
            try:
                with _group(folder / "group" if way.fsdp else None):
                    figures["runs"].append(_measure(name, way, copy.deepcopy(model), args, folder / "features"))
            except Exception as error:  # any error of a driver, a kernel or the allocator: the next way may work
                figures["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"{name:14} failed: {figures['failed'][name]}", flush=True)
            write_json(args.json, "learner", figures)
        figures["out_of_memory"] = _run_out_of_memory(copy.deepcopy(model), args)
    print(figures["out_of_memory"])
    write_json(args.json, "learner", figures)
    return 1 if figures["failed"] else 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    options = ", ".join(f"{key}={value}" for key, value in figures["options"].items())
    size = f"with {options}" if options else "at its published size"
    lines = [
        f"Examples a second of training `{figures['model']}` {size} in steps of {figures['batch_size']}: the learner, "
        "which copies, normalises and scores, against a bare loop over tensors on the device, medians of "
        f"{figures['repeats']} turns of {figures['steps']} steps. All but fp32 and fp16 run in bf16; FSDP in a group "
        "of one process.",
        "",
        "| | learner | bare loop | learner to bare | first step, s | memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        memory = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "-"
        lines.append(
            f"| {row['way']} | {row['learner_per_s']:,.1f} | {row['bare_per_s']:,.1f} | {row['efficiency']:.2f}x | "
            f"{row['first_step_s']:.1f} | {memory} |"
        )
    return lines


@contextlib.contextmanager
def _group(folder: Path | None) -> Iterator[None]:
    """Return a context with a group of this process alone, or without one if there is no folder."""
    if folder is None:
        yield
        return
    folder.mkdir()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _settings(way: Way, args: Namespace) -> TrainSettings:
    optim = {"batch_size": args.batch_size, "precision": way.precision, "schedule": "constant", "lr": 1e-4}
    run = {"micro_batch_size": args.batch_size, "compile": way.compile, "fsdp": way.fsdp}
    return TrainSettings.model_validate(
        {
            "output": "unused", "datasets": {"drawn": "unused"}, "model": args.model, "trainable": way.trainable,
            "optim": optim, "run": run,
        }
    )  # fmt: skip


def _measure(name: str, way: Way, model: SegmentationModel, args: Namespace, features: Path) -> dict[str, Any]:
    """Measure one way to train, print its line, and return its figures."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.compiler.reset()  # otherwise the graphs of another way count
    model.set_trainable(way.trainable).train()  # type: ignore[arg-type]
    cache = FeatureCache(features, 1 << 40) if way.has_cache else None
    learner = Learner(model, _settings(way, args), 1 << 30, device, cache)
    steps = _Steps(learner, args.batch_size)
    with _Warnings(logging.WARNING) as warnings:
        start_s = time.perf_counter()
        first = steps.learn(1)
        first_step_s = time.perf_counter() - start_s
        bare = steps.prepare_bare()
        seconds = alternate(args.repeats, lambda: steps.learn(args.steps), lambda: bare(args.steps))
        last = steps.learn(1)
    if way.fsdp and not is_sharded(model):
        raise VlsmError("FSDP has not sharded the model")
    examples = args.steps * args.batch_size
    row = {
        "way": name, "learner_per_s": examples / seconds[0], "bare_per_s": examples / seconds[1],
        "efficiency": seconds[1] / seconds[0], "first_step_s": first_step_s, "first_loss": first, "last_loss": last,
        "is_fused": bool(learner.optimizer.param_groups[0]["fused"]), "warnings": warnings,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }  # fmt: skip
    print(
        f"{name:14} {row['learner_per_s']:11.1f} {row['bare_per_s']:9.1f} {row['efficiency']:5.2f}x "
        f"{first_step_s:13.1f} {row['peak_bytes'] / 1e9:6.1f} {first:6.3f} > {last:6.3f}",
        flush=True,
    )
    for warning in warnings:
        print(f"{'':14} {warning}")
    return row


class _Steps:
    """Endless steps of a learner over drawn images, and the same steps of a bare loop."""

    def __init__(self, learner: Learner, batch_size: int) -> None:
        self.learner, self.batch_size = learner, batch_size
        square = learner.model.image_spec.square
        self._examples = [_draw(square, seed) for seed in range(_NUM_IMAGES)]
        self._numbers = itertools.count()

    def learn(self, count: int) -> float:
        """Make steps of the learner, as the train job does. Returns the mean loss of the last one."""
        scores: list[Score] = []
        loaded = (self._load(number) for number in itertools.islice(self._numbers, count))
        for batch, images, target_masks in stage(loaded, self.learner.device):
            scores = self.learner.train(batch, images, target_masks, History())
        self._synchronize()
        return sum(score.loss for score in scores) / len(scores)

    @torch.no_grad()
    def prepare_bare(self) -> Callable[[int], None]:
        """Return a function that makes steps of the bare loop."""
        learner, model, device = self.learner, self.learner.model, self.learner.device
        batch, images, masks = self._load(0)
        pixel_values = model.image_spec.normalize(torch.from_numpy(images).to(device))
        targets = torch.from_numpy(masks).to(device)[:, None].float()
        prompts = list(batch.prompts) if model.learns_text else PromptCache(model).encode(batch.prompts)
        with self._autocast():
            features = model.encode_towers(pixel_values) if learner.features is not None else None

        @torch.enable_grad()
        def run(count: int) -> None:
            learner.network.train()
            for _ in range(count):
                self._step_bare(pixel_values, prompts, features, targets)
            self._synchronize()

        return run

    def _step_bare(self, pixel_values: Tensor, prompts: Any, features: Any, targets: Tensor) -> None:
        learner, optim = self.learner, self.learner.settings.optim
        with self._autocast():
            logits = learner.network(pixel_values, prompts, features)
        losses = segmentation_losses(logits, targets, optim.dice_weight, optim.ce_weight)
        learner.scaler.scale(losses.mean()).backward()  # type: ignore[no-untyped-call]
        learner.scaler.unscale_(learner.optimizer)
        weights = [weight for group in learner.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, optim.clip_norm or np.inf)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        learner = self.learner
        return torch.autocast(learner.device.type, learner.autocast, enabled=learner.autocast is not None)

    def _load(self, number: int) -> tuple[MicroBatch, np.ndarray, np.ndarray]:
        examples = tuple((number * self.batch_size + index) % _NUM_IMAGES for index in range(self.batch_size))
        images, masks = zip(*(self._examples[example] for example in examples), strict=True)
        prompts = tuple(KINDS[example % len(KINDS)] for example in examples)
        ones, zeros = (1,) * self.batch_size, (0,) * self.batch_size
        batch = MicroBatch("train", 0, number, True, self.batch_size, examples, ones, prompts, zeros)
        return batch, np.stack(images), np.stack(masks)

    def _synchronize(self) -> None:
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)


def _draw(square: Square, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (S, S, 3) uint8 and the mask (S, S) uint8 of one of its objects."""
    image, masks = draw_phantom(np.random.default_rng(seed))
    return square.resize_image(image), square.resize_mask(masks[KINDS[seed % len(KINDS)]].astype(np.uint8))


def _run_out_of_memory(model: SegmentationModel, args: Namespace) -> str:
    """Let the model ask for a pebibyte in its forward pass, and return the message of the job."""
    settings = _settings(Way(), args)
    learner = Learner(model.train(), settings, 1 << 30, torch.device(args.device))

    def ask(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=learner.device)

    learner.model.register_forward_hook(ask)
    try:
        _Steps(learner, args.batch_size).learn(1)
    except Exception as error:  # which class it has is what is tried here
        return explain_out_of_memory(error, settings) or f"not recognised: {type(error).__name__}: {error}"
    return "the device gave a pebibyte"


class _Warnings(logging.Handler):
    """A context that keeps the warnings of the library."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        logging.getLogger("vlsm").addHandler(self)
        return self.lines

    def __exit__(self, *error: object) -> None:
        logging.getLogger("vlsm").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
