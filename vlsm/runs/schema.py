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


def complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table of an earlier version, or of anybody, with the columns of a schema; absent ones are null.

    Raises:
        ValueError: a column is absent, or has nulls, which its schema forbids.
        pa.ArrowException: a column cannot be cast, or its values are invalid.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            column = pa.chunked_array([pa.nulls(len(table), field.type)])
        elif (column := table[field.name]).type != field.type:
            column = column.cast(field.type)
        if not field.nullable and column.null_count:
            raise ValueError(f"the column {field.name} is absent or has nulls")
        columns.append(column)
    completed = pa.Table.from_arrays(columns, schema=schema)
    completed.validate(full=True)  # also that texts are UTF-8
    return completed
