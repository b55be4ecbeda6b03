"""Tables for people: no cell is a formula, a link or HTML, and what was written can be read back."""

import csv
import io

import pytest

from vlsm.cells import CsvWriter, markdown_cell, read_cell, write_cell

FORMULAS = [
    "=1+1",
    "+1",
    "-1+cmd|' /C calc'!A0",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "\ufeff=1",
    "\u200b@x",
    "＝1",
    "＋1",
    "－1",
    "＠x",
    "﹣1",
    "\u22121",
    "'=1",
    "''=1",
    "-0.5",
    '=HYPERLINK("http://x")',
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_is_a_formula_and_each_reads_back(text):
    assert write_cell(text) == "'" + text
    assert read_cell(write_cell(text)) == text


@pytest.mark.parametrize(
    "text", ["", "polyp", "a=b", "'quoted'", "don't", "'", "日本", "1-2", "s3://a/b", "/a", "#1", " a"]
)
def test_other_texts_stay(text):
    assert write_cell(text) == read_cell(text) == text


def test_numbers_stay_numbers():
    assert [write_cell(value) for value in (-0.5, -3, None, True)] == [-0.5, -3, None, True]


def test_a_table_reads_back_as_it_was():
    file = io.StringIO()
    writer = CsvWriter(file, ["name", "dice"])
    rows = [{"name": text, "dice": -0.5} for text in FORMULAS]
    writer.write_all(rows)
    read = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert [read_cell(row["name"]) for row in read] == FORMULAS
    assert {row["dice"] for row in read} == {"-0.5"}
    assert not any(
        cell[:1] in "=+@\t\r" for row in csv.reader(io.StringIO(file.getvalue(), newline="")) for cell in row if cell
    )


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://host/x.png)",
    "a | b",
    "a\nb\r\n# c",
    "https://evil.example/x",
    "www.evil.example",
    "mailto:a@evil.example",
    "<https://evil.example>",
    "`code` *bold* _it_ ~~x~~",
    "back\\|slash",
    "&lt;b&gt;",
    "\x1b[31m\u202e",
    "a | b <script>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_and_nothing_else(text):
    cell = markdown_cell(text)
    for mark in "<>\n\r\x1b\u202e":
        assert mark not in cell
    plain = cell.replace("\\\\", "")
    for mark in "|[]`*!":
        assert plain.count(mark) == plain.count(f"\\{mark}")
    assert "://" not in cell and "www." not in cell and "mailto:" not in cell and "@" not in cell


@pytest.mark.parametrize("text", ["vlsm_b", "large, p1", "flat polyp", "日本 é", "0.5 (3)", "a-b+c"])
def test_ordinary_names_stay(text):
    assert markdown_cell(text) == text
