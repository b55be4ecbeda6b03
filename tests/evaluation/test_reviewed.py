"""Images that a reviewer has rejected are in no score, for any system; other marks change nothing."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from vlsm.cells import CsvWriter
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError
from vlsm.evaluation.parts import open_source
from vlsm.evaluation.planning import MARKDOWN_NAME, finish_evaluation, plan_evaluation, prepare_evaluation
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.runs.marks import MARKS_SCHEMA
from vlsm.runs.plan import write_plan
from vlsm.runs.record import describe_differences, make_record, read_record, write_record
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask

PROMPT, RUNS = "bright", ("a" * 32, "b" * 32)


def write_run(folder, run_id, paths):
    """Write a finished segment run that finds the left half of each image."""
    output = folder / run_id[0]
    plan_row = dict.fromkeys(("selector", "offset", "length", "problem", "image_version", "size_bytes", "etag"))
    plan_row |= {"mtime": None, "prompts": [PROMPT]}
    images = [plan_row | {"image_id": f"{path.name} of {run_id[0]}", "image_uri": str(path)} for path in paths]
    words = {"input": str(folder), "output": str(output), "members": [{"checkpoint": "c"}]}
    plan = write_plan(str(output), images, 100)
    settings = load_settings(SegmentSettings, None, [f"prompts=[{PROMPT}]"], words)
    write_record(str(output), make_record(settings, {"run_id": run_id}, asdict(plan)))
    mask = np.zeros((20, 20), np.uint8)
    mask[:, :10] = 1
    row = {"prompt": PROMPT, "kind": "mask", "model": "m", "status": "ok", "height": 20, "width": 20}
    row |= {"mask_rle": encode_mask(mask), "area_px": 200, "area_fraction": 0.5, "bbox": [0, 0, 10, 20]}
    rows = [row | {name: image[name] for name in ("image_id", "image_uri")} for image in images]
    write_part(str(output), 0, rows, run_id, 0)
    summary = {"planned": len(paths), "ok": len(paths), "failed": 0, "vanished": 0, "rows": len(paths)}
    (output / "summary.json").write_text(json.dumps(summary | {"failed_by_reason": {}, "seconds": 1}))
    return str(output)


@pytest.fixture
def make_settings(tmp_path):
    """Settings of an evaluation of two runs over four images; the n-th label covers the first n quarters."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 20), (50 * number, 9, 9)).save(path)
        label = np.zeros((20, 20), np.uint8)
        label[:, : 5 * (number + 1)] = 255
        Image.fromarray(label).save(tmp_path / f"{number}.mask.png")
    rows = [{"image_uri": f"{n}.png", "mask_uri": f"{n}.mask.png", "split": "test", "prompt": PROMPT} for n in range(4)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {name: write_run(tmp_path, run_id, paths) for name, run_id in zip(("one", "two"), RUNS, strict=True)}
    given = {"datasets": {"d": str(tmp_path / "list.jsonl")}, "masks": runs}
    return lambda **more: EvaluateSettings(**{"output": str(tmp_path / "out")} | given | more)


def save_marks(folder, run_id, marks, name="marks.csv"):
    row = {"run_id": run_id, "prompt": PROMPT, "time": "2026-01-02T03:04:05Z", "mask_digest": ""}
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        CsvWriter(file, MARKS_SCHEMA.names).write_all(
            row | {"image_id": f"{number}.png of {run_id[0]}", "mark": mark} for number, mark in marks.items()
        )
    return str(folder / name)


def score(settings):
    evaluation = prepare_evaluation(settings)
    tables = [open_source(system, evaluation.settings).score_part(0) for system in evaluation.systems]
    return finish_evaluation(evaluation, tables, 1.0)


def test_a_rejected_image_is_in_no_score_of_any_system(make_settings, tmp_path):
    """The marks are of the second run; the Dice of the images are 0.67, 1, 0.8 and 0.67."""
    marks = save_marks(tmp_path, RUNS[1], {0: "reject", 1: "redo", 2: "accept", 3: "reject"})
    summary = score(make_settings(marks=marks))
    assert (summary["rows"], summary["ok"], summary["rejected"]) == (4, 4, 2)
    means = {each["system"]: each["mean"] for each in summary["dice"]}
    assert means == pytest.approx({"one": 0.9, "two": 0.9})
    table = (tmp_path / "out" / MARKDOWN_NAME).read_text()
    assert "Left out, because a reviewer rejected their images: 2 records." in table
    record = read_record(str(tmp_path / "out"))
    assert (record["num_rejected"], record["plan"]["num_records"]) == (2, 2)


def test_without_rejected_images_the_scores_are_as_without_marks(make_settings, tmp_path):
    plain = score(make_settings())
    marks = save_marks(tmp_path, RUNS[0], {0: "redo", 1: "accept"})
    marked = score(make_settings(marks=marks, output=str(tmp_path / "marked")))
    assert "rejected" not in plain and marked["rejected"] == 0
    assert marked["dice"] == plain["dice"]
    assert (tmp_path / "marked" / MARKDOWN_NAME).read_text() == (tmp_path / "out" / MARKDOWN_NAME).read_text()


def test_marks_of_another_run_and_marks_that_leave_nothing_are_errors(make_settings, tmp_path):
    marks = save_marks(tmp_path, "c" * 32, {0: "reject"})
    with pytest.raises(ConfigError, match=r"are of the segment run c+, which is none of --masks; add the reviewed run"):
        plan_evaluation(make_settings(marks=marks))
    marks = save_marks(tmp_path, RUNS[0], dict.fromkeys(range(4), "reject"))
    with pytest.raises(ConfigError, match="all images of the 4 records are rejected"):
        plan_evaluation(make_settings(marks=marks))
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        plan_evaluation(make_settings(marks=str(tmp_path / "nowhere.csv")))


def test_an_evaluation_with_other_rejected_images_is_another_one(make_settings, tmp_path):
    settings = make_settings(marks=save_marks(tmp_path, RUNS[0], {0: "reject"}))
    prepare_evaluation(settings)
    record = read_record(settings.output)
    save_marks(tmp_path, RUNS[0], {0: "reject", 1: "accept"})  # more marks, the same rejected images
    evaluation, facts = plan_evaluation(settings)
    assert describe_differences(record, evaluation.settings, facts) == []
    save_marks(tmp_path, RUNS[0], {1: "reject"})
    with pytest.raises(ConfigError, match="with other settings: .*rejected"):
        prepare_evaluation(settings)
