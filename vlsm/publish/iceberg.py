"""Publishes a run as an Iceberg table: its part files as they are, in a catalog of the user or in a small one."""

import os
from typing import Any

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.publish.proved import ROWS, RUN, ProvedRun, check_rows, refuse_half_floats

_CATALOG_FILE = "catalog.db"


def publish_iceberg(run: ProvedRun, place: str | None, catalog: str | None, name: str) -> tuple[str, bool]:
    """Publish a run, and return the table's name and whether it was there already.

    Args:
        run: the run.
        place: a local folder for the tables' metadata and for a catalog in SQLite, if there is no other catalog.
        catalog: name of a catalog in the settings of pyiceberg, which also hold its credentials; or None.
        name: namespace and name of the table, such as "vlsm.masks".

    Raises:
        ConfigError: there is another table, or the run has columns that Iceberg has not.
        ResultError: the table does not have the rows of the run.
    """
    from pyiceberg.exceptions import NamespaceAlreadyExistsError, NoSuchTableError

    refuse_half_floats(run, "Iceberg", "publish it --to lance or --to duckdb")
    opened = _open_catalog(place, catalog)
    try:
        opened.create_namespace(name.rpartition(".")[0])
    except NamespaceAlreadyExistsError:
        pass
    try:
        table = opened.load_table(name)
    except NoSuchTableError:
        table = opened.create_table(name, schema=run.schema, properties={RUN: run.run_id})
    place = f"{name} of the catalog {catalog or place!r}"
    if table.properties.get(RUN) != run.run_id:
        raise ConfigError(f"the table {place} is not of this run; choose another --name")
    is_there = table.properties.get(ROWS) == run.rows.total
    if not is_there:
        _register(run, table)
        table.refresh()
    check_rows(run, table.scan().to_arrow_batch_reader(), place)
    return place, is_there


def _open_catalog(place: str | None, catalog: str | None) -> Any:
    from pyiceberg.catalog import load_catalog

    if catalog is not None:
        return load_catalog(catalog)
    if place is None or "://" in place:
        raise ConfigError("--to iceberg needs a local folder DEST for its catalog, or --catalog NAME")
    os.makedirs(place, exist_ok=True)
    database = os.path.abspath(os.path.join(place, _CATALOG_FILE))
    # pyiceberg finds credentials of S3 as every client does, but neither the endpoint nor the region
    known = {"s3.endpoint": "AWS_ENDPOINT_URL", "s3.region": "AWS_REGION"}
    of_s3 = {key: value for key, name in known.items() if (value := os.environ.get(name))}
    warehouse = f"file://{os.path.abspath(place)}"
    return load_catalog("vlsm", type="sql", uri=f"sqlite:///{database}", warehouse=warehouse, **of_s3)


def _register(run: ProvedRun, table: Any) -> None:
    """Write one snapshot with the part files, instead of earlier ones: a run may have written some of them again."""
    from pyiceberg.expressions import AlwaysTrue

    uris = [uri if "://" in uri else f"file://{storage.absolute(uri)}" for uri in run.tables.uris]
    with table.transaction() as change:
        if table.current_snapshot() is not None:
            change.delete(AlwaysTrue())
        change.add_files(uris, check_duplicate_files=False)
        change.set_properties({ROWS: run.rows.total})
