"""A hospital's list through a whole run: its columns are in the rows, proven, and changed without segmenting again."""

import pandas as pd
import pytest

from jobs import verify
from tests.jobs.conftest import run

pytestmark = pytest.mark.ray


def test_columns_of_a_list_travel_through_a_run_and_an_update_segments_nothing(
    ray_cluster, archive, tiny_checkpoint, tmp_path, capfd
):
    names = sorted(path.name for path in archive.iterdir())
    (archive / names[1]).write_bytes(b"no image")
    frame = pd.DataFrame({"path": [f"archive/{name}" for name in names], "patient_id": [f"00{n}" for n in range(6)]})
    frame["site"], frame["view"] = ["north", "south"] * 3, [None, *"lrlrl"]
    frame.to_csv(tmp_path / "list.csv", index=False)
    words = [tmp_path / "list.csv", tmp_path / "out", "--checkpoint", tiny_checkpoint, "--set", "shard_rows=2"]
    words += ["--set", "columns.image_uri=path", "--set", "carry=[patient_id, view]"]
    assert run(capfd, *words)[0] == 0
    rows = pd.read_parquet(tmp_path / "out" / "masks")
    assert list(rows["patient_id"]) == [f"00{number}" for number in range(6)]
    assert list(rows["status"]) == ["ok", "failed", *["ok"] * 4]
    assert rows["view"].isna().tolist() == [True] + 5 * [False] and "site" not in rows
    assert verify.main([str(tmp_path / "out")]) == 0
    capfd.readouterr()
    for name in names[2:]:
        (archive / name).write_bytes(b"a run that read this image again would fail")
    frame["patient_id"] = [f"10{number}" for number in range(6)]
    frame.to_csv(tmp_path / "list.csv", index=False)
    code, summary, err = run(capfd, *words[:-1], "carry=[site, patient_id]", "--set", "update=true")
    assert (code, summary["ok"], summary["failed"], summary["done_before"]) == (0, 5, 1, 6)
    assert "other columns of the list for 6 images: their rows get them" in err
    after = pd.read_parquet(tmp_path / "out" / "masks")
    assert list(after["patient_id"]) == [f"10{number}" for number in range(6)] and "view" not in after
    assert list(after["site"]) == ["north", "south"] * 3
    pd.testing.assert_frame_equal(after.drop(columns=["site", "patient_id"]), rows.drop(columns=["patient_id", "view"]))
    assert verify.main([str(tmp_path / "out")]) == 0
