"""A run with real and hard masks, and what annotation tools send back."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from tests.conftest import SHARED
from tests.export.test_coco import make_row
from vlsm.export.__main__ import main as export_main
from vlsm.labels.__main__ import main as labels_main
from vlsm.runs.results import write_part

CARRIED = pa.struct([("patient_id", pa.string()), ("age", pa.int64())])
PROMPTS = ("polyp", '=flat "polyp" & <fold>')  # the second one is a formula in a spreadsheet


def hard_masks():
    """Masks by the name of their image: holes in holes, islands of a pixel, corners that touch, odd sizes, borders."""
    rings = np.zeros((41, 57), np.uint8)
    rings[3:38, 2:55], rings[6:34, 6:50], rings[10:30, 10:40], rings[15, 15] = 1, 0, 1, 0
    random = np.random.default_rng(5)
    border = np.zeros((7, 5), np.uint8)
    border[0], border[-1], border[:, 0], border[:, -1] = 1, 1, 1, 1
    return {
        "drawn/rings.png": rings,
        "drawn/noise.png": (random.random((33, 31)) < 0.5).astype(np.uint8),
        "drawn/islands.png": (random.random((64, 20)) < 0.02).astype(np.uint8),
        "drawn/border.png": border,
        "drawn/full.png": np.ones((6, 9), np.uint8),
        "drawn/line.png": np.eye(1, 9, 4, dtype=np.uint8),
        "empty, all.png": np.zeros((9, 6), np.uint8),
    }


def real_masks():
    """Masks of Kvasir and ClinicDB by the path of their image; none where the shared data are not."""
    paths = [*sorted((SHARED / "data/kvasir_seg/masks").glob("*"))[:3]]
    paths += [*sorted((SHARED / "data/cvc_clinicdb/masks").glob("*"))[:3]]
    masks = {path: (np.asarray(Image.open(path).convert("L")) > 127).astype(np.uint8) for path in paths}
    return {path.parents[1] / "images" / path.name: mask for path, mask in masks.items()}


class Run:
    """A run whose images lie in a folder; each has a mask for both prompts."""

    def __init__(self, folder, masks):
        self.folder, self.output, self.masks, rows = folder, folder / "out", {}, []
        for number, (name, mask) in enumerate(masks.items()):
            path = folder / "in" / (name if isinstance(name, str) else f"{name.parents[1].name}/{name.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(name, str):
                Image.fromarray(np.repeat(mask[:, :, None] * 99 + 50, 3, axis=2)).save(path)
            else:
                path.symlink_to(name)
            image_id = path.relative_to(folder / "in").as_posix()
            for prompt, drawn in zip(PROMPTS, (mask, np.ascontiguousarray(mask[::-1] * (number % 2))), strict=True):
                self.masks[image_id, prompt] = drawn
                more = {"patient_id": f"00{number // 2}", "age": 40 + number, "confidence": 0.5 + number / 100}
                rows.append(make_row(path, None, prompt, drawn) | more | {"image_id": image_id})
                rows[-1]["confidence"] = rows[-1]["confidence"] if drawn.any() else None
        write_part(str(self.output), 0, rows, "run", 0, CARRIED)
        config = {"input": str(folder / "in"), "prompts": list(PROMPTS)}
        (self.output / "config.yaml").write_text(yaml.safe_dump({"config": config, "plan": {}}))

    def export(self, format_name, *words):
        """Export masks in place of an earlier export; return the folder."""
        shutil.rmtree(target := self.folder / format_name, ignore_errors=True)
        assert export_main([str(self.output), str(target), "--format", format_name, *words]) == 0
        return target

    def read(self, source, format_name, *words, code=0, name="new/corrected.csv"):
        """Import reviews in place of an earlier list; return the path of the list."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_name(f"{path.stem}_masks"), ignore_errors=True)
        assert labels_main([str(source), str(path), "--format", format_name, "--run", str(self.output), *words]) == code
        return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"), hard_masks() | real_masks())


@pytest.fixture
def small_run(tmp_path):
    return Run(tmp_path, {name: mask for name, mask in hard_masks().items() if "rings" in name or "border" in name})


def submit(tasks, **facts):
    """Tasks of our own as Label Studio exports them after every prediction was submitted as it is."""
    return [
        {"id": number, "data": task["data"], "predictions": [], "annotations": [annotation(task, **facts)]}
        for number, task in enumerate(tasks)
    ]


def annotation(task, **facts):
    known = {"completed_by": 1, "was_cancelled": False, "updated_at": "2026-01-02T00:00:00Z"}
    return known | {"result": task["predictions"][0]["result"]} | facts


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
