"""Run the whole workflow in a few minutes: draw a labelled archive, train, segment another archive, score, report.

With --loop it labels in rounds, as `jobs.demo_loop` says, which takes about ten minutes.

labelled/        drawn images with a lesion and a stone each, and a mask of each object: `anns/ images/ masks/`
clipseg/         a tiny CLIPSeg with random weights; it replaces the published one
training/        output of `python -m jobs.train training --dataset drawn=labelled --set model=vlsm_b ...`
archive/         other drawn images and two broken files, as in a real archive
segmented/       output of `python -m jobs.segment archive/images segmented --checkpoint training/checkpoint`
overlays.png     some of the masks, drawn over their images
report.html      output of `python -m vlsm.report segmented report.html`: the report of the run, for a browser
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.command import RaySession, logger, run_command
from jobs.phantoms import KINDS, write_labelled
from jobs.segment import segment
from jobs.train import train
from vlsm.commands import new_parser
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.errors import VlsmError
from vlsm.images.decode import decode_image, decode_mask_file
from vlsm.images.overlays import draw_overlay, draw_sheet
from vlsm.runs.results import read_masks
from vlsm.segmentation.metrics import dice_score
from vlsm.shown import say
from vlsm.training.settings import OptimSettings, TrainRunSettings, TrainSettings
from vlsm.words import count

SPLITS, NUM_ARCHIVE = {"train": 240, "val": 20}, 60
SIDES_PX = (96, 256)  # range of the height and width of images
IMAGE_SIZE, WIDTH = 80, 8  # 1/8 of the width of the published UNet-D
_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
OPTIM = OptimSettings(epochs=8, lr=4e-3, batch_size=8, ce_weight=1.0, clip_norm=1.0, warmup_epochs=1)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser("jobs.demo", str(__doc__))
    parser.add_argument(
        "output", nargs="?", default="demo-output", metavar="OUTPUT", help="output folder (default: demo-output)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the images and the training (0)"
    )
    parser.add_argument(
        "--loop",
        action="store_true",
        help="train on few images, segment, select, label, train again; compare it with a random choice",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = make_parser().parse_args(argv)
    output = Path(args.output).resolve()
    if args.loop:
        from jobs.demo_loop import tell_loop

        return run_command(lambda: tell_loop(output, args.seed))
    return run_command(lambda: tell(output, args.seed))


def tell(output: Path, seed: int = 0) -> None:
    """Run the workflow in the folder `output`, and replace the files of an earlier demo."""
    started_s = time.monotonic()
    training = TrainSettings(
        output=str(output / "training"),
        datasets={"drawn": str(output / "labelled")},
        model="vlsm_b",
        options={"source": str(output / "clipseg"), "image_size": IMAGE_SIZE, "width": WIDTH, "dropout": 0},
        seed=seed,
        start_over=True,
        optim=OPTIM,
        run=TrainRunSettings(workers=1, micro_batch_size=20),
    )
    segmentation = SegmentSettings(
        input=str(output / "archive" / "images"),
        output=str(output / "segmented"),
        members=(MemberSettings(checkpoint=str(output / "training" / "checkpoint")),),
        prompts=KINDS,
        shard_rows=32,
        start_over=True,
    )
    with RaySession() as session:
        session.start()  # Ray starts while the images are drawn
        draw(output, seed)
        session.wait()
        logger.info("python -m jobs.train %s --dataset drawn=%s", training.output, training.datasets["drawn"])
        train(training)
        words = segmentation.input, segmentation.output, segmentation.members[0].checkpoint
        logger.info("python -m jobs.segment %s %s --checkpoint %s", *words)
        summary = segment(segmentation)
    from vlsm.report.write import write_report  # imported here: it imports matplotlib

    dice = score(output / "archive", segmentation.output, output / "overlays.png", training.data.mask_threshold)
    report = write_report(segmentation.output, output / "report.html")
    say(
        f"\nsegmented {count(summary['ok'], 'image')}, {summary['failed']} could not be read "
        f"({summary['failed_by_reason']}); "
        f"mean Dice on images never seen: {', '.join(f'{kind} {value:.3f}' for kind, value in dice.items())}\n"
        f"curves    {training.output}/curves.png\n"
        f"masks     {segmentation.output}/masks/*.parquet\n"
        f"overlays  {output / 'overlays.png'}: masks green, targets magenta, the worst first\n"
        f"summary   {segmentation.output}/summary.json\n"
        f"done in {time.monotonic() - started_s:.0f} s; open the report in a browser:\n"
        f"report    {report}"
    )


def draw(output: Path, seed: int) -> None:
    """Write the labelled images, the archive with two broken files, and the tiny CLIPSeg."""
    logger.info("drawing %d labelled and %d other images below %s", sum(SPLITS.values()), NUM_ARCHIVE, output)
    write_labelled(output / "labelled", SPLITS, seed, SIDES_PX)
    write_labelled(output / "archive", {"test": NUM_ARCHIVE}, seed + 1000, SIDES_PX)
    images = output / "archive" / "images"
    (images / "broken_truncated.jpg").write_bytes((images / "test_0001.jpg").read_bytes()[:1500])
    (images / "broken_empty.png").write_bytes(b"")
    write_tiny_clipseg(output / "clipseg", seed)


def write_tiny_clipseg(folder: Path, seed: int) -> None:
    """Write a CLIPSeg of four narrow layers with random weights, in the format of the published one."""
    import torch

    from vlsm.models.untrained import write_clipseg

    torch.manual_seed(seed)
    write_clipseg(
        folder,
        text_config={**_LAYERS, "num_hidden_layers": 2, "vocab_size": 500, "max_position_embeddings": 16},
        vision_config={**_LAYERS, "num_hidden_layers": 4, "image_size": IMAGE_SIZE},
        projection_dim=64,
        reduce_dim=32,
        extract_layers=[0, 1, 3],
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
    )


def score(archive: Path, output: str, sheet: Path, mask_threshold: int) -> dict[str, float]:
    """Return the mean Dice per kind of object, and draw the worst masks and some others into the image file `sheet`."""
    records = json.loads((archive / "anns" / "test.json").read_text(encoding="utf-8"))
    targets = {
        (record["img_name"], record["prompts"]["p1"]): archive / "masks" / record["mask_name"] for record in records
    }
    scored = []
    for row in read_masks(output, [("status", "==", "ok")], columns=["image_id", "image_uri", "prompt"]):
        path = targets[row["image_id"], row["prompt"]]
        target_mask = decode_mask_file(path.read_bytes(), str(path), mask_threshold)
        scored.append((dice_score(row["mask"], target_mask), row, target_mask))
    if len(scored) != len(records):
        raise VlsmError(f"the run has {len(scored)} masks; the archive has {len(records)} records")
    scored.sort(key=lambda entry: entry[0])
    shown = scored[:6] + scored[6 :: max(1, len(scored) // 18)][:18]
    pictures = []
    for dice, row, target_mask in shown:
        image = decode_image(Path(row["image_uri"]).read_bytes(), row["image_uri"])
        caption = f"{row['prompt']}: Dice {dice:.2f}, {row['image_id']}"
        pictures.append((draw_overlay(image, row["mask"], target_mask), caption))
    Image.fromarray(draw_sheet(pictures)).save(sheet)
    return {kind: float(np.mean([dice for dice, row, _ in scored if row["prompt"] == kind])) for kind in KINDS}


if __name__ == "__main__":
    sys.exit(main())
