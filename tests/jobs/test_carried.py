"""A hospital's list through the tasks of a run: its columns are in the rows, proven, and changed without models."""

import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.segment
from jobs import verify
from jobs.segment import dry_run
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError


@pytest.fixture
def segment(in_process, tiny_checkpoint):
    """Run the segment job; return the summary and how many images it has read."""

    def segment(source, output, *words):
        arguments = {"input": str(source), "output": str(output), "members": [{"checkpoint": str(tiny_checkpoint)}]}
        settings, before = (
            load_settings(SegmentSettings, None, ["shard_rows=2", *words], arguments),
            in_process.num_read,
        )
        return jobs.segment.segment(settings), in_process.num_read - before

    return segment


def test_columns_of_a_list_travel_through_a_run_and_an_update_reads_no_image(archive, segment, tmp_path, capfd):
    names = sorted(path.name for path in archive.iterdir())
    (archive / names[1]).write_bytes(b"no image")
    frame = pd.DataFrame({"path": [f"archive/{name}" for name in names], "patient_id": [f"00{n}" for n in range(6)]})
    frame["site"], frame["view"] = ["north", "south"] * 3, [None, *"lrlrl"]
    frame.to_csv(source := tmp_path / "list.csv", index=False)
    output = tmp_path / "out"
    summary, num_read = segment(source, output, "carry=[patient_id, view]")
    assert (summary["ok"], summary["failed"], num_read) == (5, 1, 6)
    rows = pd.read_parquet(output / "masks")
    assert list(rows["patient_id"]) == [f"00{number}" for number in range(6)]
    assert list(rows["status"]) == ["ok", "failed", *["ok"] * 4]
    assert rows["view"].isna().tolist() == [True] + 5 * [False] and "site" not in rows
    assert verify.main([str(output)]) == 0
    frame["patient_id"] = [f"10{number}" for number in range(6)]
    frame[:5].to_csv(source, index=False)  # the last image is gone
    summary, num_read = segment(source, output, "carry=[site, patient_id]", "update=true")
    assert (summary["ok"], summary["failed"], summary["vanished"], num_read) == (4, 1, 1, 0)
    after = pd.read_parquet(output / "masks")
    assert list(after["patient_id"]) == ["100", "101", "102", "103", "104", "005"] and "view" not in after
    assert list(after["site"][:5]) == ["north", "south", "north", "south", "north"] and after["site"].isna()[5]
    ours = [name for name in rows if name not in ("patient_id", "view", "status")]
    pd.testing.assert_frame_equal(after[ours], rows[ours])
    assert verify.main([str(output)]) == 0
    capfd.readouterr()


def test_columns_beside_images_in_parquet_travel_through_a_run(archive, segment, tmp_path, capfd):
    names = sorted(path.name for path in archive.iterdir())
    images = [{"bytes": (archive / name).read_bytes(), "path": name} for name in names]
    images[1] = {"bytes": b"no image", "path": names[1]}
    table = pa.table({"image": images, "site": ["north", "south"] * 3, "age": pa.array(range(6), pa.int16())})
    source, output = tmp_path / "hub", tmp_path / "out"
    source.mkdir()
    pq.write_table(table, source / "train-0.parquet")
    (source / "train-1.parquet").write_bytes(b"PAR1 damaged PAR1")
    summary, num_read = segment(source, output, "run.max_failed_fraction=1")
    assert (summary["ok"], summary["failed"], num_read) == (5, 2, 7)
    rows = pd.read_parquet(output / "masks")
    assert [None if pd.isna(site) else site for site in rows["site"]] == ["north", "south"] * 3 + [None]
    assert list(rows["age"][:6]) == list(range(6)) and rows["status"].tolist().count("failed") == 2
    assert verify.main([str(output)]) == 0
    pq.write_table(table.set_column(2, "age", [list(range(10, 16))]), source / "train-0.parquet")
    (source / "train-1.parquet").unlink()
    summary, _ = segment(source, output, "update=true", "run.max_failed_fraction=1")
    assert (summary["ok"], summary["vanished"]) == (5, 1)
    assert list(pd.read_parquet(output / "masks")["age"][:6]) == list(range(10, 16))
    assert verify.main([str(output)]) == 0
    shutil.copy(archive / names[0], source)  # the columns would be lost
    with pytest.raises(ConfigError, match=r"have the columns site, age, but INPUT .* carry=\[\] drops the columns"):
        segment(source, output, "update=true")
    assert "site" in pd.read_parquet(output / "masks")
    capfd.readouterr()


def test_a_dry_run_tells_which_columns_travel(archive, tiny_checkpoint, tmp_path, caplog, capfd):
    caplog.set_level("INFO")
    (tmp_path / "list.csv").write_text("image_uri,site\narchive/a.png,north\n")
    arguments = {"input": str(tmp_path / "list.csv"), "output": str(tmp_path / "out")}
    dry_run(SegmentSettings(**arguments, members=[{"checkpoint": str(tiny_checkpoint)}]))
    assert "columns that travel into the results: site" in caplog.text
    assert "# 1 image, 1 output row" in capfd.readouterr().out and not (tmp_path / "out").exists()
