"""Runs in an object store are published where they are; the engines read the standard variables of AWS."""

import deltalake
import lance
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import load_catalog

from jobs.benchmarks.stores import BUCKET
from tests.publish.conftest import NUMBER, write_run
from vlsm import storage
from vlsm.publish.__main__ import main


@pytest.fixture
def stored(s3_server, tmp_path, monkeypatch, request):
    """A run in the store."""
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    output = write_run(tmp_path / "masks")
    uri = f"s3://{BUCKET}/publish/{request.node.callspec.id}/masks"
    for path in output.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(output)}", path.read_bytes())
    return uri


@pytest.mark.parametrize("engine", ["delta", "iceberg", "lance"])
def test_a_run_in_a_store_is_published_and_no_credential_is_written(stored, s3_server, tmp_path, capsys, engine):
    place = {"delta": [], "iceberg": [str(tmp_path / "ice")], "lance": [f"{stored}.lance"]}[engine]
    for state in ("published", "already there"):
        assert main([stored, *place, "--to", engine]) == 0
        assert capsys.readouterr().out.startswith(f"{state}, with {NUMBER} rows: ")
    if engine == "delta":
        assert len(deltalake.DeltaTable(f"{stored}/masks").to_pyarrow_table()) == NUMBER
    elif engine == "lance":
        assert lance.dataset(f"{stored}.lance").count_rows() == NUMBER
    else:
        uri = f"sqlite:///{tmp_path}/ice/catalog.db"
        table = load_catalog("vlsm", type="sql", uri=uri).load_table("vlsm.masks")
        assert {file["file_path"] for file in table.inspect.files().to_pylist()} == {
            f"{stored}/masks/part-{number:08d}.parquet" for number in range(3)
        }
    secret = s3_server.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    fs, path = storage.open_uri(stored)
    contents += [fs.cat_file(each) for each in fs.find(path.rpartition("/")[0])]
    assert contents and not [content for content in contents if secret in content]
    assert pq.read_table(tmp_path / "masks" / "masks" / "part-00000000.parquet").num_rows == 4
