"""What the README claims about speed, each figure a ratio of two things measured in one run.

python -m jobs.benchmark models --json models.json
python -m jobs.benchmark gpu --json gpu.json
python -m jobs.benchmark scale --rows 10000 --rows 1000000
python -m jobs.benchmark torture
"""

import copy
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.arena import Arena
from jobs.figures import alternate, performance_section, write_json
from jobs.gpu import add_arguments, measure_gpu
from jobs.scale import measure_growth
from jobs.torture import SCENARIOS, CannotTortureError
from vlsm.checkpoints import Checkpoint, CheckpointSettings
from vlsm.errors import VlsmError
from vlsm.images import normalize
from vlsm.models import MODELS
from vlsm.models.costs import build_architecture
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.towers import Towers
from vlsm.segmenter import Segmenter

_PROMPTS = [
    f"a {size} {shape} polyp" for size in ("small", "large") for shape in ("flat", "round", "bright", "left", "")
]


@dataclass(frozen=True)
class ModelSpeed:
    """Seconds per image of one model, ours and the plain way, with one prompt and with ten."""

    name: str
    image_size: int
    ours_1_s: float
    plain_1_s: float
    ours_10_s: float
    plain_10_s: float
    largest_difference: float


def main(argv: list[str] | None = None) -> int:
    """Measure. Weights are random: speed does not depend on them."""
    parser = ArgumentParser(
        prog="python -m jobs.benchmark", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    models = commands.add_parser(
        "models", help="each model against the plain way", description=benchmark_models.__doc__
    )
    models.add_argument("--model", action="append", choices=MODELS, help="one of the table; all of them by default")
    models.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="in turns; the median counts (5)"
    )
    models.add_argument("--threads", type=int, default=2, help="of torch (2)")
    models.add_argument("--json", metavar="FILE", help="where to write the figures too")
    models.set_defaults(run=lambda args: benchmark_models(args))
    gpu = commands.add_parser("gpu", help="each model on one GPU", description=measure_gpu.__doc__)
    add_arguments(gpu)
    gpu.set_defaults(run=lambda args: measure_gpu(args))
    scale = commands.add_parser("scale", help="a run as its archive grows", description=benchmark_scale.__doc__)
    scale.add_argument("--rows", action="append", type=int, metavar="N", help="of the manifest (1000, 10000, 100000)")
    scale.add_argument("--shard-rows", type=int, default=1024, metavar="N", help="of a part file (1024)")
    scale.add_argument("--folder", metavar="DIR", help="where the runs are to be (a temporary folder)")
    scale.set_defaults(run=benchmark_scale)
    torture = commands.add_parser("torture", help="a run that is disturbed", description=benchmark_torture.__doc__)
    torture.add_argument("--scenario", action="append", choices=SCENARIOS, help="all of them by default")
    torture.add_argument("--images", type=int, default=1000, metavar="N", help="of the archive (1000)")
    torture.add_argument("--seed", type=int, default=0, metavar="N", help="of images and moments (0)")
    torture.set_defaults(run=benchmark_torture)
    section = commands.add_parser("section", help="the README's section of measured figures, from jobs/measured")
    section.set_defaults(run=lambda args: print(performance_section(), end=""))
    for command in (scale, torture):
        command.add_argument("--json", metavar="FILE", help="where to write the figures too")
    args = parser.parse_args(argv)
    return int(args.run(args) or 0)


def benchmark_scale(args: Namespace) -> int:
    """Rows per second and the driver's peak memory of the segment job, with a model of four weights.

    The rows name small images on the local disk in turns; all of a shard are different.
    """
    print(f"{'rows':>11} {'rows/s':>9} {'planning, s':>12} {'all, s':>9} {'driver, MB':>11}")
    growths = []
    with tempfile.TemporaryDirectory() as temporary:
        for num_rows in args.rows or (1000, 10_000, 100_000):
            growth = measure_growth(Path(args.folder or temporary), num_rows, args.shard_rows)
            growths.append(asdict(growth))
            print(
                f"{growth.num_rows:11,} {growth.rows_per_s:9,.0f} {growth.planning_s:12.1f} {growth.seconds:9.1f} "
                f"{growth.peak_mb:11.0f}",
                flush=True,
            )
    write_json(args.json, {"scale": growths})
    return 0


def benchmark_torture(args: Namespace) -> int:
    """The segment job, disturbed in every way; each scenario ends with the proof that no row is lost or done twice."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), args.images, seed=args.seed)
        arena.prepare()
        print(f"{len(arena.expected):,} rows, undisturbed: proved")
        for name in args.scenario or SCENARIOS:
            started_s = time.monotonic()
            try:
                disturbances, outcome = SCENARIOS[name](arena), "proved"
            except CannotTortureError as error:
                disturbances, outcome = {}, f"left out: {error}"
            except VlsmError as error:
                disturbances, outcome = {}, f"FAILED: {error}"
                arena.stop()
            seconds = time.monotonic() - started_s
            told = ", ".join(f"{count} {what}" for what, count in disturbances.items())
            print(f"{name:14} {seconds:7.0f} s  {told}: {outcome}", flush=True)
            results.append({"scenario": name, "seconds": round(seconds, 1), **disturbances, "outcome": outcome})
    write_json(args.json, {"torture": results})
    return int(any(str(result["outcome"]).startswith("FAILED") for result in results))


def benchmark_models(args: Namespace) -> int:
    """Seconds per image of each model at its published size, on the CPU, against the plain way.

    The plain way runs the text tower for every image on prompts padded to its context, the whole model once per prompt,
    with batch norms as they are and channels first. Ours is the Segmenter, its prompts encoded once before. Networks
    that see no text answer all prompts at once. Fails where the logits of both ways differ by more than a thousandth.
    """
    torch.set_num_threads(args.threads)
    speeds = []
    print(f"{'':15} {'1 prompt, s':>22} {'':>6} {'10 prompts, s':>22} {'':>6} {'10 to 1':>8}")
    print(f"{'model':15} {'ours':>11}{'plain':>11} {'ratio':>6} {'ours':>11}{'plain':>11} {'ratio':>6} {'ours':>8}")
    for name in args.model or MODELS:
        speed = _measure_model(name, args.repeats)
        speeds.append(speed)
        print(
            f"{name:15} {speed.ours_1_s:11.3f}{speed.plain_1_s:11.3f} {speed.plain_1_s / speed.ours_1_s:5.2f}x "
            f"{speed.ours_10_s:11.3f}{speed.plain_10_s:11.3f} {speed.plain_10_s / speed.ours_10_s:5.2f}x "
            f"{speed.ours_10_s / speed.ours_1_s:7.2f}x",
            flush=True,
        )
    figures = {"threads": args.threads, "repeats": args.repeats, "models": [asdict(speed) for speed in speeds]}
    write_json(args.json, figures)
    wrong = [speed.name for speed in speeds if not speed.largest_difference < 1e-3]
    if wrong:
        print(f"error: the two ways disagree for {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _measure_model(name: str, repeats: int) -> ModelSpeed:
    with tempfile.TemporaryDirectory() as folder:
        plain = build_architecture(name, Path(folder), "cpu")
    spec = plain.image_spec
    settings = CheckpointSettings(model=name, options={}, image=asdict(spec))
    segmenter = Segmenter(Checkpoint(copy.deepcopy(plain), settings, name), device="cpu")
    images = np.random.default_rng(0).integers(0, 255, (1, spec.size, spec.size, 3), dtype=np.uint8)
    for towers in (part for part in plain.modules() if isinstance(part, Towers)):
        towers.tokenize = _PaddingTokenizer(towers)  # type: ignore[method-assign] # the plain way

    def run_plain(prompts: list[str]) -> Tensor:
        with torch.inference_mode():
            logits = [plain(normalize(torch.from_numpy(images), spec).contiguous(), [prompt]) for prompt in prompts]
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
    """Prompts padded to the text tower's context, as the public code has them."""

    def __init__(self, towers: Towers) -> None:
        self.tokenizer: Any = towers.tokenizer
        self.calls_open_clip = isinstance(towers, OpenCLIPTowers)

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        if self.calls_open_clip:
            return list(self.tokenizer(prompts))
        padded = self.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
        return list(padded["input_ids"])


if __name__ == "__main__":
    sys.exit(main())
