"""JPEGs decoded on a GPU against the same on the CPU: pixels, masks, and the time of both."""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmarks.archives import write_files
from jobs.benchmarks.figures import alternate, write_json
from vlsm.checkpoints import checkpoint_of, load_checkpoint
from vlsm.config import SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.models import MODELS
from vlsm.models.costs import build_architecture
from vlsm.segmentation.gpu_decode import decode_images
from vlsm.segmentation.metrics import dice_scores
from vlsm.segmentation.segmenter import Segmenter
from vlsm.segmentation.shard import Entry, ShardBatch, Unguarded, read_shard_images


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark decoders`."""
    parser.add_argument("--checkpoint", metavar="DIR", help="model that makes the masks (one with random weights)")
    parser.add_argument("--model", default="clipseg", choices=MODELS, help="model without --checkpoint (clipseg)")
    parser.add_argument("--folder", metavar="DIR", help="JPEGs, recursive (drawn images)")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="images (256)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved rounds; the median counts (3)")
    parser.add_argument("--device", default="cuda", help="torch device (cuda); cpu tries the benchmark without a GPU")


def measure(args: Namespace) -> int:
    """Compare the setting `decode: gpu` with `cpu`, by the job's own functions: from files to pixels to masks.

    It tells the largest and the mean difference of pixels in the model's square, the Dice between the masks of both,
    the share of the files that the GPU decodes, and images per second of both, reading of files included. Without a
    checkpoint, the threshold of the masks is the median probability, because random weights suggest no better one.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --device cpu tries the benchmark without one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = _find(Path(args.folder), args.images) if args.folder else write_files(folder / "drawn", args.images)
        segmenter, threshold, prompt = _build(args, folder)
        figures = compare_decoders(paths, segmenter, prompt, threshold, args.repeats)
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    figures = {"device": name, "model": args.checkpoint or args.model, "drawn": not args.folder} | figures
    print("\n".join(tell(figures)))
    write_json(args.json, "decoders", figures)
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    (row,) = figures["runs"]
    return [
        f"{figures['images']} {'drawn ' if figures['drawn'] else ''}JPEGs, to the square of {row['size']} pixels; "
        f"masks of `{figures['model']}`.",
        "",
        "| on the GPU | images/s, cpu | gpu | pixels differ by at most | on average | Dice of masks | smallest |",
        "|---|---|---|---|---|---|---|",
        f"| {row['encoded']} | {row['cpu_per_s']:,.0f} | {row['gpu_per_s']:,.0f} | {row['largest_difference']} | "
        f"{row['mean_difference']:.3f} | {row['mean_dice']:.4f} | {row['smallest_dice']:.4f} |",
    ]


def compare_decoders(
    paths: Sequence[Path], segmenter: Segmenter, prompt: str, threshold: float | None, repeats: int = 1
) -> dict[str, Any]:
    """Return the figures of both decoders on the device of a segmenter.

    Args:
        paths: image files.
        segmenter: makes the masks.
        prompt: the text for all images.
        threshold: lowest probability of the foreground; None for the median probability of each image.
        repeats: timed rounds.
    """
    square = segmenter.model.image_spec.square
    batches: dict[str, ShardBatch] = {}
    pixels: dict[str, np.ndarray] = {}

    def read(decode: str) -> None:
        batches[decode], pixels[decode] = _read(paths, square, decode, str(segmenter.device))

    seconds = alternate(repeats, lambda: read("cpu"), lambda: read("gpu"))
    good = [entry for entry in batches["cpu"].entries if entry.error is None]
    twins = {entry.position: entry for entry in batches["gpu"].entries}
    rows = {"cpu": [entry.first_window for entry in good]}
    rows["gpu"] = [twins[entry.position].first_window for entry in good]
    chosen = {decode: pixels[decode][indices] for decode, indices in rows.items()}
    texts = [[prompt]] * len(good)
    logits = {decode: np.stack(segmenter.predict_logits(images, texts)) for decode, images in chosen.items()}
    limits: Any = np.median(logits["cpu"], axis=(1, 2, 3), keepdims=True)
    if threshold is not None:
        limits = np.log(threshold / (1 - threshold))
    dice = dice_scores(logits["gpu"] >= limits, logits["cpu"] >= limits)
    differences = np.abs(chosen["gpu"].astype(np.int16) - chosen["cpu"])
    row = {
        "size": square.size, "encoded": len(batches["gpu"].encoded), "cpu_per_s": len(paths) / seconds[0],
        "gpu_per_s": len(paths) / seconds[1], "largest_difference": int(differences.max()),
        "mean_difference": float(differences.mean()), "mean_dice": float(dice.mean()),
        "smallest_dice": float(dice.min()),
    }  # fmt: skip
    failed = [sum(entry.error is not None for entry in batch.entries) for batch in batches.values()]
    return {"images": len(paths), "repeats": repeats, "failed": failed, "runs": [row]}


def _read(paths: Sequence[Path], square: Square, decode: str, device: str) -> tuple[ShardBatch, np.ndarray]:
    """Return the images of files as a shard, and its pixels."""
    settings = SegmentSettings.model_validate(
        {"input": "", "output": "", "members": [{"checkpoint": ""}], "decode": decode}
    )
    rows = [{"image_uri": str(path), "selector": None} for path in paths]
    entries = [Entry(position, num_texts=1) for position in range(len(rows))]
    batch = read_shard_images(ShardBatch(0, False, entries), rows, [square], settings, Unguarded())
    return batch, decode_images(batch, [square], settings, Unguarded(), device)[square]


def _build(args: Namespace, folder: Path) -> tuple[Segmenter, float | None, str]:
    """Return the segmenter, its threshold, and its prompt."""
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        return Segmenter(checkpoint, args.device), checkpoint.settings.threshold, checkpoint.settings.prompt
    model = build_architecture(args.model, folder / "parts", "cpu")
    return Segmenter(checkpoint_of(model, args.model), args.device), None, "polyp"


def _find(folder: Path, count: int) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    count = min(count, len(paths))
    return [paths[len(paths) * number // count] for number in range(count)]
