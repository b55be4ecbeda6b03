"""Publishes a run as a Delta table: its part files as they are, or a copy in another place."""

import json
from typing import Any

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.publish.proved import ROWS, RUN, ProvedRun, check_rows, part_digests, refuse_half_floats

_DIGEST = "vlsm.rows_sha256"


def publish_delta(run: ProvedRun, place: str | None, partition_by: list[str]) -> tuple[str, bool]:
    """Publish a run, and return the table's location and whether it was there already.

    Without a place, the table is the folder of the part files: a `_delta_log` beside them, no copy. A Delta table
    names files of its own folder only, so that another place gets a copy.

    Raises:
        ConfigError: there is another table, or the run has columns that Delta Lake has not.
        ResultError: the table does not have the rows of the run.
    """
    from deltalake import DeltaTable

    refuse_half_floats(run, "Delta Lake", "publish it --to lance or --to duckdb")
    is_copy = place is not None or bool(partition_by)
    if is_copy and place is None:
        raise ConfigError("--partition-by writes a copy: give its place, DEST")
    place = place or storage.join(run.output, "masks")
    known = None
    if DeltaTable.is_deltatable(place):
        known = _stated(DeltaTable(place))
        if known.get(RUN) != run.run_id:
            raise ConfigError(f"{place!r} has a Delta table that is not of this run; choose another DEST")
        if known.get(ROWS) == run.rows.total:
            check_rows(run, DeltaTable(place).to_pyarrow_dataset().to_batches(), repr(place))
            return place, True
    if is_copy:
        _copy(run, place, partition_by)
    else:
        _register(run, place, is_new=known is None)
    check_rows(run, DeltaTable(place).to_pyarrow_dataset().to_batches(), repr(place))
    return place, False


def _stated(table: Any) -> dict[str, Any]:
    """Return what the newest commit of a run says; {} if no run has written the table."""
    return next((commit for commit in table.history() if RUN in commit), {})


def _copy(run: ProvedRun, place: str, partition_by: list[str]) -> None:
    import pyarrow as pa
    from deltalake import CommitProperties, write_deltalake

    rows = pa.RecordBatchReader.from_batches(run.schema, run.batches())
    stated = CommitProperties(custom_metadata=run.stated)
    write_deltalake(place, rows, mode="overwrite", partition_by=partition_by or None, commit_properties=stated)


def _register(run: ProvedRun, place: str, is_new: bool) -> None:
    """Write the first commit, or one with the parts that are new or were written again since the last one."""
    from deltalake import CommitProperties, DeltaTable, Schema
    from deltalake.transaction import AddAction, create_table_with_add_actions

    schema, digests = Schema.from_arrow(run.schema), part_digests(run)
    stated = CommitProperties(custom_metadata=run.stated | {_DIGEST: json.dumps(digests)})
    known = {} if is_new else json.loads(_stated(DeltaTable(place)).get(_DIGEST, "{}"))
    actions = [
        AddAction(name, size, {}, modified_ms, True, json.dumps({"numRecords": rows}))
        for name, size, modified_ms, rows in _files(run)
        if not digests[name] or known.get(name) != digests[name]
    ]
    if is_new:
        create_table_with_add_actions(place, schema, actions, commit_properties=stated)
    else:
        DeltaTable(place).create_write_transaction(actions, "append", schema, commit_properties=stated)


def _files(run: ProvedRun) -> list[tuple[str, int, int, int]]:
    """Return name, size in bytes, time of the last change in ms, and number of rows of each part file."""
    from vlsm.runs.tables import open_table

    times = storage.list_times(storage.join(run.output, "masks"))
    files = []
    for uri in run.tables.uris:
        file, name = open_table(uri, run.schema, num_bytes=0), uri.rpartition("/")[2]
        files.append((name, file.num_bytes, int(1000 * times[name]), file.parquet.metadata.num_rows))
    return files
