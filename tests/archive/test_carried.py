"""Columns of a list that travel: which, in which types, under which names, and what is refused."""

import datetime
import decimal
import json
import tracemalloc

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


def write_images(folder, name="i.parquet", struct=True, **columns):
    """Parquet with two images in it, as hubs of datasets write them, or with a column of bytes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": b"x", "path": f"{number}.png"} for number in range(2)] if struct else [b"x", b"y"]
    pq.write_table(pa.table({"image": images} | columns), path)
    return path


def test_columns_beside_images_in_parquet_travel(tmp_path):
    columns = {"patient_id": ["007", None], "age": pa.array([61, None], pa.int8()), "file_name": ["a.png", "b.png"]}
    columns |= {"prompt": ["polyp", "p"], "image_uri": ["s3://b/a", "s3://b/b"], "boxes": [[1], [2]]}
    path = write_images(tmp_path, struct=False, **columns)
    archive = open_archive(str(path), ("p",), look=Look(columns={"image": "image"}), carry=Carry("all", RESERVED))
    rows = list(archive.rows)
    assert not archive.is_listed  # its values are checked before the work
    assert [row["prompts"] for row in rows] == [["polyp"], ["p"]]
    assert [row["carried"] for row in rows] == [
        {"patient_id": "007", "age": 61, "file_name": "a.png", "list_image_uri": "s3://b/a"},
        {"patient_id": None, "age": None, "file_name": "b.png", "list_image_uri": "s3://b/b"},
    ]
    assert archive.carried.type.field("age").type == pa.int8()
    assert carry(path, ("age",), image="image") == ({"age": "int8"}, [{"age": 61}, {"age": None}])


def test_files_with_images_are_united_and_a_damaged_one_fails_alone(tmp_path):
    write_images(tmp_path, "site=A/a.parquet", age=pa.array([1, 2], pa.int8()))
    write_images(tmp_path, "site=B/b.parquet", age=pa.array([3.5, None]), sex=["f", "m"])
    (tmp_path / "site=C").mkdir()
    (tmp_path / "site=C" / "c.parquet").write_bytes(b"PAR1 damaged PAR1")
    types, values = carry(tmp_path)
    assert types == {"age": "double", "site": "string", "sex": "string"}
    assert [tuple(value.values()) for value in values] == [
        *((1.0, "A", None), (2.0, "A", None), (3.5, "B", "f"), (None, "B", "m"), (None, None, None))
    ]
    problems = [row["problem"] for row in open_archive(str(tmp_path), ("p",), carry=Carry("all", RESERVED)).rows]
    assert problems[:4] == [None] * 4 and problems[4].startswith("corrupt: ")


def test_images_in_parquet_without_other_columns_are_listed_while_the_run_works(tmp_path):
    path = write_images(tmp_path)
    assert open_archive(str(path), ("p",), carry=Carry("all", RESERVED)).is_listed
    assert carry(path) == carry(write_images(tmp_path, age=[1, 2]), ()) == ({}, [])


def test_values_beside_images_are_checked_as_those_of_lists(tmp_path):
    path = write_images(tmp_path, note=["x" * (MAX_CARRIED_BYTES + 1), ""], site=["A", "B"])
    assert "a text of 'note' has 8,193 bytes" in (message := refusal(path)) and "carry=[site]" in message
    assert carry(path, ("site",))[1] == [{"site": "A"}, {"site": "B"}]
    path = write_images(tmp_path, note=["x" * (1 << 17), ""], site=["A", "B"])
    assert "a text of 'note' has 131,072 bytes" in (message := refusal(path)) and message.endswith(
        "--set 'carry=[site]' chooses columns"
    )
    days = pa.array([1 << 30, None], pa.int32()).cast(pa.date32())
    assert "has a date that no calendar has; leave it out" in refusal(write_images(tmp_path, born=days))


def test_a_date_that_no_calendar_has_is_one_sentence(tmp_path):
    days = pa.array([1 << 30, None], pa.int32()).cast(pa.date32())
    assert "column 'born' has a date that no calendar has" in refusal(write_parquet(tmp_path, born=days))


def test_a_time_that_does_not_fit_is_refused_and_what_is_below_microseconds_is_cut(tmp_path):
    for kind, value in (("ms", (1 << 63) - 1), ("s", 1 << 50)):
        far = pa.array([value, 0], pa.int64()).cast(pa.timestamp(kind))
        assert "leave" in refusal(write_images(tmp_path, seen=far)) or "manifest" in refusal(tmp_path / "i.parquet")
        assert "cannot be read as a manifest" in refusal(write_parquet(tmp_path, seen=far))
    fine = pa.array([1_700_000_000_123_456_789, None], pa.int64()).cast(pa.timestamp("ns"))
    (value, _) = carry(write_images(tmp_path, seen=fine))[1]
    assert value["seen"] == datetime.datetime(2023, 11, 14, 22, 13, 20, 123456)


def test_other_files_beside_parquet_with_images_change_nothing(tmp_path):
    folder = tmp_path / "site=TOP" / "in"  # above INPUT: no column
    write_images(folder, "b.parquet", age=[1, 2])
    write_images(folder, "c.parquet", age=[3, 4], site=[5, 6])
    (folder / "a.parquet").write_bytes(b"PAR1 damaged PAR1")
    (folder / "d.parquet").symlink_to(tmp_path / "nowhere")
    for name in ("notes.csv", "README.md", "rows.jsonl"):
        (folder / name).write_text("a\n1\n")
    expected = {(None, None), (1, None), (2, None), (3, 5), (4, 6)}
    types, values = carry(folder)
    assert types == {"age": "int64", "site": "int64"} and {tuple(value.values()) for value in values} == expected
    assert carry(f"{folder}/*.parquet") == (types, values)
    rows = list(open_archive(str(folder), ("p",), carry=Carry((), RESERVED)).rows)
    assert [row["image_id"] for row in rows] == [
        *("a.parquet", "b.parquet#row=0", "b.parquet#row=1", "c.parquet#row=0", "c.parquet#row=1", "d.parquet")
    ]


@pytest.mark.parametrize("name", ["list[1]", "what?", "a*b"])
def test_a_name_with_the_characters_of_a_glob_is_a_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert carry(write(folder, f"{name}.csv", "image_uri,site\na.png,A\n"))[1] == [{"site": "A"}]
    assert carry(folder)[1] == [{"site": "A"}]
    (folder / f"{name}.csv").unlink()
    write_images(folder, f"site=B/{name}.parquet", age=[1, 2])
    expected = [{"age": 1, "site": "B"}, {"age": 2, "site": "B"}]
    assert carry(folder)[1] == expected
    assert carry(folder / "site=B" / f"{name}.parquet")[1] == [{"age": 1}, {"age": 2}]
    assert carry(f"{tmp_path}/*/site=*/*.parquet")[1] == expected


def test_images_are_never_taken_for_text(tmp_path):
    """A caption in one file has the name of the images in another."""
    jpegs = [b"\xff\xd8\xff", b"plain ASCII"]
    pq.write_table(pa.table({"image": jpegs, "jpg": ["a cat", "a dog"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": jpegs}), tmp_path / "b.parquet")
    types, values = carry(tmp_path)
    assert types == {"jpg": "string"} and [value["jpg"] for value in values] == ["a cat", "a dog", None, None]
    write_images(tmp_path / "in", "image=1/c.parquet", age=[1, 2])
    assert carry(tmp_path / "in")[1] == [{"age": 1, "image": "1"}, {"age": 2, "image": "1"}]


def test_a_damaged_further_column_costs_no_image(tmp_path, caplog):
    path = tmp_path / "i.parquet"
    pq.write_table(pa.table({"image": [b"a", b"b"], "note": ["x" * 5000, "y"]}), path, use_dictionary=False)
    place = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes(40) + data[place + 40 :])
    types, values = carry(path)
    assert types == {"note": "string"} and values == [{"note": None}] * 2
    assert "further columns cannot be read, so its images have none" in caplog.text


def test_a_text_that_stands_in_many_rows_takes_little_memory(tmp_path):
    """28 kB of a file would be gigabytes of texts."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), ["x" * 60_000])
    texts = {f"t{number}": text for number in range(20)}
    pq.write_table(pa.table({"image": [b"x"] * 4096, **texts}), path := tmp_path / "bomb.parquet")
    tracemalloc.start()
    assert "has 60,000 bytes" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_messages_stay_short_whatever_columns_are_called(tmp_path):
    names = ",".join(f"{'x' * 10_000}{number}" for number in range(200))
    assert len(refusal(write(tmp_path, "l.csv", f"image_uri,{names}\na.png\n"), ("site",))) < 2500
    assert carry(tmp_path / "l.csv") == ({}, [])
