"""Columns of a list that travel: which, in which types, under which names, and what is refused."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.errors import ConfigError, ManifestError
from vlsm.images.formats import Look
from vlsm.limits import MAX_CARRIED_BYTES, MAX_CARRIED_COLUMNS
from vlsm.runs.carried import RESERVED


def carry(path, columns="all", **names):
    """The types of the columns that travel, and the values of each image."""
    archive = open_archive(str(path), ("p",), look=Look(columns=names), carry=Carry(columns, RESERVED))
    rows = list(archive.rows)
    if archive.carried is None:
        assert all("carried" not in row for row in rows)
        return {}, []
    return {field.name: str(field.type) for field in archive.carried.type}, [row["carried"] for row in rows]


def refusal(path, columns="all", error=ManifestError):
    with pytest.raises(error) as caught:
        carry(path, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_parquet(folder, name="l.parquet", **columns):
    pq.write_table(pa.table({"image_uri": ["a.png", "b.png"]} | columns), folder / name)
    return folder / name


def test_cells_of_a_csv_are_texts_and_leading_zeros_stay(tmp_path):
    path = write(tmp_path, "l.csv", "path,patient_id,site,age\na.png,007,A,61\nb.png,7,,\nc.png,nan,B b,7.0\n")
    types, values = carry(path, image_uri="path")
    assert types == {"patient_id": "string", "site": "string", "age": "string"}
    assert values == [
        {"patient_id": "007", "site": "A", "age": "61"},
        {"patient_id": "7", "site": None, "age": None},
        {"patient_id": None, "site": "B b", "age": "7.0"},
    ]


def test_columns_of_parquet_keep_their_types_and_nulls(tmp_path):
    day, moment = datetime.date(2020, 2, 29), datetime.datetime(2020, 1, 2, 3, 4, 5, 678901, datetime.UTC)
    columns = {
        "patient_id": pa.array(["007", None]),
        "age": pa.array([61, None], pa.int16()),
        "dose": pa.array([0.5, float("nan")]),
        "price": pa.array([decimal.Decimal("1.20"), None]),
        "smoker": pa.array([True, None]),
        "born": pa.array([day, None]),
        "seen": pa.array([moment, None], pa.timestamp("ns", "UTC")),
        "site": pa.array(["A", None]).dictionary_encode(),
        "a.b": pa.array(["x", None], pa.large_string()),
        "nothing": pa.nulls(2),
    }
    types, (first, second) = carry(write_parquet(tmp_path, **columns))
    assert list(types.values()) == [
        *("string", "int16", "double", "decimal128(3, 2)", "bool", "date32[day]", "timestamp[us, tz=UTC]"),
        *("string", "string", "string"),
    ]
    assert first == {
        **{"patient_id": "007", "age": 61, "dose": 0.5, "price": decimal.Decimal("1.20"), "smoker": True},
        **{"born": day, "seen": moment, "site": "A", "a.b": "x", "nothing": None},
    }
    assert second == dict.fromkeys(columns)  # NaN means no value, as in all cells of lists


def test_values_of_json_are_typed_if_all_are_of_one_kind(tmp_path):
    records = [
        {"image_uri": "a.png", "age": 61, "dose": 1, "ok": True, "site": "A", "mixed": 7, "large": 1 << 70},
        {"image_uri": "b.png", "age": None, "dose": 0.5, "ok": False, "mixed": "007", "large": 1, "boxes": [1]},
    ]
    types, values = carry(write(tmp_path, "l.jsonl", "\n".join(map(json.dumps, records))))
    assert types == {"age": "int64", "dose": "double", "ok": "bool", "site": "string", "mixed": "string"} | {
        "large": "string"
    }
    assert values == [
        {"age": 61, "dose": 1.0, "ok": True, "site": "A", "mixed": "7", "large": str(1 << 70)},
        {"age": None, "dose": 0.5, "ok": False, "site": None, "mixed": "007", "large": "1"},
    ]


def test_a_name_of_ours_in_any_case_gets_a_prefix_and_others_stay(tmp_path):
    path = write(tmp_path, "l.csv", "image_uri,status,Status,list_status,mask,split,Patient ID\na.png,1,2,3,4,5,6\n")
    types, values = carry(path)
    assert values == [
        {"list_status": "1", "list_list_Status": "2", "list_list_list_status": "3", "list_mask": "4"}
        | {"split": "5", "Patient ID": "6"}
    ]
    assert list(types) == list(values[0])


def test_chosen_columns_travel_in_the_given_order_and_names_are_compared_as_those_of_lists(tmp_path):
    path = write(tmp_path, "l.csv", "image_uri,site,Patient ID,view\na.png,A,007,left\n")
    assert carry(path, ("patient_id", "site"))[1] == [{"Patient ID": "007", "site": "A"}]
    assert carry(path, ()) == ({}, [])
    assert "carry names 'sex'; the further columns of" in (message := refusal(path, ("sex",)))
    assert message.endswith("are: site, Patient ID, view")


def test_columns_that_the_run_reads_do_not_travel(tmp_path):
    path = write(tmp_path, "l.csv", "image_uri,image_id,prompt,etag,group\na.png,1,polyp,x,g\n")
    assert carry(path)[1] == [{"group": "g"}]


def test_lists_structs_and_bytes_do_not_travel_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    columns = {"site": ["A", "B"], "boxes": [[1], [2]], "raw": [b"x", b"y"], "more": [{"a": 1}, {"a": 2}]}
    path = write_parquet(tmp_path, **columns)
    assert carry(path)[1] == [{"site": "A"}, {"site": "B"}]
    assert "columns that cannot travel into the results: boxes, raw, more" in caplog.text
    assert "carry names 'boxes', a column of" in refusal(path, ("boxes",))


def test_a_name_that_stands_twice_does_not_travel(tmp_path):
    path = write(tmp_path, "l.csv", "image_uri,site,site,view\na.png,A,B,left\n")
    assert carry(path)[1] == [{"view": "left"}]
    assert "no other column may have its name" in refusal(path, ("site",))


def test_limits_end_the_command_with_the_setting_that_helps(tmp_path):
    many = ",".join(f"c{number}" for number in range(MAX_CARRIED_COLUMNS + 1))
    path = write(tmp_path, "many.csv", f"image_uri,{many}\na.png\n")
    assert f"{MAX_CARRIED_COLUMNS + 1} further columns; {MAX_CARRIED_COLUMNS} are the most" in refusal(path)
    assert "--set 'carry=[c0, c1]'" in refusal(path)
    assert carry(path, ("c7",))[1] == [{"c7": None}]
    path = write(tmp_path, "long.csv", f"image_uri,site,text\na.png,A,{'x' * (MAX_CARRIED_BYTES - 1)}\n")
    assert len(carry(path)[1][0]["text"]) == MAX_CARRIED_BYTES - 1
    path = write(tmp_path, "long.csv", f"image_uri,site,text\na.png,A,{'x' * MAX_CARRIED_BYTES}\n")
    assert "row 1: the texts of its further columns have 8,193 bytes, most of them in 'text'" in refusal(path)
    assert carry(path, ("site",))[1] == [{"site": "A"}]


@pytest.mark.parametrize("cell", [b"Z\xfcrich", b"\xed\xa0\x80"])
def test_text_that_is_not_unicode_is_named_with_its_row_and_column(tmp_path, cell):
    (tmp_path / "l.csv").write_bytes(b"image_uri,site\na.png," + cell + b"\n")
    assert "row 1: column site: " in (message := refusal(tmp_path / "l.csv"))
    assert "is no Unicode text; write the list as UTF-8, or leave the column out with carry" in message
    assert carry(tmp_path / "l.csv", ()) == ({}, [])


def test_passwords_and_signatures_do_not_travel_and_other_texts_stay(tmp_path):
    path = write(tmp_path, "l.csv", "image_uri,source,sum\na.png,https://me:secret@h/a.png?sig=secret,=1+1\n")
    assert carry(path)[1] == [{"source": "https://h/a.png", "sum": "=1+1"}]


def test_files_of_a_list_are_united_by_their_types_and_folders_are_columns(tmp_path):
    for number, ages in enumerate((pa.nulls(2), pa.array([1, 2], pa.int16()), pa.array([3, 4], pa.int64()))):
        folder = tmp_path / f"site={'AB'[number % 2]}"
        folder.mkdir(exist_ok=True)
        write_parquet(
            folder, f"{number}.parquet", **({"age": ages} if number < 2 else {"age": ages, "sex": ["f", "m"]})
        )
    types, values = carry(tmp_path)
    assert types == {"age": "int64", "sex": "string", "site": "string"}
    expected = [(None, None, "A")] * 2 + [(3, "f", "A"), (4, "m", "A"), (1, None, "B"), (2, None, "B")]
    assert values == [dict(zip(("age", "sex", "site"), each, strict=True)) for each in expected]
    write_parquet(tmp_path / "site=B", "3.parquet", age=["old", "young"])
    assert "column 'age' has the type string, and int64 in the files before" in refusal(tmp_path)
    assert carry(tmp_path, ("site",))[0] == {"site": "string"}


def test_rows_of_a_run_as_a_list_give_only_what_is_not_ours(tmp_path):
    ours = {name: ["x", "y"] for name in ("image_id", "prompt", "kind", "mask_rle", "status")}
    assert carry(write_parquet(tmp_path, **ours, site=["A", "B"]))[1] == [{"site": "A"}, {"site": "B"}]
    index = "file,image_id,image_uri,selector,prompt,kind,error,note\nf.png,a,a.png,,p,mask,,'=1+1\n"
    assert carry(write(tmp_path, "index.csv", index))[1] == [{"note": "=1+1"}]


def test_carry_names_columns_of_lists_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    assert carry(tmp_path) == ({}, [])
    message = refusal(tmp_path, ("site",), ConfigError)
    assert message.startswith("carry is [site]: columns of a list, or of Parquet files with images")


def test_a_date_that_no_calendar_has_is_one_sentence(tmp_path):
    days = pa.array([1 << 30, None], pa.int32()).cast(pa.date32())
    assert "column 'born' has a date that no calendar has" in refusal(write_parquet(tmp_path, born=days))


def test_messages_stay_short_whatever_columns_are_called(tmp_path):
    names = ",".join(f"{'x' * 10_000}{number}" for number in range(200))
    assert len(refusal(write(tmp_path, "l.csv", f"image_uri,{names}\na.png\n"), ("site",))) < 2500
    assert carry(tmp_path / "l.csv") == ({}, [])
