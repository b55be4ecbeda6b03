"""Publishes a run as a copy: a Lance dataset, or Parquet files in folders by the values of columns."""

from typing import Any

import pyarrow as pa

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.publish.proved import ROWS, RUN, ProvedRun, check_rows, distinct
from vlsm.words import count

MAX_FOLDERS = 1_000
_PIECE_ROWS = 256


def publish_lance(run: ProvedRun, place: str | None) -> tuple[str, bool]:
    """Copy a run into a Lance dataset, and return its location and whether it was there already.

    Raises:
        ConfigError: there is no place, or another dataset.
        ResultError: the dataset does not have the rows of the run.
    """
    import lance

    place = _require(place, "lance")
    known: dict[bytes, bytes] | None = None
    try:
        known = dict(lance.dataset(place).schema.metadata or {})
    except (ValueError, OSError):  # there is none
        if storage.list_names(storage.join(place, "_versions")):
            raise
    if known is not None and known.get(RUN.encode()) != run.run_id.encode():
        raise ConfigError(f"{place!r} has a Lance dataset that is not of this run; choose another DEST")
    is_there = known is not None and known.get(ROWS.encode()) == run.rows.total.encode()
    if not is_there:
        schema = run.schema.with_metadata(run.stated)
        rows = pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in run.batches()))
        lance.write_dataset(rows, place, mode="overwrite" if known is not None else "create")
    check_rows(run, lance.dataset(place).to_batches(batch_size=_PIECE_ROWS), repr(place))
    return place, is_there


def publish_folders(run: ProvedRun, place: str | None, partition_by: list[str]) -> tuple[str, bool]:
    """Copy a run into Parquet files below folders such as site=north, and return their place and if it was there.

    Raises:
        ConfigError: there is no place, it has other files, or the columns have too many values.
        ResultError: the files do not have the rows of the run.
    """
    import pyarrow.dataset as ds

    place = _require(place, "parquet")
    _check_columns(run, partition_by)
    fs, path = storage.open_uri(place)
    filesystem = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs))
    by = ds.partitioning(pa.schema([run.schema.field(name) for name in partition_by]), flavor="hive")
    note = storage.join(place, "_vlsm.json")

    def read() -> Any:
        found = ds.dataset(path, run.schema, "parquet", filesystem, by)
        return found.to_batches(batch_size=_PIECE_ROWS)

    is_there = storage.exists(note)
    if is_there and storage.read_bytes(note, max_bytes=1000) != _note(run, partition_by):
        raise ConfigError(f"{place!r} has another run, or other rows of this one; choose another DEST, or remove it")
    if not is_there:
        if fs.exists(path) and fs.ls(path, detail=False):
            raise ConfigError(f"{place!r} is not empty; choose another DEST")
        file_format = ds.ParquetFileFormat()
        ds.write_dataset(
            run.batches(),
            path,
            schema=run.schema,
            filesystem=filesystem,
            format=file_format,
            partitioning=by,
            file_options=file_format.make_write_options(compression="zstd"),
            basename_template="part-{i}.parquet",
            max_partitions=MAX_FOLDERS,
        )
    check_rows(run, read(), repr(place))
    storage.write_bytes(note, _note(run, partition_by))  # last: the copy is complete
    return place, is_there


def _note(run: ProvedRun, partition_by: list[str]) -> bytes:
    import json

    return (json.dumps(run.stated | {"partition_by": partition_by}) + "\n").encode()


def _check_columns(run: ProvedRun, partition_by: list[str]) -> None:
    if not partition_by:
        raise ConfigError("--to parquet writes a copy in folders: give --partition-by COLUMN; OUTPUT/masks is Parquet")
    for name in partition_by:
        if name not in run.schema.names:
            raise ConfigError(f"--partition-by {name}: unknown column; columns: {', '.join(run.schema.names)}")
        if pa.types.is_nested(kind := run.schema.field(name).type) or pa.types.is_binary(kind):
            raise ConfigError(f"--partition-by {name}: a column of {kind} cannot name folders")
    if distinct(run, partition_by, MAX_FOLDERS) > MAX_FOLDERS:
        raise ConfigError(f"--partition-by {', '.join(partition_by)}: more than {count(MAX_FOLDERS, 'folder')}")


def _require(place: str | None, engine: str) -> str:
    if place is None:
        raise ConfigError(f"--to {engine} writes a copy: give its place, DEST")
    return place
