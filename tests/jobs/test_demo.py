import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs import demo
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


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(5))
def test_the_demo_learns_what_it_drew(ray_cluster, tmp_path, capfd, seed):
    lesion, stone = tell(tmp_path, capfd, 60, "--seed", str(seed))
    assert lesion > 0.8 and stone > 0.8  # one that does not listen to its prompt has half of that
