"""What goes wrong with single images, and with archives that change: rows that can be queried, and done again."""

import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jobs import segment, verify
from tests.conftest import LONG_S, save_square, slow
from vlsm.config import SegmentSettings
from vlsm.runs.lifecycle import open_input, prepare_run
from vlsm.runs.plan import PlanWriter, cut_shards, shard_table

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

# What a decoder or a model with a native fault would do, in every process that starts with this on its path.
POISON = """
import builtins, os, sys, time
original = builtins.__import__
def patched(name, *words, **options):
    module = original(name, *words, **options)
    segmenter = sys.modules.get("vlsm.segmentation.segmenter")
    decoder = sys.modules.get("vlsm.images.decode")
    if decoder is not None and hasattr(decoder, "open_images") and not hasattr(decoder, "poisoned"):
        decoder.poisoned, decode = True, decoder.decode_picture
        def poisoned(data, *words):
            if b"POISON" in data:
                os.abort()
            while b"HANG" in data:
                time.sleep(1)
            return decode(data, *words)
        decoder.decode_picture = poisoned
    if segmenter is not None and hasattr(segmenter, "Segmenter") and not hasattr(segmenter, "poisoned"):
        segmenter.poisoned, prepare = True, segmenter.Segmenter.prepare
        def poisoned(self, images):
            if (images == 77).flatten(1).all(1).any():
                os.abort()
            return prepare(self, images)
        segmenter.Segmenter.prepare = poisoned
    return module
builtins.__import__ = patched
"""


def start(*words):
    """The job in this process: exit code and summary."""
    words = [str(word) for word in words]
    return segment.main(words)


def read_rows(output):
    frame = pd.read_parquet(Path(output) / "masks")
    assert not frame.duplicated(["image_id", "prompt"]).any()
    return frame.set_index("image_id").sort_index()


def reasons_of(output):
    rows = read_rows(output)
    failed = rows[rows["status"] == "failed"]
    return {name: error.partition(":")[0] for name, error in failed["error"].items()}


def read_summary(output):
    return json.loads((Path(output) / "summary.json").read_text())


def test_images_that_kill_their_process_are_failed_rows_and_their_neighbours_have_masks(
    archive, bright_checkpoint, tmp_path
):
    for number in range(6):
        save_square(archive / f"good {number}.png")
    good = (archive / "good 0.png").read_bytes()
    (archive / "decoder.png").write_bytes(good + b"POISON")
    (archive / "hangs.png").write_bytes(good + b"HANG")
    Image.new("RGB", (40, 40), (77, 77, 77)).save(archive / "model.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    command = [sys.executable, "-m", "jobs.segment", str(archive), str(tmp_path / "out")]
    command += ["--checkpoint", str(bright_checkpoint), "--set", "run.image_timeout_s=2"]
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_ADDRESS": "local"}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert job.returncode == 0, job.stderr[-3000:]
    assert reasons_of(tmp_path / "out") == dict.fromkeys(["decoder.png", "hangs.png", "model.png"], "crashed")
    summary = read_summary(tmp_path / "out")
    assert (summary["ok"], summary["failed_by_reason"]) == (12, {"crashed": 3})
    assert verify.main([str(tmp_path / "out")]) == 0


def test_failed_images_are_done_again_on_demand_and_replaced(ray_cluster, archive, bright_checkpoint, tmp_path):
    good = {path.name: path.read_bytes() for path in sorted(archive.iterdir())}
    broken = list(good)[::2]
    for name in broken:
        (archive / name).write_bytes(b"")
    words = [archive, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=2"]
    assert start(*words) == 0
    assert reasons_of(tmp_path / "out") == dict.fromkeys(broken, "empty")
    before = read_rows(tmp_path / "out")
    (archive / broken[0]).write_bytes(good[broken[0]])
    (archive / broken[1]).write_bytes(b"Dear radiologist,")
    assert start(*words) == 0  # which does nothing
    assert reasons_of(tmp_path / "out") == dict.fromkeys(broken, "empty")
    assert start(*words, "--set", "retry_failed=true") == 0
    assert reasons_of(tmp_path / "out") == {broken[1]: "corrupt", broken[2]: "empty"}
    summary = read_summary(tmp_path / "out")
    assert (summary["ok"], summary["failed"], summary["done_before"]) == (4, 2, 3)
    after = read_rows(tmp_path / "out")
    others = [name for name in good if name not in broken]
    pd.testing.assert_frame_equal(before.loc[others], after.loc[others])
    assert after.loc[broken[0], "content_sha256"] == hashlib.sha256(good[broken[0]]).hexdigest()
    assert verify.main([str(tmp_path / "out")]) == 0


def test_too_many_failures_stop_the_run_and_it_goes_on_when_the_cause_is_mended(
    ray_cluster, archive, bright_checkpoint, tmp_path, capfd
):
    good = {path.name: path.read_bytes() for path in archive.iterdir()}
    for name in good:
        (archive / name).write_bytes(b"")
    words = [archive, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=1"]
    assert start(*words, "--set", "run.judge_after=2") == 1
    message = capfd.readouterr().err
    assert "2 of 2 images failed, more than run.max_failed_fraction 0.5: empty: " in message
    assert "repair the cause and --set retry_failed=true" in message
    for name, data in good.items():
        (archive / name).write_bytes(data)
    assert start(*words, "--set", "retry_failed=true") == 0
    assert (read_summary(tmp_path / "out")["ok"], reasons_of(tmp_path / "out")) == (6, {})


@pytest.mark.usefixtures("ray_cluster")
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
    assert start(*words, "--set", "update=true") == 0
    assert "images since the last plan: 1 new, 1 changed, 1 vanished" in caplog.text
    summary = read_summary(tmp_path / "out")
    assert (summary["planned"], summary["ok"], summary["vanished"]) == (77, 76, 1)
    (tmp_path / "out" / "masks" / ".part-00000003.parquet.0.tmp").write_bytes(b"")  # what a killed process leaves
    assert verify.main([str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["s3", *slow("folder", "manifest")])
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
    assert start(*words) == 0
    before = read_rows(tmp_path / "out")
    untouched = (tmp_path / "out" / "masks" / "part-00000002.parquet").stat().st_mtime_ns
    assert start(*words, "--set", "update=true") == 0
    assert "images since the last plan: 0 new, 0 changed, 0 vanished" in caplog.text

    save_square(archive / names[0], corner="bottom right")
    (archive / names[3]).unlink()
    save_square(archive / "new.png", corner="top left")
    publish()
    assert start(*words) == 0
    assert "is finished: there is nothing to do" in caplog.text
    assert start(*words, "--set", "update=true") == 0
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


def test_equal_files_go_through_the_model_once_and_say_that_they_are_equal(
    ray_cluster, archive, tiny_checkpoint, tmp_path
):
    names = sorted(path.name for path in archive.iterdir())
    for number, name in enumerate(names):
        (archive / f"copy {number}.png").write_bytes((archive / name).read_bytes())
    assert start(archive, tmp_path / "out", "--checkpoint", tiny_checkpoint) == 0
    rows = read_rows(tmp_path / "out").fillna({"confidence": -1})
    for number, name in enumerate(names):
        columns = ["content_sha256", "mask_rle", "height", "width", "confidence", "status"]
        assert rows.loc[name, columns].tolist() == rows.loc[f"copy {number}.png", columns].tolist()
        assert rows.loc[name, "content_sha256"] == hashlib.sha256((archive / name).read_bytes()).hexdigest()
    assert rows["content_sha256"].nunique() == len(names)


def test_a_machine_that_computes_otherwise_ends_the_run_unless_it_may(
    ray_cluster, archive, bright_checkpoint, tmp_path, capfd, caplog
):
    caplog.set_level(logging.INFO, "vlsm")
    folder = shutil.copytree(bright_checkpoint, tmp_path / "ck")
    settings = folder / "checkpoint.yaml"
    settings.write_text(settings.read_text().replace("- 0.485", "- 0.985"))
    words = [archive, tmp_path / "out", "--checkpoint", folder]
    assert start(*words) == 1
    *_, told = capfd.readouterr().err.strip().splitlines()
    assert "the model does not compute on this machine (cpu, torch" in told and repr(str(folder)) in told
    assert "normalised pixels of its probe differ by" in told and "--set run.probe=false" in told
    assert not list((tmp_path / "out").glob("masks/*"))
    assert start(*words, "--set", "run.probe=false") == 0  # the same run goes on
    assert read_summary(tmp_path / "out")["ok"] == 6
    assert start(archive, tmp_path / "right", "--checkpoint", bright_checkpoint) == 0
    assert "computes as it should: the logits of its probe differ by" in caplog.text


@pytest.mark.slow
def test_a_store_that_is_away_for_too_long_ends_the_run_and_no_image_is_blamed(tiny_checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    pd.DataFrame({"image_uri": [f"s3://images/{rng.integers(1e9)}.png" for _ in range(3)]}).to_csv(
        tmp_path / "list.csv", index=False
    )
    words = ["--checkpoint", str(tiny_checkpoint), "--set", "run.outage_patience_s=1"]
    command = [sys.executable, "-m", "jobs.segment", str(tmp_path / "list.csv"), str(tmp_path / "out"), *words]
    environment = os.environ | {"RAY_ADDRESS": "local", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert job.returncode == 1
    assert "StorageError: s3://images/" in job.stderr and "could not be reached in" in job.stderr
    assert not list((tmp_path / "out").glob("masks/*"))
