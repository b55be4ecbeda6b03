"""Writes the list of corrected masks, which a training takes as a dataset."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm.cells import LABEL_COLUMNS, CsvWriter
from vlsm.errors import ConfigError
from vlsm.runs.carried import as_json

ENDINGS = (".parquet", ".csv", ".jsonl")
_COLUMNS = pa.schema(
    [
        pa.field(name, pa.float64() if name == "prediction_dice" else pa.string(), nullable=name == "selector")
        for name in LABEL_COLUMNS
    ]
)
_ROWS_AT_ONCE = 4096

Row = dict[str, Any]


class ListWriter:
    """Writes rows to a list as Parquet, CSV or JSON Lines. The file has its name when all rows are in it.

    The columns: `image_uri`, `selector`, `mask_uri` (relative to the list, or `none`), `prompt`, `image_id`, `outcome`
    (accepted or corrected) and `prediction_dice`, then the columns of the list that was INPUT of the run. A column of
    theirs with one of these names is left out.

    Args:
        path: the list.
        carried: the columns of the list that was INPUT.

    Raises:
        ConfigError: the path has another ending, or is not local.
    """

    def __init__(self, path: str, carried: Sequence[pa.Field]) -> None:
        self._path = Path(path)
        if "://" in path:
            raise ConfigError(f"{path} is not a local file; the list and its masks are written to this machine")
        if self._path.suffix not in ENDINGS:
            raise ConfigError(f"{path} ends with {self._path.suffix!r}; it must end with {', '.join(ENDINGS)}")
        schema = _COLUMNS
        for field in carried:
            schema = schema if field.name in schema.names else schema.append(field.remove_metadata())
        self._schema, self._rows = schema, list[Row]()
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._parquet: pq.ParquetWriter | None = None
        self._file: TextIO | None = None
        self._csv: CsvWriter | None = None

    def write(self, row: Row) -> None:
        """Write a row; columns that the list does not have are left out."""
        self._rows.append({name: row.get(name) for name in self._schema.names})
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._parquet is not None:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        elif self._csv is not None:
            self._csv.write_all(self._rows)
        elif self._file is not None:
            lines = ({name: as_json(value) for name, value in row.items()} for row in self._rows)
            self._file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._rows = []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.suffix == ".parquet":
            self._parquet = pq.ParquetWriter(self._partial, self._schema)
            return self
        self._file = self._partial.open("w", encoding="utf-8", newline="")
        if self._path.suffix == ".csv":
            self._csv = CsvWriter(self._file, self._schema.names)
        return self

    def __exit__(self, error_type: object, *error: object) -> None:
        if error_type is None:
            self._flush()
        for file in (self._parquet, self._file):
            if file is not None:
                file.close()
        if error_type is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)
