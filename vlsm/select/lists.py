"""Writes the list of chosen images: for a labeller, as INPUT of a segment run, and with masks as a dataset."""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.cells import CsvWriter
from vlsm.errors import ConfigError
from vlsm.runs.carried import carried_fields
from vlsm.runs.tables import Tables
from vlsm.select.candidates import Candidates
from vlsm.select.choosing import Choice
from vlsm.select.looks import rows_at

ENDINGS = (".parquet", ".csv")
# The columns of the list; those of the user's own list follow. The last ones are as in the rows of the run.
LIST_SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("uncertainty", pa.float64()),
        pa.field("odd_area", pa.float64()),
        pa.field("distance", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("max_probability", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("area_fraction", pa.float64()),
    ]
)
_OF_ROW = "image_id image_uri selector prompt confidence max_probability agreement area_fraction".split()
_DIGITS = 6  # of the scores: two rows that differ by less are equal for a person


def check_list(uri: str) -> None:
    """Raise a ConfigError if LIST has another ending than .parquet or .csv, or exists."""
    if not uri.endswith(ENDINGS):
        raise ConfigError(f"LIST is {uri!r}; it must end in {' or '.join(ENDINGS)}")
    with storage.name_errors("LIST", uri):
        if storage.exists(uri):
            raise ConfigError(f"LIST {uri!r} exists, and may hold labels: remove it or choose another name")


def make_list(tables: Tables, candidates: Candidates, choices: Sequence[Choice]) -> pa.Table:
    """Return the list: one row per choice, in their order, with the columns of LIST_SCHEMA and of the user's list."""
    schema, own = LIST_SCHEMA, {}
    for field in carried_fields(tables.schema):
        name = field.name
        while name in schema.names:
            name = f"list_{name}"
        own[field.name] = name
        schema = schema.append(pa.field(name, field.type))
    places = [(int(candidates.part[choice.index]), int(candidates.row[choice.index])) for choice in choices]
    found = dict(rows_at(tables, places, [*_OF_ROW, *own]))
    rows = []
    for rank, (choice, place) in enumerate(zip(choices, places, strict=True), start=1):
        scores: dict[str, Any] = {name: float(values[choice.index]) for name, values in candidates.scores.items()}
        scores["distance"] = choice.distance
        row = {own.get(name, name): value for name, value in found[place].items()}
        shown = {name: _round(value) for name, value in scores.items()}
        rows.append({"rank": rank, "why": choice.why} | row | shown)
    return pa.Table.from_pylist(rows, schema=schema)


def _round(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, _DIGITS)


def write_list(uri: str, table: pa.Table) -> None:
    """Write a list as Parquet or CSV, by the ending of its name.

    Raises:
        ConfigError: it exists.
    """
    if uri.endswith(".csv"):
        text = io.StringIO(newline="")
        CsvWriter(text, table.column_names).write_all(table.to_pylist())
        data = text.getvalue().encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
    with storage.name_errors("LIST", uri):
        if not storage.create_bytes(uri, data):
            check_list(uri)
