import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs import demo
from tests.conftest import read_mask_rows


@pytest.mark.ray
def test_the_demo_learns_what_it_drew_and_says_where_everything_is(ray_cluster, tmp_path, capfd):
    assert demo.main([str(tmp_path)]) == 0
    out = capfd.readouterr().out
    dice = re.search(r"mean Dice on images never seen: lesion ([\d.]+), stone ([\d.]+)", out)
    assert float(dice[1]) > 0.7 and float(dice[2]) > 0.7  # one that does not listen to its prompt has half of that
    for path in ("segmented/masks/*.parquet", "overlays.png", "training/curves.png", "segmented/summary.json"):
        assert f"{tmp_path}/{path}" in out
    assert np.asarray(Image.open(tmp_path / "overlays.png")).std() > 20
    summary = json.loads((tmp_path / "segmented" / "summary.json").read_text())
    assert (summary["planned"], summary["failed_by_reason"]) == (62, {"corrupt": 1, "empty": 1})
    assert len(read_mask_rows(tmp_path / "segmented")) == 124
