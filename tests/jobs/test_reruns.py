"""What a further run on the same OUTPUT does: failed images again, changed archives, damaged parts, or all anew."""

import hashlib
import itertools
import shutil

import pandas as pd
import pytest

from jobs import verify
from tests.conftest import save_square
from tests.jobs.conftest import exit_code, read_rows, read_summary, reasons_of, run
from vlsm.config import SegmentSettings
from vlsm.runs.lifecycle import open_input, prepare_run
from vlsm.runs.plan import PlanWriter, cut_shards, shard_table

pytestmark = pytest.mark.usefixtures("in_process")


def test_failed_images_are_done_again_on_demand_and_replaced(archive, bright_checkpoint, tmp_path):
    good = {path.name: path.read_bytes() for path in sorted(archive.iterdir())}
    broken = list(good)[::2]
    for name in broken:
        (archive / name).write_bytes(b"")
    words = [archive, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=2"]
    assert exit_code(*words) == 0
    assert reasons_of(tmp_path / "out") == dict.fromkeys(broken, "empty")
    before = read_rows(tmp_path / "out")
    (archive / broken[0]).write_bytes(good[broken[0]])
    (archive / broken[1]).write_bytes(b"Dear radiologist,")
    assert exit_code(*words) == 0  # which does nothing
    assert reasons_of(tmp_path / "out") == dict.fromkeys(broken, "empty")
    assert exit_code(*words, "--set", "retry_failed=true") == 0
    assert reasons_of(tmp_path / "out") == {broken[1]: "corrupt", broken[2]: "empty"}
    summary = read_summary(tmp_path / "out")
    assert (summary["ok"], summary["failed"], summary["done_before"]) == (4, 2, 3)
    after = read_rows(tmp_path / "out")
    others = [name for name in good if name not in broken]
    pd.testing.assert_frame_equal(before.loc[others], after.loc[others])
    assert after.loc[broken[0], "content_sha256"] == hashlib.sha256(good[broken[0]]).hexdigest()
    assert verify.main([str(tmp_path / "out")]) == 0


def test_what_changed_behind_a_listing_that_broke_off_is_followed_too(archive, bright_checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", "vlsm")
    for number in range(70):
        shutil.copy(archive / "test_0000.png", archive / f"a{number:02d}.png")
    arguments = {
        "input": str(archive),
        "output": str(tmp_path / "out"),
        "members": [{"checkpoint": str(bright_checkpoint)}],
    }
    run = prepare_run(SegmentSettings(**arguments, shard_rows=1))
    writer = PlanWriter(run.settings.output, run.plan.id)
    for shard in itertools.islice(
        cut_shards(open_input(run.settings, [member.settings for member in run.members]).rows, 1), 65
    ):
        writer.add(shard_table(shard))  # the job dies, with a file of 64 shards written
    save_square(archive / "a00.png")
    (archive / "a01.png").unlink()
    save_square(archive / "a00b.png")
    words = [archive, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=1"]
    assert exit_code(*words, "--set", "update=true") == 0
    assert "images since the last plan: 1 new, 1 changed, 1 vanished" in caplog.text
    summary = read_summary(tmp_path / "out")
    assert (summary["planned"], summary["ok"], summary["vanished"]) == (77, 76, 1)
    (tmp_path / "out" / "masks" / ".part-00000003.parquet.0.tmp").write_bytes(b"")  # what a killed process leaves
    assert verify.main([str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind", ["s3", "folder", "manifest"])
def test_an_archive_that_changed_is_followed(archive, bright_checkpoint, tmp_path, kind, s3_folder, caplog):
    import s3fs

    caplog.set_level("INFO", "vlsm")
    names = sorted(path.name for path in archive.iterdir())
    source = {"folder": archive, "s3": f"{s3_folder}/in", "manifest": tmp_path / "list.csv"}[kind]

    def publish():
        if kind == "s3":
            fs = s3fs.S3FileSystem(use_listings_cache=False)
            there = {path.rsplit("/", 1)[-1] for path in fs.find(str(source))}
            here = {path.name for path in archive.iterdir()}
            for name in there - here:
                fs.rm_file(f"{source}/{name}")
            for name in here:
                fs.pipe_file(f"{source}/{name}", (archive / name).read_bytes())
        if kind == "manifest":
            rows = [
                {"image_uri": f"archive/{path.name}", "image_id": path.name, "mtime": path.stat().st_mtime_ns}
                | {"etag": hashlib.md5(path.read_bytes()).hexdigest()}
                for path in sorted(archive.iterdir())
            ]
            pd.DataFrame(rows).to_csv(source, index=False)

    publish()
    words = [source, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=2"]
    assert exit_code(*words) == 0
    before = read_rows(tmp_path / "out")
    untouched = (tmp_path / "out" / "masks" / "part-00000002.parquet").stat().st_mtime_ns
    assert exit_code(*words, "--set", "update=true") == 0
    assert "images since the last plan: 0 new, 0 changed, 0 vanished" in caplog.text

    save_square(archive / names[0], corner="bottom right")
    (archive / names[3]).unlink()
    save_square(archive / "new.png", corner="top left")
    publish()
    assert exit_code(*words) == 0
    assert "is finished: there is nothing to do" in caplog.text
    assert exit_code(*words, "--set", "update=true") == 0
    assert "images since the last plan: 1 new, 1 changed, 1 vanished" in caplog.text
    after = read_rows(tmp_path / "out")
    assert sorted(after.index) == sorted([*names, "new.png"])
    same = [name for name in names if name not in (names[0], names[3])]
    pd.testing.assert_frame_equal(before.loc[same], after.loc[same])
    assert after.loc[names[3], "status"] == "vanished"
    assert after.loc[names[3], "mask_rle"] == before.loc[names[3], "mask_rle"]
    assert after.loc[names[0], "bbox"].tolist()[:2] > [45, 30]
    assert after.loc["new.png", "bbox"].tolist()[:2] == [0, 0]
    assert (tmp_path / "out" / "masks" / "part-00000002.parquet").stat().st_mtime_ns == untouched
    summary = read_summary(tmp_path / "out")
    assert [summary[key] for key in ("planned", "ok", "vanished", "done_before")] == [7, 6, 1, 4]
    assert verify.main([str(tmp_path / "out")]) == 0


def test_equal_files_go_through_the_model_once_and_say_that_they_are_equal(archive, tiny_checkpoint, tmp_path):
    names = sorted(path.name for path in archive.iterdir())
    for number, name in enumerate(names):
        (archive / f"copy {number}.png").write_bytes((archive / name).read_bytes())
    assert exit_code(archive, tmp_path / "out", "--checkpoint", tiny_checkpoint) == 0
    rows = read_rows(tmp_path / "out").fillna({"confidence": -1})
    for number, name in enumerate(names):
        columns = ["content_sha256", "mask_rle", "height", "width", "confidence", "status"]
        assert rows.loc[name, columns].tolist() == rows.loc[f"copy {number}.png", columns].tolist()
        assert rows.loc[name, "content_sha256"] == hashlib.sha256((archive / name).read_bytes()).hexdigest()
    assert rows["content_sha256"].nunique() == len(names)


def test_a_part_with_other_rows_than_planned_is_found_and_mended(archive, tiny_checkpoint, tmp_path, capfd):
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint, "--set", "shard_rows=2"]
    assert run(capfd, *words)[0] == 0
    expected = pd.read_parquet(tmp_path / "out" / "masks")
    assert verify.main([str(tmp_path / "out")]) == 0
    masks = tmp_path / "out" / "masks"
    (masks / "part-00000001.parquet").write_bytes((masks / "part-00000000.parquet").read_bytes())
    (masks / "part-00000002.parquet").write_bytes(b"PAR1")
    (masks / "copy.parquet").write_bytes((masks / "part-00000000.parquet").read_bytes())
    capfd.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 1
    found = capfd.readouterr()
    assert "part-00000001.parquet: not exactly the planned rows for 2 images: 'test_" in found.out
    assert "part-00000001.parquet: 2 rows too many, not planned" in found.out
    assert "part-00000002.parquet is missing, damaged or of another run" in found.out
    assert "masks/copy.parquet is no part of this run" in found.out
    assert "error: " in found.err and "differences" in found.err
    (masks / "copy.parquet").unlink()
    (tmp_path / "out" / "summary.json").unlink()
    code, summary, _ = run(capfd, *words)
    assert (code, summary["done_before"]) == (0, 2)
    assert verify.main([str(tmp_path / "out")]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "masks"), expected)


def test_starting_over_forgets_the_run_and_nothing_else(archive, tiny_checkpoint, tmp_path, capfd):
    words = [archive, tmp_path / "out", "--checkpoint", tiny_checkpoint]
    assert run(capfd, *words, "--set", "shard_rows=1")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "masks" / "mine.csv").write_text("mine")
    code, summary, _ = run(capfd, *words, "--set", "shard_rows=100", "--set", "start_over=true")
    assert (code, summary["parts"], summary["done_before"]) == (0, 1, 0)
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["mine.csv", "part-00000000.parquet"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
