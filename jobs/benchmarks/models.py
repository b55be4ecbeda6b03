"""Each model on the CPU: this package against the plain way."""

import copy
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.benchmarks.figures import alternate, write_json
from vlsm.checkpoints import Checkpoint, CheckpointSettings
from vlsm.models import MODELS
from vlsm.models.clipseg import CLIPSegTowers
from vlsm.models.costs import build_architecture
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.segmentation.segmenter import Segmenter

_PROMPTS = [
    f"a {size} {shape} polyp" for size in ("small", "large") for shape in ("flat", "round", "bright", "left", "")
]


@dataclass(frozen=True)
class ModelSpeed:
    """Seconds per image of one model with one prompt and with ten: ours, and the plain way."""

    name: str
    image_size: int
    ours_1_s: float
    plain_1_s: float
    ours_10_s: float
    plain_10_s: float
    largest_difference: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark models`."""
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated (default: all models)")
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="rounds; the median counts (5)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the input (default: as published)")


def measure(args: Namespace) -> int:
    """Measure seconds per image of each model at its published size on the CPU, ours against the plain way.

    The plain way pads prompts as CLIP does, and runs the whole model, text tower included,
    once per image and prompt, with unfolded batch norms and channels first. Ours is the Segmenter, with prompts encoded
    beforehand; a network without text input runs once for all prompts. The two ways run interleaved. The benchmark
    fails if their logits differ by 0.001 of the largest logit or more.
    """
    torch.set_num_threads(args.threads)
    speeds = []
    print(f"{'':15} {'1 prompt, s':>22} {'':>6} {'10 prompts, s':>22} {'':>6} {'10 to 1':>8}")
    print(f"{'model':15} {'ours':>11}{'plain':>11} {'ratio':>6} {'ours':>11}{'plain':>11} {'ratio':>6} {'ours':>8}")
    for name in args.model or MODELS:
        speed = _measure_model(name, args.repeats, args.image_size)
        speeds.append(speed)
        print(
            f"{name:15} {speed.ours_1_s:11.3f}{speed.plain_1_s:11.3f} {speed.plain_1_s / speed.ours_1_s:5.2f}x "
            f"{speed.ours_10_s:11.3f}{speed.plain_10_s:11.3f} {speed.plain_10_s / speed.ours_10_s:5.2f}x "
            f"{speed.ours_10_s / speed.ours_1_s:7.2f}x",
            flush=True,
        )
    runs = [asdict(speed) | {"repeats": args.repeats} for speed in speeds]
    figures = {"threads": args.threads, "runs": runs}
    write_json(args.json, "models", figures)
    wrong = [speed.name for speed in speeds if not speed.largest_difference < 1e-3]
    if wrong:
        print(
            f"error: the logits of the two ways differ by 0.001 of the largest or more: {', '.join(wrong)}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"Seconds an image of the Segmenter and of the plain way, {figures['threads']} threads, medians of the rounds:",
        "",
        "| model | pixels | rounds | 1 prompt: ours | plain | ratio | 10 prompts: ours | plain | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        ours_1, plain_1, ours_10, plain_10 = (row[f"{way}_s"] for way in ("ours_1", "plain_1", "ours_10", "plain_10"))
        lines.append(
            f"| `{row['name']}` | {row['image_size']} | {row['repeats']} | "
            f"{ours_1:.3f} | {plain_1:.3f} | {plain_1 / ours_1:.2f}x | "
            f"{ours_10:.3f} | {plain_10:.3f} | {plain_10 / ours_10:.2f}x |"
        )
    return lines


def _measure_model(name: str, repeats: int, image_size: int | None) -> ModelSpeed:
    options = None if image_size is None else {"image_size": image_size}
    with tempfile.TemporaryDirectory() as folder:
        plain = build_architecture(name, Path(folder), "cpu", options)
    spec = plain.image_spec
    settings = CheckpointSettings(model=name, options={}, image=asdict(spec))
    segmenter = Segmenter(Checkpoint(copy.deepcopy(plain), settings, name), device="cpu")
    images = np.random.default_rng(0).integers(0, 255, (1, spec.size, spec.size, 3), dtype=np.uint8)
    for towers in (part for part in plain.modules() if isinstance(part, OpenCLIPTowers | CLIPSegTowers)):
        towers.tokenize = _PaddingTokenizer(towers)  # type: ignore[method-assign] # the plain way

    def run_plain(prompts: list[str]) -> Tensor:
        with torch.inference_mode():
            logits = [plain(spec.normalize(torch.from_numpy(images)).contiguous(), [prompt]) for prompt in prompts]
        return torch.cat(logits)[:, 0]

    def run_ours(prompts: list[str]) -> np.ndarray:
        return segmenter.predict_logits(images, [prompts])[0]

    ours, expected = run_ours(_PROMPTS[:2]), run_plain(_PROMPTS[:2]).numpy()
    one, ten = _PROMPTS[:1], _PROMPTS
    ours_1_s, plain_1_s, ours_10_s, plain_10_s = alternate(
        repeats, lambda: run_ours(one), lambda: run_plain(one), lambda: run_ours(ten), lambda: run_plain(ten)
    )
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    return ModelSpeed(name, spec.size, ours_1_s, plain_1_s, ours_10_s, plain_10_s, difference)


class _PaddingTokenizer:
    """A tokenizer that pads prompts to the context length of CLIP's text tower, as the public code does."""

    def __init__(self, towers: OpenCLIPTowers | CLIPSegTowers) -> None:
        self.tokenizer: Any = towers.tokenizer
        self.calls_open_clip = isinstance(towers, OpenCLIPTowers)

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        if self.calls_open_clip:
            return list(self.tokenizer(prompts))
        padded = self.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
        return list(padded["input_ids"])
