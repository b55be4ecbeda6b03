"""The segment job as tests run it, and a run over a hard archive that several of them look at."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jobs import segment

ROOT = Path(__file__).parents[2]


def run(capfd, *words):
    """The job in this process, on the tests' cluster: exit code, the JSON line, what it logged."""
    capfd.readouterr()
    handler, logger = logging.StreamHandler(), logging.getLogger("vlsm")
    logging.root.addHandler(handler)  # as a process of its own has it
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        code = segment.main([str(word) for word in words])
    finally:
        logging.root.removeHandler(handler)
        logger.setLevel(level)
    captured = capfd.readouterr()
    assert captured.out.count("\n") == (1 if code == 0 else 0)
    return code, json.loads(captured.out) if code == 0 else None, captured.err


def exit_code(*words):
    """Of the job in this process."""
    return segment.main([str(word) for word in words])


def start(*words, **environment):
    """The job as a user starts it."""
    command = [sys.executable, "-m", "jobs.segment", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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


@pytest.fixture(autouse=True)
def _environment():
    """Benchmarks name their store in the environment: its certificates are gone after the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def hard_archive(tmp_path_factory):
    """300 images in three folders, 12 of which no one can read."""
    folder = tmp_path_factory.mktemp("hard") / "archive"
    rng = np.random.default_rng(0)
    for number in range(288):
        path = folder / f"study {number % 3}" / f"scan_{number // 3:03d}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*rng.integers(20, 90, 2), 3), dtype=np.uint8)).save(path)
    good = (folder / "study 0" / "scan_000.png").read_bytes()
    jpeg = (folder / "study 1" / "scan_000.jpg").read_bytes()
    bad = {
        "empty.png": b"",
        "empty.jpg": b"",
        "text.png": b"Dear radiologist,",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": good[: len(good) // 2],
        "header.png": good[:30],
        "zeros.tif": bytes(500),
        "page.jpg": b"<html>404 Not Found</html>",
        "pdf.bmp": b"%PDF-1.4 " + bytes(200),
        "nothing.webp": b"RIFF" + bytes(8) + b"WEBP",
        "é [1] %20.png": good[: len(good) // 3],
    }
    for number, (name, data) in enumerate(bad.items()):
        (folder / f"study {number % 3}" / name).write_bytes(data)
    Image.new("1", (20_000, 20_000)).save(folder / "study 0" / "bomb.png")
    return folder


@pytest.fixture(scope="session")
def undisturbed(ray_cluster, hard_archive, tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    words = [str(hard_archive), str(output), "--checkpoint", str(tiny_checkpoint), "--set", "shard_rows=16"]
    assert segment.main([*words, "--set", "prompts=[polyp, lesion]", "--set", "allow_equal_masks=true"]) == 0
    return output


@pytest.fixture(autouse=True)
def _keep_threads():
    """Benchmarks choose how many threads torch has in their process."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
