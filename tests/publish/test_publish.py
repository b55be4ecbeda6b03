"""A proved run as a table of other engines: the same rows and types, once; other runs and unproved ones are refused."""

import json
import os
import re
from pathlib import Path

import deltalake
import duckdb
import lance
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import load_catalog

from jobs.verify import verify
from tests.publish.conftest import NUMBER, RUN_ID, SITES, write_run
from vlsm.publish import __main__ as command
from vlsm.publish.__main__ import ENGINES, main
from vlsm.publish.proved import prove, sum_rows

ROOT = Path(__file__).parents[2]
IN_PLACE = ("delta", "iceberg", "duckdb")


def publish(output, folder, engine):
    """Publish a run to a place of this engine below a folder, and return the exit code and the place."""
    places = {"delta": None, "iceberg": folder / "ice", "lance": folder / "masks.lance", "duckdb": folder / "m.duckdb"}
    place = {**places, "parquet": folder / "sites", "delta copy": folder / "copy"}[engine]
    words = [str(output), *([str(place)] if place else []), "--to", engine.partition(" ")[0]]
    words += ["--partition-by", "site"] * (engine == "parquet")
    return main(words), place or output / "masks"


def read(place, engine):
    """The rows that the engine's own library reads, in the order of the images."""
    if engine.startswith("delta"):
        table = deltalake.DeltaTable(str(place)).to_pyarrow_table()
    elif engine == "iceberg":
        table = open_iceberg(place).scan().to_arrow()
    elif engine == "lance":
        table = lance.dataset(str(place)).to_table()
    elif engine == "duckdb":
        with duckdb.connect(str(place), read_only=True) as connection:
            table = connection.sql("SELECT * FROM masks").to_arrow_table()
    else:
        site = pa.schema([("site", pa.string())])
        table = ds.dataset(str(place), partitioning=ds.partitioning(site, flavor="hive")).to_table()
    return table.sort_by("image_id")


def open_iceberg(place):
    catalog = load_catalog("vlsm", type="sql", uri=f"sqlite:///{place}/catalog.db", warehouse=f"file://{place}")
    return catalog.load_table("vlsm.masks")


def parts(output):
    paths = sorted((output / "masks").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in paths]).sort_by("image_id")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def plain(kind):
    """A type without the differences that engines make: large offsets, names of items, time zones' names."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(plain(kind.value_type))
    return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz else kind


@pytest.mark.parametrize("engine", [*ENGINES, "delta copy"])
def test_a_table_has_the_rows_and_types_of_the_run_and_a_second_publish_writes_nothing(tmp_path, capsys, engine):
    output = write_run(tmp_path / "masks of 'us'")
    code, place = publish(output, tmp_path, engine)
    assert code == 0
    assert capsys.readouterr().out.startswith(f"published, with {NUMBER} rows: ")
    found, expected = read(place, engine), parts(output)
    assert found.select(expected.column_names).to_pylist() == expected.to_pylist()
    for field in expected.schema:
        assert plain(found.schema.field(field.name).type) == plain(field.type)
    before = files(tmp_path)
    assert publish(output, tmp_path, engine)[0] == 0
    assert capsys.readouterr().out.startswith(f"already there, with {NUMBER} rows: ")
    after = files(tmp_path)
    kept = {
        path for path in after if path.suffix in (".parquet", ".lance", ".avro", ".json") and "_vlsm" not in path.name
    }
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert verify(str(output))["rows"] == NUMBER  # the table in its folder is no part of the run


@pytest.mark.parametrize("engine", IN_PLACE)
def test_nothing_is_copied_where_the_format_allows(tmp_path, engine):
    output = write_run(tmp_path / "masks")
    before = files(tmp_path)
    assert publish(output, tmp_path, engine)[0] == 0
    after = files(tmp_path)
    assert [path for path in after if path.suffix == ".parquet"] == [
        path for path in before if path.suffix == ".parquet"
    ]
    assert {path: after[path] for path in before} == before


def test_no_copy_lies_in_the_output_of_its_run(tmp_path, capsys):
    """A reader of the folder would see each row twice."""
    write_run(tmp_path / "out")
    assert (
        main([str(tmp_path / "out"), str(tmp_path / "out/masks/by"), "--to", "parquet", "--partition-by", "site"]) == 2
    )
    assert "lies in OUTPUT, which belongs to its run" in capsys.readouterr().err
    assert not (tmp_path / "out/masks/by").exists()


@pytest.mark.parametrize("engine", ["delta", "iceberg", "lance", "duckdb", "delta copy"])
def test_a_run_with_more_rows_is_published_again(tmp_path, capsys, engine):
    output = write_run(tmp_path / "masks")
    _, place = publish(output, tmp_path, engine)
    assert len(read(place, engine)) == NUMBER
    write_run(output, num_images=14, age=pa.array([*range(60, 74)], pa.int32()))  # other ages, and one more part
    capsys.readouterr()
    assert publish(output, tmp_path, engine)[0] == 0
    assert capsys.readouterr().out.startswith("published, with 14 rows")
    found = read(place, engine)
    assert len(found) == 14
    assert found["age"].to_pylist() == list(range(60, 74))
    assert publish(output, tmp_path, engine)[0] == 0
    assert capsys.readouterr().out.startswith("already there")


def test_only_new_and_changed_parts_are_added_to_a_delta_table(tmp_path):
    output = write_run(tmp_path / "masks")
    publish(output, tmp_path, "delta")
    write_run(output, num_images=14)  # the first two parts stay as they were
    publish(output, tmp_path, "delta")
    logs = sorted((output / "masks" / "_delta_log").glob("*.json"))
    added = [
        [json.loads(line)["add"]["path"] for line in log.read_text().splitlines() if '"add"' in line] for log in logs
    ]
    names = [f"part-{number:08d}.parquet" for number in range(4)]
    assert added == [names[:3], names[2:]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["unfinished", "changed", "missing"])
def test_a_run_that_is_not_proved_is_refused_and_nothing_is_written(tmp_path, capsys, engine, fault):
    output = write_run(tmp_path / "masks")
    part = output / "masks" / "part-00000001.parquet"
    if fault == "unfinished":
        (output / "summary.json").unlink()
    elif fault == "missing":
        part.unlink()
    else:
        table = pq.read_table(part, partitioning=None)
        position = table.column_names.index("confidence")
        changed = table.set_column(position, table.schema.field(position), pa.array([0.9] * len(table)))
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), part)
    before = files(tmp_path)
    assert publish(output, tmp_path, engine)[0] == 1
    reason = {"unfinished": "is not finished: finish it, then publish it", "changed": "have been changed since"}
    assert reason.get(fault, "is missing, damaged or of another run") in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize("engine", ["iceberg", "lance", "duckdb", "parquet", "delta copy"])
def test_the_table_of_another_run_stays(tmp_path, capsys, output, engine):
    other = write_run(tmp_path / "other", "f" * 32, 3)
    _, place = publish(other, tmp_path, engine)
    assert publish(output, tmp_path, engine)[0] == 2
    err = capsys.readouterr().err
    assert "not of this run" in err or "has another run" in err
    assert len(read(place, engine)) == 3


def test_a_table_of_somebody_else_stays(tmp_path, capsys, output):
    deltalake.write_deltalake(str(tmp_path / "copy"), pa.table({"x": [1]}))
    with duckdb.connect(str(tmp_path / "m.duckdb")) as connection:
        connection.execute("CREATE TABLE masks AS SELECT 1 AS x")
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "masks.lance"))
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "mine.txt").write_text("x")
    for engine in ("delta copy", "duckdb", "lance", "parquet"):
        assert publish(output, tmp_path, engine)[0] == 2
    assert capsys.readouterr().err.count("choose another DEST") == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_go_where_there_is_a_type_for_them(tmp_path, capsys, engine):
    output = write_run(tmp_path / "masks", embedding=True)
    code, place = publish(output, tmp_path, engine)
    if engine in ("delta", "iceberg"):
        assert code == 2
        assert "embeddings of 16 bits" in capsys.readouterr().err
        return
    assert code == 0
    vectors = [vector for vector in read(place, engine)["embedding"].to_pylist() if vector is not None]
    assert len(vectors) == NUMBER - 1
    assert all(vector == pytest.approx([0.6, 0.8], abs=1e-3) for vector in vectors)


def test_folders_are_named_after_values_and_one_is_read_alone(tmp_path, output):
    _, place = publish(output, tmp_path, "parquet")
    assert len([path for path in place.iterdir() if path.is_dir()]) == len(SITES)
    frame = pd.read_parquet(place, filters=[("site", "==", "north")])
    assert len(frame) == NUMBER // len(SITES)
    assert not [path for path in place.rglob("*") if not path.resolve().is_relative_to(place.resolve())]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["place", "--to", "parquet"], "give --partition-by COLUMN"),
        (["place", "--to", "parquet", "--partition-by", "nothing"], "unknown column; columns: image_id, "),
        (["place", "--to", "parquet", "--partition-by", "bbox"], "cannot name folders"),
        (["--to", "parquet", "--partition-by", "site"], "--to parquet writes a copy: give its place, DEST"),
        (["--to", "lance"], "--to lance writes a copy: give its place, DEST"),
        (["--to", "delta", "--partition-by", "site"], "--partition-by writes a copy: give its place, DEST"),
        (["place", "--to", "lance", "--partition-by", "site"], "is for --to parquet and --to delta"),
        (["place", "--to", "lance", "--catalog", "x"], "--catalog is for --to iceberg"),
        (
            ["place", "--to", "parquet", "--name", "x"],
            "--name is for --to iceberg and --to duckdb, not for",
        ),
        (["--to", "iceberg"], "--to iceberg needs a local folder DEST"),
        (["--to", "iceberg", "--catalog", "no such catalog"], "--to iceberg failed: "),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, monkeypatch, capsys, output, words, reason):
    monkeypatch.chdir(tmp_path)
    assert main([str(output), *words]) == 2
    err = capsys.readouterr().err
    assert reason in err and len(err.splitlines()) == 1


def test_more_folders_than_the_limit_are_refused(tmp_path, capsys, monkeypatch, output):
    monkeypatch.setattr("vlsm.publish.copies.MAX_FOLDERS", 3)
    assert publish(output, tmp_path, "parquet")[0] == 2
    assert "--partition-by site: more than 3 folders" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(output, capsys, monkeypatch):
    monkeypatch.setitem(command._PACKAGES, "delta", "a_package_that_nobody_has")
    assert main([str(output), "--to", "delta"]) == 2
    assert "pip install 'vlsm[publish]'" in capsys.readouterr().err


def test_the_sum_of_rows_does_not_depend_on_their_order_and_sees_every_value(output):
    run, table = prove(str(output)), parts(output)
    assert sum_rows([table.take(pa.array(range(NUMBER))[::-1])]) == run.rows
    twice = pa.concat_tables([table, table.slice(0, 1)])
    assert sum_rows([twice]) != run.rows
    for name, other in (("confidence", 0.25), ("image_id", "x"), ("site", "x"), ("age", 1)):
        position, values = table.column_names.index(name), [*table[name].to_pylist()[1:], other]
        changed = table.set_column(position, name, pa.array(values, table.schema.field(name).type))
        assert sum_rows([changed]) != run.rows


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "masks")
    section = (ROOT / "jobs" / "README.md").read_text().partition("## Publish a run to other engines")[2]
    section = section.partition("\n## ")[0]
    shell = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    for line in shell.splitlines():
        words = line.partition("#")[0].split()
        assert words[:2] == ["vlsm", "publish"]
        if "s3://bucket/masks" not in words:
            assert main(words[2:]) == 0
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    out = capsys.readouterr().out
    assert re.search(r"polyp\s+0\.\d+", out) and "\n2\n" in out and "('ok', 9)" in out
    assert re.search(r"```sql\n.*delta\.`/data/masks/masks`", section, re.DOTALL)
    assert os.path.exists("masks.duckdb") and RUN_ID in (tmp_path / "by_site" / "_vlsm.json").read_text()
