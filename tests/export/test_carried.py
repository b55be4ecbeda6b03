"""Columns of a list in exports and their filters, and in the report: as text, whatever they hold."""

import csv
import datetime
import decimal
import html
import json
import re

import pyarrow as pa
import pytest
import yaml

from tests.export.test_coco import make_row
from vlsm.archive.archive import open_archive
from vlsm.errors import ConfigError
from vlsm.export.__main__ import main, parse_filter
from vlsm.report.write import write_report
from vlsm.runs.carried import result_schema
from vlsm.runs.results import write_part

TYPES = pa.struct(
    [
        *(("patient id", pa.string()), ("age", pa.int16()), ("born", pa.date32()), ("dose", pa.float32())),
        *(("smoker", pa.bool_()), ("price", pa.decimal128(5, 2)), ("list_status", pa.string())),
    ]
)
HOSTILE = '=HYPERLINK("http://x")<script>\u202e'
FIRST = {"patient id": "007", "age": 61, "born": datetime.date(1960, 5, 6), "dose": 0.5, "smoker": True}
FIRST |= {"price": decimal.Decimal("1.20"), "list_status": HOSTILE}
SECOND = dict.fromkeys(FIRST) | {"patient id": "7", "dose": float("inf")}


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    rows = [make_row(tmp_path / "a.png") | FIRST, make_row(tmp_path / "b.png") | SECOND]
    rows.append(make_row(tmp_path / "c.png") | SECOND | {"mask_rle": "damaged"})
    write_part(str(folder), 0, rows, "run", 0, TYPES)
    record = {"config": {"input": str(tmp_path), "prompts": ["polyp"], "members": [{"checkpoint": "/c"}]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(record | {"plan": {}}), encoding="utf-8")
    return folder


def test_coco_has_them_as_attributes_of_images_and_annotations(output, tmp_path):
    assert main([str(output), str(tmp_path / "x"), "--format", "coco"]) == 1  # one mask is damaged
    dataset = json.loads((tmp_path / "x" / "coco.json").read_text(encoding="utf-8"))
    first = FIRST | {"born": "1960-05-06", "price": "1.20"}
    assert [image["attributes"] for image in dataset["images"]] == [first, SECOND | {"dose": None}]
    assert [each["attributes"] for each in dataset["annotations"]] == [first, SECOND | {"dose": None}]


def test_the_index_has_them_behind_its_columns_and_no_cell_is_a_formula(output, tmp_path):
    assert main([str(output), str(tmp_path / "x"), "--format", "masks"]) == 1
    with (tmp_path / "x" / "index.csv").open(encoding="utf-8", newline="") as file:
        first, second, failed = csv.DictReader(file)
    assert list(first)[7:] == list(FIRST)
    assert (first["patient id"], first["born"], first["list_status"]) == ("007", "1960-05-06", f"'{HOSTILE}")
    assert (second["age"], second["error"], failed["patient id"]) == ("", "", "7") and failed["error"]
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    from vlsm.archive.carried import Carry

    # the index is a list too: its cells are read as they were
    (row, *_) = open_archive(str(tmp_path / "x" / "index.csv"), ("p",), carry=Carry("all")).rows
    assert row["carried"]["list_status"] == HOSTILE and row["carried"]["age"] == "61"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("patient id == 007", "007"),
        ("age >= 61", 61),
        ("born < 1970-01-01", datetime.date(1970, 1, 1)),
        ("smoker = true", True),
        ("price == 1.20", decimal.Decimal("1.20")),
        ("list_status != null", None),
    ],
)
def test_filters_take_values_of_every_type(output, tmp_path, words, value):
    assert parse_filter(words, result_schema(TYPES))[2] == value
    assert main([str(output), str(tmp_path / "x"), "--format", "masks", "--filter", words]) == 0
    assert [path.name.partition("#")[0] for path in (tmp_path / "x").rglob("*.png")] == ["a.png"]


@pytest.mark.parametrize(("words", "type_"), [("born < old", "date32"), ("smoker = x", "bool"), ("price = x", "deci")])
def test_a_value_that_does_not_fit_its_column_is_said(words, type_):
    with pytest.raises(ConfigError, match=f"does not fit the column .*it must be a value of the type {type_}"):
        parse_filter(words, result_schema(TYPES))


def test_the_report_filters_by_them_and_shows_their_values_as_text(output, tmp_path):
    page = open(write_report(str(output), tmp_path / "report.html"), encoding="utf-8").read()
    cards = [json.loads(html.unescape(words)) for words in re.findall(r'data-words="([^"]*)"', page)]
    found = {card["list patient id"] for card in cards}
    assert found == {"007", "7"} and any(card.get("list age") == "61" for card in cards)
    assert 'data-word="list patient id"' in page and ">patient id <select" in page
    assert "<script>\u202e" not in page and "\u202e" not in page
    assert any(card.get("list list_status", "").endswith("<script>\\u202e") for card in cards)
