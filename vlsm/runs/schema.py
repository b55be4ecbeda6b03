"""The columns of all tables that a segment run writes."""

import pyarrow as pa

from vlsm.errors import ResultError
from vlsm.version import FORMAT, newer_format

_FORMAT_KEY = b"vlsm.format"

# The plan: one row per image. A row group is a shard.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("image_version", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.timestamp("us", tz="UTC")),
        pa.field("prompts", pa.list_(pa.string()), nullable=False),
        pa.field("vanished", pa.bool_(), nullable=False),
    ]
)

# The output: one row per (image, prompt, kind). By default the only kind is "mask".
RESULT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("image_version", pa.string()),
        pa.field("content_sha256", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("grey_rule", pa.string()),
        pa.field("mask_rle", pa.string()),
        pa.field("label_map", pa.binary()),
        pa.field("probability_map", pa.binary()),
        pa.field("area_px", pa.int64()),
        pa.field("area_fraction", pa.float64()),
        pa.field("bbox", pa.list_(pa.int32())),
        pa.field("confidence", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("review", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


def with_format(schema: pa.Schema, **metadata: str) -> pa.Schema:
    """The schema with the format version, and more, in its metadata."""
    return schema.with_metadata({_FORMAT_KEY: str(FORMAT)} | metadata)


def check_format(schema: pa.Schema, name: str) -> None:
    """Do nothing if this version can read a file with such a schema.

    Raises:
        ResultError: the file has a newer format, or states none that is a number.
    """
    stated = (schema.metadata or {}).get(_FORMAT_KEY)
    if stated is not None:
        stated = int(stated) if stated.isdigit() else stated.decode(errors="replace")
    if message := newer_format(stated, name):
        raise ResultError(message)


def complete(table: pa.Table, schema: pa.Schema) -> pa.Table | None:
    """Return a table of an earlier version with the columns of the present schema; absent ones are null.

    Returns:
        None if a column has another type, or one is absent that may not be null.
    """
    columns = []
    for column in schema:
        if column.name in table.column_names and table.schema.field(column.name).type == column.type:
            columns.append(table[column.name])
        elif column.name not in table.column_names and column.nullable:
            columns.append(pa.nulls(len(table), column.type))
        else:
            return None
    return pa.table(columns, schema=schema)
