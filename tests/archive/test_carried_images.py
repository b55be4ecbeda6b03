"""Columns beside images inside Parquet files travel as those of a list; stray and damaged files cost nothing else."""

import datetime
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.archive.test_carried import carry, refusal, write, write_parquet
from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.images.formats import Look
from vlsm.limits import MAX_CARRIED_BYTES
from vlsm.runs.carried import RESERVED


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
