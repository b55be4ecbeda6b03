"""The last lines of a job: what is where, and what comes next."""

import sys

import pytest

from vlsm.report.endings import evaluate_ending, segment_ending, sweep_ending, train_ending

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


def test_a_segment_run_says_where_masks_are_and_why_others_are_missing():
    assert segment_ending("/data/out", SEGMENTED) == [
        "38 images of 40 have masks, in /data/out/masks",
        "2 images failed (corrupt 1, empty 1): the rows with status failed say why",
        "look: vlsm report /data/out",
    ]


def test_one_is_singular_and_a_run_without_failures_does_not_mention_any():
    lines = segment_ending("out", {"planned": 1, "ok": 1, "failed": 0, "failed_by_reason": {}})
    assert lines == ["1 image of 1 has masks, in out/masks", "look: vlsm report out"]
    assert sweep_ending("out", {"trials": 1}) == ["1 training, the table is in out/table.md and out/table.csv"]


def test_a_training_names_its_checkpoint_and_quotes_it():
    assert train_ending("s3://b/my run", TRAINED) == [
        "best epoch 8 of 12, Dice 0.888 on val kvasir, 0.870 on test kvasir; checkpoint: 's3://b/my run/checkpoint'",
        "look: vlsm report 's3://b/my run'",
        "use it: vlsm segment INPUT OUTPUT --checkpoint 's3://b/my run/checkpoint'",
    ]


def test_commands_have_the_form_in_which_the_job_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/x/jobs/evaluate.py"])
    assert evaluate_ending("out", {})[-1] == "look: python -m vlsm.report out"
