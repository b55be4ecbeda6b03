import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs import demo, demo_loop
from tests.conftest import read_mask_rows


def tell(folder, capfd, num_archive, *words):
    """The Dice of lesions and stones; what the demo writes is looked at."""
    assert demo.main([str(folder), *words]) == 0
    out = capfd.readouterr().out
    for path in ("segmented/masks/*.parquet", "overlays.png", "training/curves.png", "segmented/summary.json"):
        assert f"{folder}/{path}" in out
    assert out.rstrip().endswith(f"{folder}/report.html")
    assert (folder / "report.html").read_text().count("<img") > 5
    assert np.asarray(Image.open(folder / "overlays.png")).std() > 20
    summary = json.loads((folder / "segmented" / "summary.json").read_text())
    assert (summary["planned"], summary["failed_by_reason"]) == (num_archive + 2, {"corrupt": 1, "empty": 1})
    assert len(read_mask_rows(folder / "segmented")) == 2 * (num_archive + 2)
    dice = re.search(r"mean Dice on images never seen: lesion ([\d.]+), stone ([\d.]+)", out)
    return float(dice[1]), float(dice[2])


@pytest.mark.ray
def test_the_demo_tells_its_story_and_says_where_everything_is(ray_cluster, tmp_path, capfd, monkeypatch):
    """All of it, with a tenth of the images and one epoch. It takes a minute, mostly for imports of transformers."""
    monkeypatch.setattr(demo, "SPLITS", {"train": 24, "val": 4})
    monkeypatch.setattr(demo, "NUM_ARCHIVE", 8)
    monkeypatch.setattr(demo, "OPTIM", demo.OPTIM.model_copy(update={"epochs": 1}))
    assert max(tell(tmp_path, capfd, 8)) < 0.9  # it has hardly learned anything


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(5))
def test_the_demo_learns_what_it_drew(ray_cluster, tmp_path, capfd, seed):
    lesion, stone = tell(tmp_path, capfd, 60, "--seed", str(seed))
    assert lesion > 0.8 and stone > 0.8  # one that does not listen to its prompt has half of that


@pytest.mark.nightly
@pytest.mark.ray
def test_the_loop_labels_in_rounds_and_ends_with_both_curves(ray_cluster, tmp_path, capfd, monkeypatch):
    for name, value in {"NUM_POOL": 12, "NUM_START": 4, "NUM_CHOSEN": 3, "NUM_ROUNDS": 2}.items():
        monkeypatch.setattr(demo_loop, name, value)
    monkeypatch.setattr(demo_loop, "SPLITS", {"val": 3, "test": 3})
    monkeypatch.setattr(demo_loop, "OPTIM", demo_loop.OPTIM.model_copy(update={"epochs": 1}))
    assert demo.main([str(tmp_path), "--loop"]) == 0
    out = capfd.readouterr().out
    assert out.rstrip().endswith(f"{tmp_path}/loop.html")
    dice = re.search(
        r"Dice on the test: ([\d.]+) with 4 labelled images; with 10: chosen ([\d.]+), random ([\d.]+)", out
    )
    page = (tmp_path / "loop.html").read_text()
    assert all(value in page for value in dice.groups())
    assert len(re.findall(r'class="line c-\d[^>]*d="M[\d. L]+"><title>(?:chosen|random)', page)) == 2
    assert page.count("<img") == 6
    for arm in ("chosen", "random"):
        rows = [row for n in (1, 2) for row in csv.DictReader((tmp_path / arm / str(n) / "next.csv").open(newline=""))]
        images = {row["image_uri"] for row in rows}
        assert len(images) == 6 and all(f"pool_{number:04d}" not in image for number in range(4) for image in images)
        assert {row["why"] for row in rows} == {"random" if arm == "random" else "uncertain, diverse"}
        with (tmp_path / arm / "2" / "labelled.csv").open(newline="") as file:
            labelled = [row for row in csv.DictReader(file) if row["split"] == "train"]
        assert len(labelled) == 10 and images < {row["image_uri"] for row in labelled}
