"""Publishes a run as a DuckDB file with a view over its part files, which stay where they are."""

import os
import re
from typing import Any

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.publish.proved import ROWS, RUN, ProvedRun, check_rows

_PIECE_ROWS = 256


def publish_duckdb(run: ProvedRun, place: str | None, name: str) -> tuple[str, bool]:
    """Write a view, and return its place and whether it was there already. It reads all parts, also later ones.

    Args:
        run: the run.
        place: a local file; default: OUTPUT with `.duckdb` behind it, if that is local.
        name: name of the view.

    Raises:
        ConfigError: the file has another run's view or table of this name, or its place cannot be used.
        ResultError: the view does not have the rows of the run.
    """
    import duckdb

    folder = storage.join(run.output, "masks")
    place = place or (None if "://" in run.output else f"{run.output}.duckdb")
    if place is None or "://" in place:
        raise ConfigError("--to duckdb needs a local file, DEST")
    if re.search(r"[*?\[\]{}]", folder):
        raise ConfigError(f"OUTPUT {run.output!r} has a character that DuckDB takes for a pattern; move it")
    is_new, quoted = not os.path.exists(place), '"' + name.replace('"', '""') + '"'
    with duckdb.connect(place) as connection:
        if not is_new and not _is_of_run(connection, run, name):
            raise ConfigError(f"{place!r} has a {name} that is not of this run; choose another DEST or --name")
        view = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = ?", [name]).fetchone()
        is_there = view is not None and _stated(connection, name).get(ROWS) == run.rows.total
        if not is_there:
            files = "'" + storage.join(folder, "part-*.parquet").replace("'", "''") + "'"
            connection.execute("BEGIN")
            connection.execute(f"CREATE OR REPLACE VIEW {quoted} AS SELECT * FROM read_parquet({files})")
            connection.execute("CREATE TABLE IF NOT EXISTS vlsm_runs (view VARCHAR, key VARCHAR, value VARCHAR)")
            connection.execute("DELETE FROM vlsm_runs WHERE view = ?", [name])
            connection.executemany(
                "INSERT INTO vlsm_runs VALUES (?, ?, ?)", [(name, key, value) for key, value in run.stated.items()]
            )
            connection.execute("COMMIT")
        check_rows(run, connection.sql(f"SELECT * FROM {quoted}").to_arrow_reader(_PIECE_ROWS), repr(place))
    return place, is_there


def _is_of_run(connection: Any, run: ProvedRun, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM information_schema.tables WHERE table_name = ?", [name]).fetchone()
    return found is None or _stated(connection, name).get(RUN) == run.run_id


def _stated(connection: Any, name: str) -> dict[str, str]:
    has = connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'vlsm_runs'").fetchone()
    if has is None:
        return {}
    return dict(connection.execute("SELECT key, value FROM vlsm_runs WHERE view = ?", [name]).fetchall())
