"""What was written stays readable: files of format 0 in tests/written/v0, and files of a format that is yet to come.

Format 0 was written by the last commit without a format version: an archive, two checkpoints, a finished OUTPUT, a
finished and an interrupted training, an evaluation. Its URIs begin with s3://images/v0.
"""

import io
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import vlsm
from jobs.benchmarks.stores import BUCKET
from vlsm import read_masks
from vlsm.config import SegmentSettings
from vlsm.errors import CheckpointError, ConfigError, ResultError
from vlsm.report.status import read_status
from vlsm.report.write import write_report
from vlsm.runs.record import describe_differences, read_record, write_record
from vlsm.runs.results import open_results, part_name, read_part
from vlsm.runs.schema import PLAN_SCHEMA, RESULT_SCHEMA, check_format, complete
from vlsm.runs.verify import verify_run
from vlsm.training.run import read_examples
from vlsm.training.state import pack_state, read_state
from vlsm.version import FORMAT

V0 = Path(__file__).parents[1] / "written" / "v0"
ROOT = f"s3://{BUCKET}/v0"


@pytest.fixture
def stored(s3_server):
    """The files where they were written; what an earlier test has changed is put back."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    if fs.exists(f"{BUCKET}/v0"):
        fs.rm(f"{BUCKET}/v0", recursive=True)
    fs.put(f"{V0}/", f"{BUCKET}/v0/", recursive=True)
    return fs


def settings_of(output):
    return SegmentSettings(**read_record(output)["config"])


def test_a_finished_run_is_read_and_proven(stored, tmp_path):
    rows = list(read_masks(f"{ROOT}/output"))
    assert len(rows) == 49 and {row["kind"] for row in rows} == {"mask", "member 1", "member 2", "labels"}
    *_, proof = verify_run(f"{ROOT}/output")
    assert proof.differences == []
    report = Path(write_report(f"{ROOT}/output", tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "broken.png" in report
    assert read_status(f"{ROOT}/output").is_finished


def test_a_new_setting_with_a_default_and_a_new_column_orphan_nothing(stored):
    record = read_record(f"{ROOT}/output")
    settings = settings_of(f"{ROOT}/output")
    del record["config"]["clean"], record["config"]["tile"]["overlap"], record["config"]["members"][0]["flip"]
    write_record(f"{ROOT}/output", record)
    assert describe_differences(read_record(f"{ROOT}/output"), settings, {}) == []
    changed = settings.model_copy(update={"tile": settings.tile.model_copy(update={"overlap": 0.5})})
    assert describe_differences(record, changed, {}) == ["tile.overlap (there 0.25, now 0.5)"]
    part = part_name(0)
    table = pq.read_table(io.BytesIO(stored.cat_file(f"{BUCKET}/v0/output/masks/{part}")))
    sink = io.BytesIO()
    pq.write_table(table.drop_columns(["review", "label_map"]), sink)
    stored.pipe_file(f"{BUCKET}/v0/output/masks/{part}", sink.getvalue())
    rows = read_part(f"{ROOT}/output", 0, record["run_id"])
    assert rows.schema.equals(RESULT_SCHEMA) and rows["review"].null_count == len(rows)
    *_, proof = verify_run(f"{ROOT}/output")
    assert proof.differences == []
    assert len(list(read_masks(f"{ROOT}/output"))) == 49


def test_a_column_that_may_not_be_null_or_has_another_type_is_no_older_version():
    row = {"image_id": "a", "image_uri": "/a", "prompts": ["polyp"], "vanished": False}
    table = pa.Table.from_pylist([row], schema=PLAN_SCHEMA)
    assert complete(table.drop_columns(["problem"]), PLAN_SCHEMA) == table
    with pytest.raises(ValueError, match="the column image_id is absent or has nulls"):
        complete(table.drop_columns(["image_id"]), PLAN_SCHEMA)
    with pytest.raises(pa.ArrowException):
        complete(table.set_column(5, "problem", pa.array([{"a": 1}])), PLAN_SCHEMA)


@pytest.mark.parametrize("name", ["checkpoint", "pixel", "clipseg"])
def test_checkpoints_load(name):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(V0 / name), device="cpu")
    assert segmenter.settings.format == 0
    assert segmenter.model.image_spec.resize == "squeeze"
    (mask,) = segmenter.segment([np.zeros((40, 60, 3), np.uint8)])
    assert mask.shape == (40, 60)


def test_trainings_are_read(stored, tmp_path):
    for name in ("training", "interrupted"):
        assert len(read_examples(f"{ROOT}/{name}")) == 36
    state = read_state(f"{ROOT}/interrupted")
    assert state.epoch >= 1 and state.weights and state.optimizer["state"] and state.history.rows
    report = Path(write_report(f"{ROOT}/training", tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "drawn" in report
    assert "drawn" in Path(write_report(f"{ROOT}/evaluation", tmp_path / "scores.html")).read_text(encoding="utf-8")


def test_a_run_of_an_earlier_version_is_continued_and_updated(in_process, stored, capfd):
    """A part is lost and an image is gone: the same command writes both, and the rest stays as it was."""
    from jobs import segment

    before = {(row["image_id"], row["prompt"], row["kind"]): row for row in read_masks(f"{ROOT}/output")}
    config = yaml.safe_dump({
        key: value for key, value in read_record(f"{ROOT}/output")["config"].items() if key not in ("input", "output")
    })  # fmt: skip
    stored.rm_file(f"{BUCKET}/v0/output/masks/{part_name(0)}")
    stored.rm_file(f"{BUCKET}/v0/output/summary.json")
    vanished = sorted({image_id for image_id, *_ in before if image_id != "broken.png"})[-1]
    stored.rm_file(f"{BUCKET}/v0/archive/{vanished}")
    file = f"{ROOT}/again.yaml"
    stored.pipe_file(file.removeprefix("s3://"), config.encode())
    assert segment.main([f"{ROOT}/archive", f"{ROOT}/output", "--config", file, "--set", "update=true"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert (summary["planned"], summary["vanished"], summary["failed"]) == (7, 1, 1)
    after = {(row["image_id"], row["prompt"], row["kind"]): row for row in read_masks(f"{ROOT}/output")}
    assert after.keys() == before.keys()
    for key, row in after.items():
        assert row["status"] == ("vanished" if key[0] == vanished else before[key]["status"])
        if row["area_px"] is not None:
            assert abs(row["area_px"] - before[key]["area_px"]) <= 2  # other threads add in another order
    assert any(row["status"] == "vanished" and row["mask"] is not None for row in after.values())


@pytest.mark.nightly
def test_a_training_of_an_earlier_version_is_continued(ray_cluster, stored, capfd):
    from jobs import train

    config = read_record(f"{ROOT}/interrupted")["config"]
    stored.pipe_file(f"{BUCKET}/v0/again.yaml", yaml.safe_dump(config).encode())
    assert train.main([f"{ROOT}/interrupted", "--config", f"{ROOT}/again.yaml"]) == 0
    finished = json.loads(stored.cat_file(f"{BUCKET}/v0/training/summary.json"))
    summary = json.loads(capfd.readouterr().out)
    assert (summary["steps"], summary["epochs"]) == (finished["steps"], finished["epochs"])
    for name, dice in finished["dice"].items():
        assert summary["dice"][name] == pytest.approx(dice, abs=1e-3)


def test_a_newer_format_is_refused_in_one_sentence(tmp_path):
    newer = FORMAT + 1
    sentence = f"has the format {newer}; this version of vlsm reads formats up to {FORMAT}: install a newer vlsm"
    output = tmp_path / "output"
    shutil.copytree(V0 / "output", output)
    part = output / "masks" / part_name(0)
    table = pq.read_table(part)
    run_id = yaml.safe_load((output / "config.yaml").read_text())["run_id"]
    pq.write_table(table.replace_schema_metadata({"vlsm.run": run_id, "vlsm.format": str(newer)}), part)
    for read in (lambda: read_part(str(output), 0, run_id), lambda: open_results(str(output))):
        with pytest.raises(ResultError, match=f"{part_name(0)} {sentence}"):
            read()
    record = yaml.safe_load((output / "config.yaml").read_text()) | {"format": newer}
    (output / "config.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(ConfigError, match=sentence):
        read_record(str(output))
    shutil.copytree(V0 / "pixel", tmp_path / "pixel")
    settings = yaml.safe_load((tmp_path / "pixel" / "checkpoint.yaml").read_text())
    (tmp_path / "pixel" / "checkpoint.yaml").write_text(yaml.safe_dump(settings | {"format": newer, "later": 1}))
    with pytest.raises(CheckpointError, match=sentence):
        vlsm.load_checkpoint(tmp_path / "pixel")
    state = read_state(str(V0 / "training"))
    packed = pack_state(state).replace(f'\\"format\\": {FORMAT}'.encode(), f'\\"format\\": {newer}'.encode())
    (tmp_path / "last.safetensors").write_bytes(packed)
    with pytest.raises(ConfigError, match=sentence):
        read_state(str(tmp_path))


@pytest.mark.parametrize("stated", [b"", b"one", b"-1", b"1.5", b"\xff", b"9" * 100])
def test_a_part_whose_format_is_no_number_is_refused_too(stated):
    with pytest.raises(ResultError, match="part has the format .*: install a newer vlsm"):
        check_format(RESULT_SCHEMA.with_metadata({"vlsm.format": stated}), "part")


def test_what_is_written_now_states_its_format(tmp_path):
    vlsm.save_checkpoint(vlsm.build_model("pixel"), tmp_path / "checkpoint")
    assert yaml.safe_load((tmp_path / "checkpoint" / "checkpoint.yaml").read_text())["format"] == FORMAT
