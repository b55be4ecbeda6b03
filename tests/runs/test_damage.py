"""An OUTPUT that somebody has damaged or made: one sentence in each command that reads it, and little memory."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import vlsm
from jobs import status, verify
from vlsm import storage
from vlsm.errors import ConfigError, DamageError, ResultError, VlsmError
from vlsm.evaluation.planning import _remove_evaluation
from vlsm.export.__main__ import main as export
from vlsm.report.__main__ import main as report
from vlsm.report.rerun import rerun_command, shell_command
from vlsm.runs.compare import compare_run
from vlsm.runs.lease import Lease, read_holder
from vlsm.runs.links import check_links
from vlsm.runs.plan import Plan, plan_of, read_plan, write_plan
from vlsm.runs.record import read_record
from vlsm.runs.results import part_name, read_part, write_part
from vlsm.runs.schema import PLAN_SCHEMA, RESULT_SCHEMA, with_format
from vlsm.runs.tables import Tables, open_table
from vlsm.segmentation.masks import decode_png, encode_mask, encode_png

LARGEST = 2**31 - 1
ROW = {"image_uri": "/a.png", "prompt": "polyp", "kind": "mask", "model": "m", "status": "ok"}


@pytest.fixture
def output(tmp_path):
    """A finished run of four images in two parts."""
    folder = tmp_path / "output"
    images = [{"image_id": f"{n}.png", "image_uri": "/a.png", "prompts": ["polyp"]} for n in range(4)]
    plan = write_plan(str(folder), images, 2)
    config = {"input": "/scans", "output": str(folder), "members": [{"checkpoint": "/checkpoint"}]}
    record = {"config": config | {"prompts": ["polyp"]}, "plan": dataclasses.asdict(plan), "run_id": "r"}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    mask = np.zeros((3, 4), np.uint8)
    mask[1, 1:3] = 1
    good = ROW | {"height": 3, "width": 4, "mask_rle": encode_mask(mask), "area_px": 2, "bbox": [1, 1, 2, 1]}
    for shard in range(2):
        rows = [good | {"image_id": f"{2 * shard + n}.png", "confidence": 0.5} for n in range(2)]
        write_part(str(folder), shard, rows, "r", 0)
    return folder


def first_part(output):
    return output / "masks" / part_name(0)


def change_cells(output, **values):
    table = pq.ParquetFile(first_part(output)).read()
    rows = [row | values for row in table.to_pylist()]
    schema = pa.schema([field.with_nullable(True) for field in table.schema], metadata=table.schema.metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), first_part(output))


def change_record(output, **changes):
    record = yaml.safe_load((output / "config.yaml").read_text())
    (output / "config.yaml").write_text(yaml.safe_dump(record | changes))


def read_all(output, tmp_path, capsys):
    """What every command says that reads an OUTPUT; none of them may raise an error of another's."""
    texts = []
    for command in (
        lambda: status.main([str(output)]),
        lambda: verify.main([str(output)]),
        lambda: report([str(output), str(tmp_path / "report.html")]),
        *(
            lambda name=name: export([str(output), str(tmp_path / name), "--format", name])
            for name in ("masks", "probability", "coco", "labels")
        ),
        lambda: [*vlsm.read_masks(str(output))] and 0,
    ):
        try:
            assert command() in (0, 1, 2)
        except VlsmError as error:
            print(error, file=sys.stderr)
        texts.append("".join(capsys.readouterr()))
    return texts


def test_the_run_itself_is_read_by_all(output, tmp_path, capsys):
    texts = read_all(output, tmp_path, capsys)
    assert (
        "done: 4 images (100.0 %), 2 parts, 4 rows" in texts[0]
        and "the run is not finished: 4 of 4 images have" in texts[1]
    )
    assert len([*vlsm.read_masks(str(output))]) == 4 and not any("damaged" in text for text in texts)


@pytest.mark.parametrize(
    "cells",
    [
        {"height": LARGEST, "width": LARGEST},
        {"height": -3, "width": -4},
        {"height": 0, "width": 0},
        {"height": None, "width": None},
        {"height": 1 << 16, "width": 1 << 16, "mask_rle": "PPPP4"},
        {"mask_rle": "1" * 3_000_000},
        {"mask_rle": "\u00e9"},
    ],
    ids=str,
)
def test_a_mask_of_no_size_or_with_other_runs_is_told_and_the_others_are_exported(output, tmp_path, capsys, cells):
    change_cells(output, **cells)
    texts = read_all(output, tmp_path, capsys)
    assert "'0.png', 'polyp': the row cannot be read: ValueError: " in texts[1]
    assert "2 rows could not be exported" in texts[3] or "2 files below" in texts[3]
    assert "a mask of '0.png' in " in texts[-1] and "is damaged" in texts[-1]
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.png")) == ["2.png.polyp.png", "3.png.polyp.png"]


def test_a_map_has_no_more_pixels_than_its_row_states():
    png = encode_png(np.zeros((3, 4), np.uint8))
    assert decode_png(png, (3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="the PNG has 3 x 4 pixels, which are more than its row states"):
        decode_png(png, (2, 4))
    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]  # its header claims 3.6 GB
    with pytest.raises((ValueError, SyntaxError)):
        decode_png(huge, (LARGEST, LARGEST))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"PAR1", None, "folder", "pipe", "sparse"],
    ids=["empty", "zeros", "magic", "half", *"fps"],
)
def test_a_part_that_is_no_parquet_file_is_named(output, tmp_path, capsys, content):
    path = first_part(output)
    intact = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)  # which nobody writes to
    elif content == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(intact[: len(intact) // 2] if content is None else content)
    assert read_part(str(output), 0, "r") is None
    texts = read_all(output, tmp_path, capsys)
    assert f"{part_name(0)} is missing, damaged or of another run: no rows of 2 images" in texts[1]
    if content not in ("folder", "pipe"):  # which are no files, so that exports pass them over
        assert all(f"{part_name(0)} is damaged: " in text for text in texts[2:])
    plan = plan_of(read_record(str(output)), str(output))
    assert compare_run(str(output), plan, "r").pending[0] == (content not in ("folder", "pipe"))  # written again


@pytest.mark.parametrize("column", ["image_id", "prompt", "height", "mask_rle", "confidence", "bbox", "status"])
@pytest.mark.parametrize("values", ["absent", "null", "struct", "list"])
def test_columns_of_another_kind_are_told(output, tmp_path, capsys, column, values):
    table = pq.ParquetFile(first_part(output)).read()
    position = table.schema.get_field_index(column)
    kinds = {"null": pa.nulls(2, pa.string()), "struct": pa.array([{"a": 1}] * 2), "list": pa.array([["x"]] * 2)}
    changed = table.drop_columns([column]) if values == "absent" else table.set_column(position, column, kinds[values])
    pq.write_table(changed, first_part(output))
    texts = read_all(output, tmp_path, capsys)
    is_fatal = values in ("struct", "list") or not RESULT_SCHEMA.field(column).nullable
    assert not is_fatal or f"{part_name(0)} is damaged: " in texts[-1]


def test_millions_of_rows_and_repeated_large_masks_take_little_memory(output):
    """A file of some kilobytes: one mask of 8 MB, which a dictionary repeats."""
    (row,) = pq.ParquetFile(first_part(output)).read().slice(0, 1).to_pylist()
    number, mask = 20_000, "1" * 8_000_000
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), pa.array([mask]))
        if field.name == "mask_rle"
        else pa.array([row.get(field.name)], field.type).take(pa.array(np.zeros(number, np.int64)))
        for field in RESULT_SCHEMA
    ]
    table = pa.table(columns, names=RESULT_SCHEMA.names)
    schema = table.schema.with_metadata(with_format(RESULT_SCHEMA, **{"vlsm.run": "r"}).metadata)
    pq.write_table(table.cast(schema), first_part(output), compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert first_part(output).stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    file = open_table(str(first_part(output)), RESULT_SCHEMA)
    piece = next(file.pieces())
    assert 1 <= len(piece) <= 4 and pa.total_allocated_bytes() - before < 200_000_000
    with pytest.raises(DamageError, match="bytes unpack to over"):
        file.read()
    plan = plan_of(read_record(str(output)), str(output))
    assert compare_run(str(output), plan, "r").pending == {0: True}


def test_an_old_listing_hides_no_part(output, monkeypatch):
    plan = plan_of(read_record(str(output)), str(output))
    assert compare_run(str(output), plan, "r").pending == {}
    monkeypatch.setattr(storage, "list_names", lambda folder: [])
    assert compare_run(str(output), plan, "r").pending == dict.fromkeys(range(plan.num_shards), False)
    assert compare_run(str(output), plan, "r", are_written=True).pending == {}
    first_part(output).unlink()
    assert compare_run(str(output), plan, "r", are_written=True).pending == {0: False}


def test_an_honest_part_with_large_masks_is_read_whole(output):
    generator = np.random.default_rng(0)
    rows = [ROW | {"image_id": str(n), "probability_map": generator.bytes(3_000_000)} for n in range(30)]
    write_part(str(output), 0, rows, "r", 0)
    assert read_part(str(output), 0, "r").num_rows == 30
    tables = Tables([str(first_part(output)), str(output / "masks" / part_name(1))], RESULT_SCHEMA)
    assert [len(table) for _, table in tables.pieces(["image_id"])] == [1] * 30 + [2]


@pytest.mark.parametrize(
    "plan",
    [
        {"num_shards": 10**9},
        {"num_shards": 10**9, "num_images": 10**9},
        {"num_shards": -1},
        {"num_shards": float("nan")},
        {"num_images": "4"},
        {"num_rows": 1 << 60},
        {"id": "../../x"},
        {"id": "/etc/passwd"},
        {"id": None},
        {"kinds": "mask"},
        {"kinds": [5]},
        {"is_complete": "no"},
    ],
    ids=str,
)
def test_a_wrong_plan_is_one_sentence(output, tmp_path, capsys, plan):
    change_record(output, plan=read_record(str(output))["plan"] | plan)
    texts = read_all(output, tmp_path, capsys)
    for text in texts[:2]:
        assert text.count("error: ") == 1 and ("damaged" in text or "missing" in text) and len(text) < 1000


@pytest.mark.parametrize("key", ["config", "plan", "run_id"])
@pytest.mark.parametrize("value", [None, 5, []])
def test_a_record_of_other_types_is_one_sentence(output, tmp_path, capsys, key, value):
    change_record(output, **{key: value})
    assert all("error: " in text for text in read_all(output, tmp_path, capsys)[:2])


@pytest.mark.parametrize("change", ["short", "long", "null", "year", "gone", "cut"])
def test_plan_files_are_checked(output, change):
    (path,) = (output / "manifest").iterdir()
    table = pq.ParquetFile(path).read()
    if change == "year":
        times = pa.array([2**62] * 4, pa.timestamp("us", tz="UTC"))
        table = table.set_column(table.schema.get_field_index("mtime"), "mtime", times)
    if change == "null":
        prompts = pa.array([[None]] * 4, pa.list_(pa.string()))
        table = table.set_column(table.schema.get_field_index("prompts"), "prompts", prompts)
    sizes = {"short": 4, "long": 1}
    pq.write_table(
        table.replace_schema_metadata(with_format(PLAN_SCHEMA).metadata), path, row_group_size=sizes.get(change, 2)
    )
    if change == "gone":
        path.unlink()
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    plan = plan_of(read_record(str(output)), str(output))
    with pytest.raises(DamageError, match=f"{path.name} is (damaged|missing)"):
        list(read_plan(str(output), plan))


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ('{"ok": 500, "failed": 0, "vanished": 0, "rows": 4, "failed_by_reason": {}}', "claims 500 images and 4 rows"),
        ('{"ok": 4, "failed": 0, "vanished": 0, "rows": 1e300, "failed_by_reason": {}}', "its numbers are no counts"),
        ('{"ok": -4, "failed": 0, "vanished": 0, "rows": 4, "failed_by_reason": {}}', "its numbers are no counts"),
        ('{"ok": 4}', "its numbers are no counts"),
        ("[1, 2]", "is damaged"),
    ],
)
def test_a_summary_that_claims_more_than_the_plan_is_told(output, tmp_path, capsys, summary, message):
    (output / "summary.json").write_text(summary)
    assert all(message in text for text in read_all(output, tmp_path, capsys)[:3])


def test_a_claim_with_control_characters_or_other_types_is_a_job_that_is_unknown(tmp_path):
    (tmp_path / "lease").mkdir()
    claim = '{"job": "\\u001b[2Jx", "host": ["h"], "pid": {"a": 1}, "since": 9, "machine": "m"}'
    (tmp_path / "lease" / "00000001.json").write_text(claim)
    (tmp_path / "lease" / "00000001.beat").write_text('{"progress": "\\u001b[2J"}')
    holder = read_holder(str(tmp_path), 0.0)
    assert (holder.job, holder.host, holder.pid, holder.since, holder.progress) == ("", "", 0, "9", None)


@pytest.mark.parametrize("name", ["masks", "manifest", "lease", "inputs", "runs/a", "tensorboard"])
def test_a_link_that_leads_out_of_output_is_refused_before_anything_is_written(tmp_path, name):
    victim, output = tmp_path / "victim", tmp_path / "output"
    victim.mkdir()
    (victim / "part-keep").write_text("keep")
    link = output / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(ConfigError, match=f"{name}' is a link to '{victim}', outside of OUTPUT"):
        Lease(str(output), "jobs.train").take()
    assert [path.name for path in victim.iterdir()] == ["part-keep"]
    assert [path for path in output.rglob("*") if path.is_file()] == []


def test_output_itself_and_links_within_it_may_be_links(tmp_path):
    real = tmp_path / "large disk"
    (real / "runs").mkdir(parents=True)
    (real / "other").symlink_to("runs")
    (tmp_path / "output").symlink_to(real)
    check_links(str(tmp_path / "output"))
    check_links(str(tmp_path / "nowhere"))
    with Lease(str(tmp_path / "output"), "jobs.train") as lease:
        lease.take()


@pytest.mark.parametrize("runs", [{"a": "../../victim"}, {"a": "/victim"}, {"a": "runs/../../victim"}, {"a": 5}, ["x"]])
def test_starting_over_deletes_no_run_that_a_record_names_elsewhere(tmp_path, runs):
    victim = tmp_path / "victim" / "config.yaml"
    victim.parent.mkdir()
    victim.write_text("keep")
    with pytest.raises(ResultError, match="are not all below runs/"):
        _remove_evaluation(str(tmp_path / "a" / "output"), {"plan": {"runs": runs}})
    assert victim.read_text() == "keep"


@pytest.mark.parametrize(
    "word", ["two words", "it's", '"$(touch owned)"', "`touch owned`", "a\nb", "; touch owned", "&&"]
)
def test_suggested_commands_survive_the_shell(tmp_path, word):
    command = shell_command("jobs.verify", f"/out/{word}").replace("python -m", "printf '%s\\0'", 1)
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.split("\0") == ["jobs.verify", f"/out/{word}", ""] and not list(tmp_path.iterdir())
    config = {"input": f"s3://b/{word}", "members": [{"checkpoint": word}], "prompts": [word]}
    words = shlex.split(rerun_command(f"/out/{word}", {"config": config}))
    assert words[3:5] == [f"s3://b/{word}", f"/out/{word}"]


def test_a_record_cannot_make_the_suggested_command_delete_or_go_elsewhere():
    config = {"input": "--config=evil.yaml", "output": "/home", "members": [], "prompts": ["a"], "start_over": True}
    words = shlex.split(rerun_command("/out", {"config": config}))
    assert words[2:] == ["jobs.segment", str(Path("--config=evil.yaml").absolute()), "/out", '--set=prompts=["a"]']
    for damaged in ({}, {"input": 5}, {"input": "/a", "members": 5}, {"datasets": [1]}):
        with pytest.raises(ResultError, match="it has no settings of a run"):
            rerun_command("/out", {"config": damaged})


def test_an_incomplete_plan_has_no_numbers_yet():
    record = {"plan": dataclasses.asdict(Plan("0123456789ab", is_complete=False)), "run_id": "r"}
    assert plan_of(record, "/out").num_shards == 0
