"""The reader of a reviewer's marks: what it takes, and what it refuses in one sentence."""

import csv
import json

import pytest

from vlsm.cells import CsvWriter
from vlsm.errors import ConfigError
from vlsm.runs import marks
from vlsm.runs.marks import MARKS_SCHEMA, digest_mask, read_marks, rejected_images

RUN = "0123456789abcdef0123456789abcdef"
ROW = {"run_id": RUN, "image_id": "a.png", "prompt": "polyp", "mark": "accept", "time": "2026-01-02T03:04:05.678Z"}
ROW |= {"mask_digest": "0123456789abcdef"}
NAMES = ("=1+1.png", "'-x.png", 'a "quoted", name.png', "line\nbreak.png", " blank.png", "息肉.png", "\x1c=x.png", "@x")


def write_csv(path, rows, columns=MARKS_SCHEMA.names):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        CsvWriter(file, columns).write_all(rows)
    return str(path)


def write_json(path, rows, **more):
    tree = {"kind": "vlsm.marks", "run_id": RUN}
    tree["marks"] = [{name: value for name, value in row.items() if name != "run_id"} for row in rows]
    path.write_text(json.dumps(tree | more))
    return str(path)


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_every_name_comes_back_as_it_was(tmp_path, write):
    rows = [ROW | {"image_id": name, "mark": ("accept", "redo", "reject")[n % 3]} for n, name in enumerate(NAMES)]
    table = read_marks(write(tmp_path / f"marks.{write.__name__[6:]}", rows))
    assert table.schema.equals(MARKS_SCHEMA)
    assert table["image_id"].to_pylist() == list(NAMES)
    assert [time.isoformat() for time in table["time"].to_pylist()] == ["2026-01-02T03:04:05.678000+00:00"] * 8
    assert rejected_images(table) == {NAMES[2], NAMES[5]}


def test_a_file_of_another_program_needs_no_time_and_no_digest(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text(f"mark,prompt,image_id,run_id\nredo,polyp,a.png,{RUN}\n\nreject,flat,a.png,{RUN}\n")
    table = read_marks(str(path))
    assert table["mark"].to_pylist() == ["redo", "reject"]
    assert table["time"].null_count == table["mask_digest"].null_count == 2
    assert rejected_images(table) == {"a.png"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mark": "maybe"}, "mark 2: mark is 'maybe'; it must be accept, redo or reject"),
        ({"image_id": ""}, "mark 2: image_id is ''; it must have 1 to 8,192 bytes"),
        ({"image_id": "x" * 9000}, "image_id is 'xxx"),
        ({"prompt": "x" * 9000}, "prompt is 'xxx"),
        ({"run_id": "a/b"}, "mark 2: run_id is 'a/b', which is no id of a run"),
        ({"run_id": "other"}, f"mark 2: run_id is 'other', but the first mark is of run '{RUN}'"),
        ({"time": "yesterday"}, "mark 2: time is 'yesterday'; it must be a time such as 2026-01-02T03:04:05Z"),
        ({"time": "0001-01-01T00:00:00+14:00"}, "mark 2: time is"),
        ({"mask_digest": "xyz"}, "mark 2: mask_digest is 'xyz'; it must have 16 hex digits"),
        ({"image_id": "a.png"}, "mark 2: 'a.png' with the prompt 'polyp' has a mark already"),
    ],
)
def test_a_wrong_value_is_named_with_its_row(tmp_path, change, reason):
    rows = [ROW, ROW | {"image_id": "b.png"} | change]
    with pytest.raises(ConfigError) as csv_error:
        read_marks(write_csv(tmp_path / "marks.csv", rows))
    assert reason in str(csv_error.value) and "\n" not in str(csv_error.value) and len(str(csv_error.value)) < 500
    if "run_id" not in change:
        with pytest.raises(ConfigError) as json_error:
            read_marks(write_json(tmp_path / "marks.json", rows))
        assert reason in str(json_error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has the columns none; it must have run_id, image_id, prompt, mark, time, mask_digest"),
        (b"image_id,mark\n", "has the columns image_id, mark"),
        (b"run_id,image_id,prompt,mark,mark\n", "has the columns"),
        (b"run_id,image_id,prompt,mark,comment\n", "has the columns"),
        (b"run_id,image_id,prompt,mark\n", "has no mark"),
        (b"run_id,image_id,prompt,mark\nr,a,b\n", "mark 1: 3 cells; the header has 4"),
        (b'run_id,image_id,prompt,mark\nr,"a,b,accept\n', "is no CSV file"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_what_is_no_csv_of_marks_is_one_sentence(tmp_path, content, reason):
    (tmp_path / "marks.csv").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_marks(str(tmp_path / "marks.csv"))
    assert reason in str(error.value) and "marks.csv" in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "is not JSON"),
        ("[]", 'must be {"kind": "vlsm.marks"'),
        ('{"kind": "vlsm.marks", "run_id": "r", "marks": {}}', "must be"),
        ('{"kind": "vlsm.marks", "run_id": "r", "marks": [7]}', "mark 1: run_id is None; it must be a text"),
        ('{"kind": "vlsm.marks", "run_id": "r", "marks": [{"image_id": 7}]}', "image_id is 7; it must be a text"),
        ('{"kind": "vlsm.marks", "run_id": "r", "marks": [{"x": 7}]}', "unknown member 'x'"),
        (
            '{"kind": "vlsm.marks", "run_id": "r", "marks": [{"image_id": "\\ud800", "prompt": "", "mark": "redo"}]}',
            "1:",
        ),
    ],
)
def test_what_is_no_json_of_marks_is_one_sentence(tmp_path, content, reason):
    (tmp_path / "marks.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_marks(str(tmp_path / "marks.json"))
    assert reason in str(error.value) and "marks.json" in str(error.value)


def test_files_of_other_kinds_and_too_large_ones_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"must be a .csv or .json file"):
        read_marks(str(tmp_path / "marks.xlsx"))
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        read_marks(str(tmp_path / "nowhere.csv"))
    path = write_csv(tmp_path / "marks.csv", [ROW, ROW | {"image_id": "b.png"}])
    monkeypatch.setattr(marks, "MAX_MARKS", 1)
    with pytest.raises(ConfigError, match="more than 1 marks"):
        read_marks(path)
    monkeypatch.setattr(marks, "MAX_MARKS_BYTES", 20)
    with pytest.raises(ConfigError, match="longer than 20 bytes"):
        read_marks(path)


def test_the_limit_of_cells_is_that_of_csv(tmp_path):
    path = write_csv(tmp_path / "marks.csv", [ROW | {"image_id": "x" * (csv.field_size_limit() + 1)}])
    with pytest.raises(ConfigError, match="marks.csv"):
        read_marks(path)


def test_a_digest_tells_masks_apart():
    assert digest_mask(None) == ""
    assert digest_mask("abc") != digest_mask("abd")
    assert len(digest_mask("abc")) == 16
