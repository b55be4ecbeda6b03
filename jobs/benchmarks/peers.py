"""The segment job against the usual ways to run CLIPSeg over a folder, with the same images, weights and cores."""

import contextlib
import io
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPSegConfig, CLIPSegProcessor, ViTImageProcessor

import vlsm
from jobs.benchmarks.archives import write_files
from jobs.benchmarks.baselines import BATCH_SIZE, WAYS, images_per_block
from jobs.benchmarks.figures import quietest, write_json
from jobs.benchmarks.paused_process import Held, hold_job
from vlsm.models.untrained import write_clipseg

NUM_FILES, NUM_IMAGES = 64, 4096  # hard links make 4096 images of 64 files; no run reaches the last one
CLIPSEG: dict[str, Any] = {}  # configuration fields that differ from the published ones
_PROMPTS = [
    f"a {size} {shape} polyp" for size in ("small", "large") for shape in ("flat", "round", "bright", "left", "right")
]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark peers`."""
    parser.add_argument(
        "--prompts", type=int, action="append", choices=range(1, 11), metavar="N", help="prompts per image (1, then 10)"
    )
    parser.add_argument("--way", action="append", choices=WAYS, help="peer to measure; may be repeated (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="rounds; the median counts (5)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="minimum duration of one measurement (5)")


def measure(args: Namespace) -> int:
    """Measure images per second of the segment job against the usual ways to run CLIPSeg, in interleaved steady states.

    "card": processor and model of transformers in a plain loop, as the model card shows. "loader": a torch DataLoader,
    the model, and PNG files. "ray data": read_images, map_batches with one actor, and write_parquet. All write masks at
    the size of the image, and let torch use all cores. The model has its published size and random weights. The
    benchmark fails if the Dice between the masks of two ways is below 0.99.
    """
    rows = []
    print(f"{'prompts':>7} {'way':10} {'images/s':>9} {'ours':>9} {'ratio':>7} {'Dice':>7}")
    for num_prompts in args.prompts or (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            for row in _measure(Path(folder), _PROMPTS[:num_prompts], args):
                rows.append(row)
                print(
                    f"{row['prompts']:7} {row['way']:10} {row['peer_per_s']:9.3f} {row['ours_per_s']:9.3f} "
                    f"{row['ratio']:6.2f}x {row['dice']:7.4f}; others {row['foreign_cores']:.2f} cores",
                    flush=True,
                )
    write_json(args.json, "peers", {"repeats": args.repeats, "seconds": args.seconds, "runs": rows})
    return int(any(row["dice"] < 0.99 for row in rows))


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"Full-size CLIPSeg over JPEGs of 560 x 560 pixels, the {figures['repeats']} quietest times of all, in turns; "
        "Dice is of all masks of both ways:",
        "",
        "| way | prompts | images/s | ours | ratio | lowest to highest | Dice | others' cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        spread = f"{row['lowest']:.2f}x to {row['highest']:.2f}x"
        lines.append(
            f"| {row['way']} | {row['prompts']} | {row['peer_per_s']:.3f} | {row['ours_per_s']:.3f} | "
            f"{row['ratio']:.2f}x | {spread} | {row['dice']:.4f} | {row['foreign_cores']:.2f} |"
        )
    return lines


def _measure(folder: Path, prompts: list[str], args: Namespace) -> list[dict[str, Any]]:
    clipseg, images, ours = _write_model(folder), folder / "images", folder / "ours"
    files = write_files(folder / "files", NUM_FILES)
    images.mkdir()
    for number in range(NUM_IMAGES):
        (images / f"{number:05d}.jpg").hardlink_to(files[number % len(files)])
    ways = args.way or list(WAYS)
    words = [str(images), "--set", f"prompts=[{', '.join(prompts)}]"]
    words += ["--set", f"run.batch_size={BATCH_SIZE}"]
    per_file = dict.fromkeys(WAYS, 1 / len(prompts)) | {"ray data": images_per_block(prompts)}
    job = hold_job(words, folder / "checkpoint", ours, 2 * images_per_block(prompts), num_prompts=len(prompts))
    with contextlib.ExitStack() as stack:
        held = {"ours": stack.enter_context(job)}
        for way in ways:  # one after another: each has all cores until it is paused
            arguments = [way, str(images), str(folder / way), str(clipseg), *prompts]
            held[way] = stack.enter_context(Held("jobs.benchmarks.baselines", arguments, folder / way, per_file[way]))
        rounds, foreign_cores = quietest(
            args.repeats, lambda: {name: process.measure(args.seconds)[0] for name, process in held.items()}
        )
    expected = {(row["image_id"][:5], row["prompt"]): row["mask"] for row in vlsm.read_masks(str(ours))}
    rows = []
    for way in ways:
        ratios = [rates["ours"] / rates[way] for rates in rounds]
        rows.append(
            {
                "way": way,
                "prompts": len(prompts),
                "peer_per_s": statistics.median(rates[way] for rates in rounds),
                "ours_per_s": statistics.median(rates["ours"] for rates in rounds),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "foreign_cores": foreign_cores,
                "dice": _dice(expected, _read_masks(folder / way, prompts)),
            }
        )
    return rows


def _write_model(folder: Path) -> Path:
    """Write CLIPSeg in the format of transformers and as a checkpoint; return the folder of the transformers model."""
    torch.manual_seed(0)
    clipseg = write_clipseg(folder / "clipseg", **CLIPSEG)
    model = vlsm.build_model("clipseg", source=str(clipseg))
    vlsm.save_checkpoint(model.eval(), folder / "checkpoint", prompt=_PROMPTS[0])
    spec = model.image_spec
    images = ViTImageProcessor(size={"height": spec.size, "width": spec.size}, image_mean=spec.mean, image_std=spec.std)
    longest = CLIPSegConfig.from_pretrained(clipseg).text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(clipseg, model_max_length=longest)  # the model card pads to this length
    CLIPSegProcessor(images, tokenizer).save_pretrained(clipseg)
    return clipseg


def _read_masks(folder: Path, prompts: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """Return the masks of one of the usual ways by (name of the image, prompt), from its PNG or Parquet files."""
    pngs = [(file.stem[:5], prompts[int(file.stem[6:])], file.read_bytes()) for file in folder.glob("[!.]*.png")]
    for file in folder.glob("*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):  # a file that was incomplete when the program ended
            rows = pq.read_table(file).to_pylist()
            pngs += [(Path(row["path"]).stem, row["prompt"], row["mask"]) for row in rows]
    return {(stem, prompt): np.asarray(Image.open(io.BytesIO(png))) for stem, prompt, png in pngs}


def _dice(one: dict[tuple[str, str], np.ndarray], other: dict[tuple[str, str], np.ndarray]) -> float:
    """Return the Dice over all pixels of the masks that both dicts contain, or 1.0 if all of these are empty."""
    both = total = 0
    for key in one.keys() & other.keys():
        both += int(np.count_nonzero((one[key] > 0) & other[key]))
        total += int(np.count_nonzero(one[key]) + np.count_nonzero(other[key]))
    return 2 * both / total if total else 1.0
