"""A segment run that is proved, its part files, and sums of rows, by which a published table is checked."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlsm import storage
from vlsm.errors import ConfigError, ResultError
from vlsm.runs.record import read_record
from vlsm.runs.results import open_results
from vlsm.runs.row_digest import DIGEST_KEY, RowDigest
from vlsm.runs.tables import Tables, open_table
from vlsm.runs.verify import verify_run
from vlsm.words import count

RUN, ROWS = "vlsm.run", "vlsm.rows_sum"  # names under which a table keeps the run's id, and the sum of its rows


@dataclass(frozen=True)
class Rows:
    """The number of rows, and a sum of the digests of all rows, which does not depend on their order."""

    number: int
    total: str


@dataclass(frozen=True)
class ProvedRun:
    """A finished run whose rows are as planned.

    Attributes:
        output: its OUTPUT.
        run_id: its id.
        rows: its rows.
        schema: the columns of its part files, without metadata.
    """

    output: str
    run_id: str
    rows: Rows
    schema: pa.Schema

    @property
    def tables(self) -> Tables:
        """Its part files, with all columns that a reader may ask for."""
        return open_results(self.output)

    @property
    def stated(self) -> dict[str, str]:
        """What a table keeps of the run."""
        return {RUN: self.run_id, ROWS: self.rows.total}

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows, a few at a time, in the order of the part files."""
        for _, table in self.tables.pieces(self.schema.names):
            yield from table.cast(self.schema).combine_chunks().to_batches()


def prove(output: str) -> ProvedRun:
    """Return the run in OUTPUT, after the same proof as `vlsm verify`.

    Raises:
        ConfigError: there is no run at OUTPUT.
        ResultError: the run is not finished, or its rows are not as planned.
    """
    with storage.name_errors("OUTPUT", output):
        *_, proof = verify_run(output)
    if not proof.is_finished:
        raise ResultError(f"the run in {output!r} is not finished: finish it, then publish it")
    if proof.differences:
        raise ResultError(
            f"{output!r} is not published: {count(len(proof.differences), 'difference')} to its plan; the first: "
            f"{proof.differences[0]}"
        )
    record = read_record(output) or {}
    tables = open_results(output)
    schema = _schema_of(tables)
    rows = sum_rows(table for _, table in tables.pieces(schema.names))
    return ProvedRun(output, record["run_id"], rows, schema)


def _schema_of(tables: Tables) -> pa.Schema:
    """Return the columns of the part files. All must have the same: an engine reads them as one table.

    Raises:
        ResultError: an earlier version has written some of them, with fewer columns.
    """
    first: pa.Schema | None = None
    for uri in tables.uris:
        schema = open_table(uri, tables.schema, num_bytes=0).parquet.schema_arrow.remove_metadata()
        schema = pa.schema([field.remove_metadata() for field in schema])
        if first is not None and not schema.equals(first):
            raise ResultError(
                f"{uri} has other columns than the parts before it, as an earlier version wrote them; "
                "segment into a new OUTPUT to publish it"
            )
        first = schema
    if first is None:
        raise ConfigError("the run has no parts")
    return first


def sum_rows(tables: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    """Return the number of rows and their sum. Columns that are null do not count."""
    number, total = 0, 0
    for table in tables:
        for row in table.to_pylist():
            digest = RowDigest()
            digest.add(row)
            total += int(digest.hexdigest(), 16)
            number += 1
    return Rows(number, hashlib.sha256(str(total).encode()).hexdigest())


def check_rows(run: ProvedRun, found: Iterable[pa.Table | pa.RecordBatch], place: str) -> None:
    """Do nothing if a published table has exactly the rows of the run.

    Raises:
        ResultError: it has others.
    """
    rows = sum_rows(found)
    if rows != run.rows:
        numbers = f"{rows.number:,} rows; the run has {run.rows.number:,}"
        what = "other values than the run" if rows.number == run.rows.number else numbers
        raise ResultError(f"the table in {place} has {what}; remove it")


def refuse_half_floats(run: ProvedRun, engine: str, advice: str) -> None:
    """Raise a ConfigError if the run has embeddings: their type, float16, is none of the engine."""
    if any(pa.types.is_float16(getattr(field.type, "value_type", field.type)) for field in run.schema):
        raise ConfigError(f"the run has embeddings of 16 bits, a type that {engine} does not have; {advice}")


def part_digests(run: ProvedRun) -> dict[str, str]:
    """Return the digest of the rows of each part file that states one, by its name."""
    digests = {}
    for uri in run.tables.uris:
        stated: Any = open_table(uri, run.schema, num_bytes=0).metadata.get(DIGEST_KEY.encode())
        digests[uri.rpartition("/")[2]] = stated.decode(errors="replace") if stated else ""
    return digests


def distinct(run: ProvedRun, columns: list[str], most: int) -> int:
    """Return the number of different values of some columns together; at most one more than `most` are counted."""
    known = set[tuple[Any, ...]]()
    for _, table in run.tables.pieces(columns):
        values = [pc.cast(table[name], pa.string()).to_pylist() for name in columns]
        known.update(zip(*values, strict=True))
        if len(known) > most:
            break
    return len(known)
