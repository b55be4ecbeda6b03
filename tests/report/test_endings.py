"""The last lines of a job: what is where, and what comes next."""

import re
import sys
from pathlib import Path

import pytest

from vlsm.config import SegmentSettings
from vlsm.report.endings import evaluate_ending, segment_ending, sweep_ending, train_ending
from vlsm.runs.results import write_part
from vlsm.training.settings import TrainSettings

SEGMENTED = {"planned": 40, "ok": 38, "failed": 2, "failed_by_reason": {"corrupt": 1, "empty": 1}}
TRAINED = {
    "checkpoint": "s3://b/my run/checkpoint",
    "best_epoch": 8,
    "epochs": 12,
    "dice": {"val kvasir": 0.88849, "val mean": 0.88849, "test kvasir": 0.87, "test mean": 0.87},
}


@pytest.fixture(autouse=True)
def _as_vlsm(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vlsm"])


def segmented(source, output, **more):
    return SegmentSettings(input=source, output=output, members=[{"checkpoint": "c"}], **more)


def test_a_segment_run_says_where_masks_are_and_why_others_are_missing():
    assert segment_ending(segmented("/data/in", "/data/out"), SEGMENTED) == [
        "38 images of 40 have masks, in /data/out/masks",
        "2 images failed (corrupt 1, empty 1): the rows with status failed say why",
        'read: pandas.read_parquet("/data/out/masks")',
        "look: vlsm report /data/out",
    ]


def test_one_is_singular_and_a_run_without_failures_does_not_mention_any():
    lines = segment_ending(segmented("in", "out"), {"planned": 1, "ok": 1, "failed": 0, "failed_by_reason": {}})
    assert lines == [
        "1 image of 1 has masks, in out/masks",
        'read: pandas.read_parquet("out/masks")',
        "look: vlsm report out",
    ]
    assert sweep_ending("out", {"trials": 1}) == ["1 training, the table is in out/table.md and out/table.csv"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://masks/in", ""),
        ("s3://scans/2024", " --allow s3://scans"),
        ("/data/scans", " --allow /data/scans"),
        ("https://host/list.csv?x=1", " --allow https://host"),
    ],
)
def test_the_report_of_an_output_in_a_store_may_read_the_images_of_its_run(source, words):
    *_, look = segment_ending(segmented(source, "s3://masks/out"), SEGMENTED)
    assert look == f"look: vlsm report s3://masks/out{words}"


def test_a_training_names_its_checkpoint_and_quotes_it():
    settings = TrainSettings(
        output="s3://b/my run", datasets={"kvasir": "s3://b/kvasir", "own": "s3://c/own"}, model="unet_d"
    )
    assert train_ending(settings, TRAINED) == [
        "best epoch 8 of 12, Dice 0.888 on val kvasir, 0.870 on test kvasir; checkpoint: 's3://b/my run/checkpoint'",
        "look: vlsm report 's3://b/my run' --allow s3://c",
        "use it: vlsm segment INPUT OUTPUT --checkpoint 's3://b/my run/checkpoint'",
    ]


def test_commands_have_the_form_in_which_the_job_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/x/jobs/evaluate.py"])
    assert evaluate_ending("out", ["/a"])[-1] == "look: python -m vlsm.report out"


def test_the_lines_that_read_masks_work_as_they_are_written(tmp_path):
    """Those of the end of a job, and those of vlsm/README.md, in an OUTPUT with all files of a run."""
    import duckdb
    import pandas
    import pyarrow.parquet

    output = tmp_path / "my run's"
    rows = [
        {"image_id": f"{n}.png", "image_uri": f"/{n}.png", "prompt": "a", "kind": "mask", "status": "ok"} for n in "123"
    ]
    for shard, row in enumerate(rows):
        write_part(str(output), shard, [row | {"model": "m"}], "run", 0)
    for name in ("config.yaml", "summary.json", "masks/.part-00000000.parquet.tmp"):
        (output / name).write_text("no table")
    (line,) = (one for one in segment_ending(segmented("in", str(output)), SEGMENTED) if one.startswith("read: "))
    assert sorted(eval(line.removeprefix("read: "), {"pandas": pandas}).image_id) == ["1.png", "2.png", "3.png"]  # noqa: S307
    documented = (Path(__file__).parents[2] / "vlsm" / "README.md").read_text()
    lines = re.findall(r"^(?:pandas|pyarrow|duckdb)\..*OUTPUT/masks.*$", documented, re.MULTILINE)
    assert [line.partition(".")[0] for line in lines] == ["pandas", "pyarrow", "duckdb"]
    for line in lines:
        code = line.partition("  #")[0].replace("OUTPUT", str(output).replace("'", "''" if "duckdb" in line else "'"))
        assert eval(f"len({code})", {"pandas": pandas, "pyarrow": pyarrow, "duckdb": duckdb}) == 3, code  # noqa: S307
