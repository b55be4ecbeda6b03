"""Reads examples.parquet of a training run, which anybody may have written."""

import pyarrow as pa

from vlsm.datasets.inspection import EXAMPLES_SCHEMA, good_records
from vlsm.datasets.records import SPLITS
from vlsm.errors import DamageError
from vlsm.runs.tables import name_damage, open_table

EXAMPLES_NAME = "examples.parquet"
_SCHEMA = pa.schema([*EXAMPLES_SCHEMA, *(pa.field(name, pa.string()) for name in ("image_version", "mask_version"))])


def read_examples_table(uri: str) -> pa.Table:
    """Return a table of examples, with the columns that its version wrote.

    Raises:
        ResultError: it is damaged or missing.
    """
    try:
        file = open_table(uri, _SCHEMA)
    except FileNotFoundError as error:
        raise DamageError(f"{uri} is missing: the run is damaged") from error
    written = file.parquet.schema_arrow.names
    table = file.read([field.name for field in _SCHEMA if field.name in written or not field.nullable])
    with name_damage(uri):
        for record in good_records(table):
            texts = [text for texts in record.prompts.values() for text in texts]
            if record.split not in SPLITS or None in (*record.prompts, *texts):
                raise ValueError(f"{record.where!r} has no split, or a prompt without words")
    return table
