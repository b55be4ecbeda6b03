"""The whole story in a few minutes: draw a labelled archive, train on it, segment another archive, score, look.

labelled/        drawn images and masks, `anns/ images/ masks/`
checkpoint/      a small UNet-D trained on them
archive/         other drawn images (and two broken files), as a bucket would hold them
segmented/       what `python -m jobs.segment archive/images segmented --checkpoint checkpoint` makes
overlays.png     some of the masks, drawn on their images
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.command import logger, run_command
from jobs.segment import segment
from vlsm.config import SegmentSettings
from vlsm.errors import VlsmError
from vlsm.images import decode_image, resize_image
from vlsm.metrics import dice_score
from vlsm.overlays import draw_overlay, draw_sheet
from vlsm.phantoms import write_labelled
from vlsm.results import read_masks

_NUM_LABELLED, _NUM_ARCHIVE = 320, 120
_MODEL = {"image_size": 96, "width": 16}  # a sixteenth of the published network's work per pixel
_EPOCHS, _LR, _SEED = 12, 3e-3, 0
_PROMPT = "lesion"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output", nargs="?", default="demo-output", metavar="OUTPUT", help="a folder (default: demo-output)"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: tell(Path(args.output).resolve()))


def tell(output: Path) -> None:
    """Run the story below a folder; what an earlier demo left there is replaced."""
    started_s = time.monotonic()
    logger.info("drawing %d labelled and %d other images below %s", _NUM_LABELLED, _NUM_ARCHIVE, output)
    write_labelled(output / "labelled", {"train": _NUM_LABELLED}, seed=_SEED)
    write_labelled(output / "archive", {"test": _NUM_ARCHIVE}, seed=_SEED + 1)
    images = output / "archive" / "images"
    (images / "broken_truncated.jpg").write_bytes((images / "test_0001.jpg").read_bytes()[:1500])
    (images / "broken_empty.png").write_bytes(b"")

    train_checkpoint(output / "labelled", output / "checkpoint")
    settings = SegmentSettings(
        input=str(images),
        output=str(output / "segmented"),
        checkpoint=str(output / "checkpoint"),
        shard_rows=32,
        start_over=True,
    )
    logger.info("python -m jobs.segment %s %s --checkpoint %s", settings.input, settings.output, settings.checkpoint)
    summary = segment(settings)
    mean_dice = score(output / "archive", settings.output, output / "overlays.png")
    print(
        f"\nsegmented {summary['ok']} images, {summary['failed']} could not be read ({summary['failed_by_reason']}); "
        f"mean Dice on images never seen: {mean_dice:.3f}\n"
        f"masks     {settings.output}/masks/*.parquet\n"
        f"overlays  {output / 'overlays.png'}\n"
        f"summary   {settings.output}/summary.json\n"
        f"done in {time.monotonic() - started_s:.0f} s"
    )


def train_checkpoint(labelled: Path, checkpoint: Path) -> None:
    """Train a small UNet-D on a labelled folder and save it."""
    import torch

    import vlsm
    from vlsm.training import Examples, train

    records = json.loads((labelled / "anns" / "train.json").read_text(encoding="utf-8"))
    size = _MODEL["image_size"]
    examples = Examples(
        images=np.stack([resize_image(_read(labelled / "images" / record["img_name"]), size) for record in records]),
        target_masks=np.stack([resize_mask(_read_mask(labelled, record), size) for record in records]),
        prompts=[_PROMPT] * len(records),
    )
    torch.manual_seed(_SEED)
    model = vlsm.build_model("unet_d", **_MODEL)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("training a small UNet-D on %d images for %d epochs", len(records), _EPOCHS)
    for epoch, loss in enumerate(train(model, examples, _EPOCHS, _LR, _SEED), start=1):
        logger.info("epoch %2d of %d, loss %.3f", epoch, _EPOCHS, loss)
    vlsm.save_checkpoint(model, checkpoint, prompt=_PROMPT)


def score(archive: Path, output: str, sheet: Path) -> float:
    """The mean Dice of the masks against the drawn ones; the worst and some others go on a sheet."""
    records = {
        record["img_name"]: record
        for record in json.loads((archive / "anns" / "test.json").read_text(encoding="utf-8"))
    }
    scored = []
    for row in read_masks(output, [("status", "==", "ok")], columns=["image_id", "image_uri"]):
        target_mask = _read_mask(archive, records[row["image_id"]])
        scored.append(
            (dice_score(row["mask"], target_mask), row["image_id"], row["image_uri"], row["mask"], target_mask)
        )
    if len(scored) != len(records):
        raise VlsmError(f"{len(scored)} masks for {len(records)} readable images")
    scored.sort(key=lambda entry: entry[:2])
    shown = scored[:6] + scored[6 :: max(1, len(scored) // 18)][:18]
    pictures = [
        (draw_overlay(_read(Path(uri)), mask, target), f"{name} Dice {dice:.2f}")
        for dice, name, uri, mask, target in shown
    ]
    Image.fromarray(draw_sheet(pictures)).save(sheet)
    return float(np.mean([entry[0] for entry in scored]))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask at the model's size, (S, S) of 0 and 1; nearest neighbour, never in between."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _read(path: Path) -> np.ndarray:
    return decode_image(path.read_bytes(), str(path))


def _read_mask(folder: Path, record: dict[str, str]) -> np.ndarray:
    return (_read(folder / "masks" / record["mask_name"])[..., 0] > 127).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
