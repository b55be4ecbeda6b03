"""Columns of a list in the plan and the parts of a run: proven, updated without segmenting, no columns of ours."""

import dataclasses
import datetime
import json

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from vlsm.archive.archive import open_archive
from vlsm.archive.carried import Carry
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError, DamageError, ManifestError
from vlsm.report.survey import carried_values, scan
from vlsm.runs.carried import RESERVED, carried_of_plan, result_schema
from vlsm.runs.compare import compare_run
from vlsm.runs.lifecycle import prepare_run
from vlsm.runs.plan import Plan, read_plan, write_plan
from vlsm.runs.record import read_record
from vlsm.runs.results import open_results, part_name, read_masks, read_part, write_part
from vlsm.runs.schema import RESULT_SCHEMA, with_format
from vlsm.runs.updates import update_plan
from vlsm.runs.verify import verify_run

BORN = datetime.date(1960, 5, 6)


def listed(path, carry="all"):
    return open_archive(str(path), ("polyp",), carry=Carry(carry, RESERVED))


def write_list(path, num_images=5, **changes):
    columns = {
        "image_uri": [f"{number}.png" for number in range(num_images)],
        "patient_id": [f"00{number}" for number in range(num_images)],
        "age": pa.array([61, None, 63, 64, 65][:num_images], pa.int16()),
        "born": pa.array([BORN, None, BORN, BORN, BORN][:num_images]),
        "status": ["in", "out", "in", "out", None][:num_images],
    }
    pq.write_table(pa.table(columns | changes), path)
    return path


def rows_of(images):
    for image in images.to_pylist():
        row = {"image_id": image["image_id"], "image_uri": image["image_uri"], "prompt": "polyp", "kind": "mask"}
        row |= {"model": "m", "status": "failed", "error": "corrupt: it is"} | image.get("carried", {})
        yield row | ({"status": "vanished"} if image["vanished"] else {})


def write_parts(output, plan):
    for shard, images in enumerate(read_plan(str(output), plan)):
        write_part(str(output), shard, list(rows_of(images)), "r", 0, carried_of_plan(images.schema))


def write_record(output, plan):
    record = {"config": {}, "plan": dataclasses.asdict(plan), "run_id": "r"}
    (output / "config.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")


def differences(output):
    *_, proof = verify_run(str(output))
    return [text for text in proof.differences if "is not finished" not in text]


@pytest.fixture
def run(tmp_path):
    """The output of a run with the columns of a list, and the list."""
    archive = listed(write_list(tmp_path / "list.parquet"))
    plan = write_plan(str(tmp_path / "out"), archive.rows, 2, carried=archive.carried)
    write_parts(tmp_path / "out", plan)
    write_record(tmp_path / "out", plan)
    return tmp_path / "out", tmp_path / "list.parquet", plan


def test_rows_have_the_values_of_the_list_also_of_images_that_failed(run):
    output, _, plan = run
    assert plan.carried == {"patient_id": "patient_id", "age": "age", "born": "born", "list_status": "status"}
    frame = pd.read_parquet(output / "masks")
    assert list(frame.columns) == [*result_schema(None).names, *plan.carried]
    assert list(frame["patient_id"]) == ["000", "001", "002", "003", "004"] and set(frame["status"]) == {"failed"}
    schema = pq.read_schema(output / "masks" / part_name(0))
    assert [str(schema.field(name).type) for name in plan.carried] == ["string", "int16", "date32[day]", "string"]
    first, second = list(read_masks(str(output), [("patient_id", "<=", "001")], ["age", "born", "list_status"]))
    assert first == {"age": 61, "born": BORN, "list_status": "in", "mask": None}
    assert second == {"age": None, "born": None, "list_status": "out", "mask": None}
    query = f"SELECT list_status, avg(age) FROM '{output}/masks/*.parquet' GROUP BY ALL ORDER BY ALL"
    assert duckdb.sql(query).fetchall() == [("in", 62.0), ("out", 64.0), (None, 65.0)]
    with pytest.raises(ConfigError, match="unknown column 'sex'; columns: image_id, .*list_status"):
        list(read_masks(str(output), [("sex", "==", "f")]))


def change_part(output, column, value):
    path = output / "masks" / part_name(1)
    table = pq.read_table(path)
    values = [value, *table[column].to_pylist()[1:]]
    field = table.schema.field(column)
    table = table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))
    pq.write_table(table, path)


@pytest.mark.parametrize(("column", "value"), [("patient_id", "2"), ("age", None), ("born", BORN.replace(year=1961))])
def test_verify_finds_a_value_that_the_list_does_not_have(run, column, value):
    output, *_ = run
    assert differences(output) == []
    change_part(output, column, value)
    assert differences(output) == [f"masks/{part_name(1)}: other values than the list had, for 1 image"]


def test_verify_finds_a_column_of_another_type_a_missing_one_and_a_forged_record(run):
    output, _, plan = run
    path = output / "masks" / part_name(0)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["born"]), path)
    assert differences(output) == [f"masks/{part_name(0)}: other values than the list had, for 2 images"]
    index, field = table.schema.get_field_index("age"), table.schema.field("age").with_type(pa.int64())
    pq.write_table(table.set_column(index, field, table["age"].cast(pa.int64())), path)
    assert differences(output) == [f"masks/{part_name(0)}: other values than the list had, for 2 images"]
    pq.write_table(table, path)
    write_record(output, dataclasses.replace(plan, carried={"patient_id": "patient_id"}))
    assert len(differences(output)) == 3  # one for each shard
    assert differences(output)[0].endswith("the plan has other columns of the list for its images than config.yaml")


def test_new_values_of_a_list_are_written_without_segmenting_again(run):
    output, path, plan = run
    write_list(path, patient_id=["000", "001", "two", "003", "004"])
    archive = listed(path)
    updated, update = update_plan(str(output), plan, archive.rows, 2, archive.carried)
    assert (update.num_new, update.num_changed, update.num_vanished, update.num_relisted) == (0, 0, 0, 1)
    state = compare_run(str(output), updated, "r")
    assert (state.pending, state.num_stale, state.num_done) == ({1: True}, 1, 5)
    write_parts(output, updated)
    assert compare_run(str(output), updated, "r").pending == {}
    assert pd.read_parquet(output / "masks")["patient_id"][2] == "two"
    _, again = update_plan(str(output), updated, listed(path).rows, 2, listed(path).carried)
    assert not any(dataclasses.asdict(again).values())


@pytest.mark.parametrize(("before", "after"), [((), "all"), ("all", ()), ("all", ("age", "patient_id"))])
def test_columns_are_added_and_removed_by_an_update(tmp_path, before, after):
    path, output = write_list(tmp_path / "list.parquet"), tmp_path / "out"
    archive = listed(path, before)
    plan = write_plan(str(output), archive.rows, 2, carried=archive.carried)
    write_parts(output, plan)
    archive = listed(path, after)
    updated, update = update_plan(str(output), plan, archive.rows, 2, archive.carried)
    assert (update.num_changed, update.num_relisted) == (0, 5)
    assert compare_run(str(output), updated, "r").num_stale == 5
    write_parts(output, updated)
    assert compare_run(str(output), updated, "r").pending == {}
    names = ["patient_id", "age", "born", "list_status"] if after == "all" else list(after)
    assert open_results(str(output)).schema.names == [*RESULT_SCHEMA.names, *names]


def test_a_vanished_image_keeps_its_values_in_the_type_that_the_list_has_now(run):
    output, path, plan = run
    write_list(path, 4, age=pa.array([61.5, 62, 63, 64]), sex=["f"] * 4)
    archive = listed(path)
    updated, update = update_plan(str(output), plan, archive.rows, 2, archive.carried)
    assert (update.num_vanished, update.num_relisted) == (1, 4)
    (*_, last) = [row for images in read_plan(str(output), updated) for row in images.to_pylist()]
    assert last["vanished"] and last["carried"] == {
        **{"patient_id": "004", "age": 65.0, "born": BORN, "list_status": None, "sex": None}
    }
    write_list(path, 4, patient_id=[0, 1, 2, 3], status=[1, 2, 3, 4])
    archive = listed(path)
    with pytest.raises(ManifestError, match="column 'list_status' of INPUT is int64 now, which does not fit"):
        update_plan(str(output), plan, archive.rows, 2, archive.carried)


def test_a_column_of_a_list_is_never_read_as_one_of_ours(tmp_path):
    """A later version has a column of the same name as a list of today, and a report has columns for other runs."""
    row = {"image_id": "a", "image_uri": "a", "prompt": "p", "kind": "mask", "model": "m", "status": "ok"}
    schema = result_schema(pa.struct([("dice", pa.string()), ("system", pa.int32())]))
    schema = schema.remove(schema.get_field_index("review"))
    field = schema.field("dice").with_name("review")  # RESERVED when it was written had no such name
    table = pa.Table.from_pylist([row | {"dice": "x", "system": 7, "review": "mine"}], schema=schema.append(field))
    (tmp_path / "masks").mkdir()
    metadata = with_format(RESULT_SCHEMA, **{"vlsm.run": "r"}).metadata
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "masks" / part_name(0))
    assert read_part(str(tmp_path), 0, "r").select(["review", "dice"]).to_pylist() == [{"review": None, "dice": "x"}]
    (found,) = next(iter(scan(open_results(str(tmp_path))))).to_pylist()
    assert (found["dice"], found["system"], found["review"]) == (None, None, None)
    assert carried_values(found) == {"dice": "x", "system": "7"}


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.struct([("a", pa.list_(pa.int8()))]),
        pa.struct([("status", pa.string())]),
        pa.struct([(f"c{number}", pa.int8()) for number in range(101)]),
        pa.struct([("t", pa.timestamp("us", "No/Where"))]),
    ],
)
def test_a_plan_with_columns_that_no_run_writes_is_damaged(run, kind):
    output, _, plan = run
    (path,) = (output / "manifest").iterdir()
    table = pq.read_table(path).drop_columns(["carried"])
    pq.write_table(table.append_column("carried", pa.nulls(len(table), kind)), path, row_group_size=2)
    with pytest.raises(DamageError, match="its column carried"):
        list(read_plan(str(output), plan))


@pytest.fixture
def prepare(tmp_path, tiny_checkpoint):
    def prepare(*words):
        path = tmp_path / "list.parquet"
        arguments = {
            "input": str(path),
            "output": str(tmp_path / "out"),
            "members": [{"checkpoint": str(tiny_checkpoint)}],
        }
        return prepare_run(load_settings(SegmentSettings, None, list(words), arguments))

    write_list(tmp_path / "list.parquet")
    return prepare


def test_all_columns_of_a_new_run_and_those_of_the_run_later(prepare, tmp_path):
    run = prepare("carry=[age]")
    assert run.plan.carried == {"age": "age"}
    assert prepare().settings.carry == ("age",)
    with pytest.raises(ConfigError, match=r"a run with carry \[age\], now it is all; --set update=true gives its rows"):
        prepare("carry=all")
    assert list(prepare("carry=all", "update=true").plan.carried) == ["patient_id", "age", "born", "list_status"]
    assert prepare().settings.carry == "all"
    assert prepare("carry=[]", "start_over=true").plan.carried == {}
    assert prepare("start_over=true").plan.carried.keys() == {"patient_id", "age", "born", "list_status"}


def test_a_run_of_an_earlier_version_carries_nothing_until_it_is_asked(prepare, tmp_path):
    prepare("carry=[]")
    uri = tmp_path / "out" / "config.yaml"
    record = read_record(str(tmp_path / "out"))
    del record["config"]["carry"], record["plan"]["carried"]
    uri.write_text(yaml.safe_dump(record), encoding="utf-8")
    before = read_record(str(tmp_path / "out"))["plan"]["id"]
    assert prepare().plan == dataclasses.replace(Plan(**record["plan"]), carried={})
    assert prepare("update=true").plan.id == before  # nothing has changed
    assert list(prepare("update=true", "carry=[patient_id]").plan.carried) == ["patient_id"]
    assert json.loads(json.dumps(read_record(str(tmp_path / "out"))["config"]["carry"])) == ["patient_id"]
