"""What goes wrong with images, machines and stores: rows that can be queried, or one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jobs import verify
from tests.conftest import LONG_S, rare, save_square
from tests.jobs.conftest import exit_code, read_summary, reasons_of

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


@pytest.mark.ray
@pytest.mark.parametrize("poisoned", [["decoder.png"], rare(["decoder.png", "hangs.png", "model.png"])])
def test_images_that_kill_their_process_are_failed_rows_and_their_neighbours_have_masks(
    archive, bright_checkpoint, tmp_path, poisoned
):
    """Each poisoned image ends two processes, and Ray starts others."""
    for number in range(6):
        save_square(archive / f"good {number}.png")
    good = (archive / "good 0.png").read_bytes()
    (archive / "decoder.png").write_bytes(good + b"POISON")
    if "hangs.png" in poisoned:
        (archive / "hangs.png").write_bytes(good + b"HANG")
    if "model.png" in poisoned:
        Image.new("RGB", (40, 40), (77, 77, 77)).save(archive / "model.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    command = [sys.executable, "-m", "jobs.segment", str(archive), str(tmp_path / "out")]
    command += ["--checkpoint", str(bright_checkpoint), "--set", "run.image_timeout_s=2"]
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_ADDRESS": "local"}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert job.returncode == 0, job.stderr[-3000:]
    assert reasons_of(tmp_path / "out") == dict.fromkeys(poisoned, "crashed")
    summary = read_summary(tmp_path / "out")
    assert (summary["ok"], summary["failed_by_reason"]) == (12, {"crashed": len(poisoned)})
    assert verify.main([str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("in_process")
def test_too_many_failures_stop_the_run_and_it_goes_on_when_the_cause_is_mended(
    archive, bright_checkpoint, tmp_path, capfd
):
    good = {path.name: path.read_bytes() for path in archive.iterdir()}
    for name in good:
        (archive / name).write_bytes(b"")
    words = [archive, tmp_path / "out", "--checkpoint", bright_checkpoint, "--set", "shard_rows=1"]
    assert exit_code(*words, "--set", "run.judge_after=2") == 1
    message = capfd.readouterr().err
    assert "2 of 2 images failed, more than run.max_failed_fraction 0.5: empty: " in message
    assert "repair the cause and --set retry_failed=true" in message
    for name, data in good.items():
        (archive / name).write_bytes(data)
    assert exit_code(*words, "--set", "retry_failed=true") == 0
    assert (read_summary(tmp_path / "out")["ok"], reasons_of(tmp_path / "out")) == (6, {})


def test_a_machine_that_computes_otherwise_ends_the_run_unless_it_may(
    ray_cluster, archive, bright_checkpoint, tmp_path, capfd, request
):
    folder = shutil.copytree(bright_checkpoint, tmp_path / "ck")
    settings = folder / "checkpoint.yaml"
    settings.write_text(settings.read_text().replace("- 0.485", "- 0.985"))
    words = [archive, tmp_path / "out", "--checkpoint", folder]
    assert exit_code(*words) == 1
    *_, told = capfd.readouterr().err.strip().splitlines()
    assert "the model does not compute on this machine (cpu, torch" in told and repr(str(folder)) in told
    assert "normalised pixels of its probe differ by" in told and "--set run.probe=false" in told
    assert not list((tmp_path / "out").glob("masks/*"))
    request.getfixturevalue("in_process")
    assert exit_code(*words) == 1
    assert exit_code(*words, "--set", "run.probe=false") == 0  # the same run goes on
    assert read_summary(tmp_path / "out")["ok"] == 6


@pytest.mark.ray
@pytest.mark.nightly
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
