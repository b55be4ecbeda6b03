"""Columns of a list (`vlsm.archive.carried`) in the plan of a run and in its part files.

The plan has them as one column, `carried`, a struct. A part file has a column for each, and its metadata says so: it is
never taken for a column of ours, also if a later version has one of the same name.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlsm.archive.column_types import travelling_type
from vlsm.errors import ManifestError
from vlsm.limits import MAX_CARRIED_COLUMNS
from vlsm.runs.schema import PLAN_SCHEMA, RESULT_SCHEMA, part_schema

CARRIED = "carried"  # the column of the plan
# names that columns of a list cannot have in results; the last ones are of `read_masks` and of the index of an export
RESERVED = frozenset({*RESULT_SCHEMA.names, "mask", "probability", "file"})
_OF_A_LIST = {"description": "a column of the list that was INPUT", "vlsm.origin": "list"}


def plan_schema(carried: pa.StructType | None) -> pa.Schema:
    """Return the columns of a plan."""
    return PLAN_SCHEMA if carried is None else PLAN_SCHEMA.append(pa.field(CARRIED, carried, nullable=False))


def carried_of_plan(schema: pa.Schema) -> pa.StructType | None:
    """Return the carried columns in the schema of a plan's file, or None if there are none.

    Raises:
        ValueError: no run writes such columns.
    """
    if CARRIED not in schema.names:
        return None
    carried = schema.field(CARRIED).type
    if not pa.types.is_struct(carried) or not 0 < carried.num_fields <= MAX_CARRIED_COLUMNS:
        raise ValueError(f"its column {CARRIED} is {str(carried)[:100]}")
    names = [field.name for field in carried]
    has_types = all(travelling_type(field.type) == field.type for field in carried)
    if not has_types or len(set(names)) < len(names) or not RESERVED.isdisjoint(names):
        raise ValueError(f"its column {CARRIED} has other columns than a list: {', '.join(names)[:200]}")
    return carried


def cast_carried(images: pa.Table, carried: pa.StructType | None) -> pa.Table:
    """Return the images of a plan with other carried columns. Columns that it does not have are null.

    Raises:
        ManifestError: a value does not fit the new type of its column.
    """
    before: Any = images.column(CARRIED).combine_chunks() if CARRIED in images.column_names else None
    plain = images if before is None else images.drop_columns([CARRIED])
    if carried is None:
        return plain
    columns = []
    for field in carried:
        known = [] if before is None else [each.name for each in before.type]
        values = before.flatten()[known.index(field.name)] if field.name in known else pa.nulls(len(images))
        try:
            columns.append(values.cast(field.type))
        except pa.ArrowException as error:
            raise ManifestError(
                f"the column {field.name!r} of INPUT is {field.type} now, which does not fit its values of before; "
                "leave it out with the setting carry, or choose another OUTPUT"
            ) from error
    return plain.append_column(
        pa.field(CARRIED, carried, nullable=False), pa.StructArray.from_arrays(columns, fields=list(carried))
    )


def result_schema(carried: pa.StructType | None, embedding_width: int = 0) -> pa.Schema:
    """Return the columns of a part file, with the carried columns of its plan; the width is as for `part_schema`."""
    schema = part_schema(embedding_width)
    for field in carried or ():
        schema = schema.append(pa.field(field.name, field.type, metadata=_OF_A_LIST))
    return schema


def carried_fields(schema: pa.Schema) -> list[pa.Field]:
    """Return the carried columns in the schema of a part file; those that no run writes do not count."""
    fields = [field for field in schema if is_carried(field) and travelling_type(field.type) == field.type]
    return [field for field in fields if field.name not in RESERVED][:MAX_CARRIED_COLUMNS]


def carried_names(schema: pa.Schema) -> list[str]:
    """Return the names of `carried_fields`."""
    return [field.name for field in carried_fields(schema)]


def is_carried(field: pa.Field) -> bool:
    """Return whether a column of a part file is one of the list."""
    return (field.metadata or {}).get(b"vlsm.origin") == b"list"


def with_carried(found: pa.Schema) -> pa.Schema:
    """Return the columns that readers of a part file may ask for: ours, and the carried ones in its schema."""
    schema = RESULT_SCHEMA
    for field in carried_fields(found):
        schema = schema.append(field)
    return schema


def as_json(value: Any) -> Any:
    """Return a carried value as JSON holds it: a text for a date, a time and a decimal number; None for infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def find_stale(images: pa.Table, rows: pa.Table) -> frozenset[str]:
    """Return the ids of the images that have a row with other carried values than the plan has.

    Args:
        images: images of a plan.
        rows: output rows of these images, with their carried columns.
    """
    carried = images.schema.field(CARRIED).type if CARRIED in images.schema.names else ()
    planned = {field.name: field.type for field in carried}
    if planned != {field.name: field.type for field in carried_fields(rows.schema)}:
        return frozenset(rows["image_id"].to_pylist())
    if not planned or not len(rows):
        return frozenset()
    places = pc.index_in(rows["image_id"].combine_chunks(), images["image_id"].combine_chunks())
    expected = images[CARRIED].combine_chunks().take(places).flatten()
    differs = np.zeros(len(rows), bool)
    for name, values in zip(planned, expected, strict=True):
        found = rows[name].combine_chunks()
        is_equal = pc.if_else(pc.is_null(values), pc.is_null(found), pc.fill_null(pc.equal(values, found), False))
        differs |= ~is_equal.to_numpy(zero_copy_only=False)
    return frozenset(rows["image_id"].filter(pa.array(differs)).to_pylist())
