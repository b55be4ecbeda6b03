"""A segment run over real endoscopy images, for tests of the review."""

from dataclasses import asdict

import numpy as np
from PIL import Image

from tests.conftest import SHARED
from vlsm.config import SegmentSettings, load_settings
from vlsm.runs.plan import write_plan
from vlsm.runs.record import make_record, write_record
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

KVASIR = SHARED / "data" / "kvasir_seg"
RUN_ID = "0123456789abcdef0123456789abcdef"
PROMPT = "polyp"
# names that a spreadsheet would take for formulas, and those that need quotes
NAMES = ("=1+1.png", "'-x.png", 'a "quoted", name.png', "line\nbreak.png", " blank.png", "息肉.png", "\x1c=x.png")


def write_run(output, number, ids=(), start=0):
    """Write a finished-looking run of `number` images with a mask each: their labels, moved and cut a little."""
    paths = sorted((KVASIR / "images").iterdir())[start : start + number]
    names = [*ids, *(path.name for path in paths[len(ids) :])]
    plan_row = dict.fromkeys(
        ("selector", "offset", "length", "problem", "image_version", "size_bytes", "etag", "mtime")
    ) | {"prompts": [PROMPT]}
    images = [plan_row | {"image_id": name, "image_uri": str(path)} for name, path in zip(names, paths, strict=True)]
    words = {"input": str(KVASIR), "output": str(output), "members": [{"checkpoint": str(output.parent / "c")}]}
    settings = load_settings(SegmentSettings, None, [f"prompts=[{PROMPT}]"], words)
    plan = write_plan(str(output), images, 1000)
    write_record(str(output), make_record(settings, {"run_id": RUN_ID}, asdict(plan)))
    rows = [_row(image, index) for index, image in enumerate(images)]
    write_part(str(output), 0, rows, RUN_ID, 0)
    return output


def _row(image, index):
    name = image["image_uri"].rpartition("/")[2]
    with Image.open(next((KVASIR / "masks").glob(f"{name.rpartition('.')[0]}.*"))) as file:
        mask = (np.asarray(file.convert("L")) > 127).astype(np.uint8)
    mask = np.roll(mask, 7 * index % 40, axis=index % 2)
    confidence = 0.5 + (index * 37 % 50) / 100
    row = {"image_id": image["image_id"], "image_uri": image["image_uri"], "prompt": PROMPT, "kind": "mask"}
    row |= {"model": "clipseg@0123", "status": "ok", "height": mask.shape[0], "width": mask.shape[1]}
    row |= {"mask_rle": encode_mask(mask), "area_px": int(mask.sum()), "area_fraction": float(mask.mean())}
    return row | {"confidence": confidence, "review": "low confidence" if confidence < 0.6 else None}
