"""Parquet files of an OUTPUT, which anybody may have written: checked first, then read in pieces that fit into memory.

A footer states how large a row group is, unpacked. No cell is larger than its group, so the number of rows in a piece
follows from it: many small rows, or a single row with a large mask.
"""

import contextlib
import io
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import DamageError
from vlsm.runs.carried import is_carried
from vlsm.runs.schema import check_format, complete

_PIECE_BYTES, _PIECE_ROWS = 1 << 24, 256  # at most, of one column in a piece
_WHOLE_BYTES = 1 << 26  # a table of more bytes must not be larger than _GROWTH times its file
_GROWTH = 4
_SMALL_BYTES = 1 << 24  # remote files up to this size are fetched with one request
_AHEAD = 4  # files that are opened while another one is read


@contextlib.contextmanager
def name_damage(uri: str) -> Iterator[None]:
    """Turn the errors that a damaged file raises into a DamageError of one line. Errors of the store stay.

    pyarrow has an OSError of its own, without a number, for a file that is not Parquet.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None or isinstance(error, FileNotFoundError):
            raise
        raise DamageError(_describe(uri, error)) from error
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DamageError(_describe(uri, error)) from error


def _describe(uri: str, error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    printable = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return f"{uri} is damaged: {printable or type(error).__name__}"


@dataclass(frozen=True)
class TableFile:
    """An open Parquet file of an OUTPUT.

    Attributes:
        uri: its location, for messages.
        parquet: the file. Its footer is read.
        schema: the columns that a reader may ask for. A column with another type is cast. An absent column is null.
        num_bytes: size of the file.
    """

    uri: str
    parquet: pq.ParquetFile
    schema: pa.Schema
    num_bytes: int

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """The metadata of the file's schema."""
        return dict(self.parquet.schema_arrow.metadata or {})

    def pieces(self, columns: Sequence[str] | None = None, group: int | None = None) -> Iterator[pa.Table]:
        """Yield the rows in pieces of at most 256 rows and about 16 MB a column; no cell is split.

        Args:
            columns: names of columns in `schema`; None for all.
            group: number of a row group, or None for all.

        Raises:
            DamageError: a column has a type that cannot be cast, or is absent or null where this is not allowed.
        """
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        # a column of a list is none of ours with the same name
        found = {field.name: is_carried(field) for field in self.parquet.schema_arrow}
        known = [field.name for field in schema if found.get(field.name) is is_carried(field)]
        footer = self.parquet.metadata
        with name_damage(self.uri):
            for number in range(footer.num_row_groups) if group is None else [group]:
                rows = footer.row_group(number)
                if not known:  # pyarrow yields nothing then
                    yield complete(pa.table({"": pa.nulls(rows.num_rows)}), schema)
                    continue
                # not the sizes of its columns: pyarrow ends the process if the footer of a column is damaged
                size = max(1, min(_PIECE_ROWS, _PIECE_BYTES // max(1, rows.total_byte_size)))
                for batch in self.parquet.iter_batches(size, [number], known, use_threads=False):
                    yield complete(pa.Table.from_batches([batch]), schema)

    def read(
        self, columns: Sequence[str] | None = None, group: int | None = None, most_bytes: int = _WHOLE_BYTES
    ) -> pa.Table:
        """Return the rows as one table; arguments and errors as for `pieces`.

        A table of more than `most_bytes` must not be larger than four times its file.

        Raises:
            DamageError: it is far larger than its file, so it is no table of a run.
        """
        pieces, num_bytes = [], 0
        for piece in self.pieces(columns, group):
            pieces.append(piece)
            num_bytes += piece.nbytes
            if num_bytes > max(most_bytes, _GROWTH * self.num_bytes):
                raise DamageError(f"{self.uri} is damaged: {self.num_bytes:,} bytes unpack to over {num_bytes:,}")
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.concat_tables(pieces).combine_chunks() if pieces else schema.empty_table()


def open_table(
    uri: str, schema: pa.Schema, patience_s: float = storage.QUICK_S, num_bytes: int | None = _SMALL_BYTES
) -> TableFile:
    """Open a Parquet file of an OUTPUT.

    Args:
        uri: its location.
        schema: as for `TableFile`.
        patience_s: how long a store may be down, in seconds.
        num_bytes: a remote file of more bytes is read by ranges, where they are needed; None: fetch all files whole.

    Raises:
        FileNotFoundError: there is no such file.
        DamageError: it is no Parquet file.
        ResultError: a newer version has written it.
    """
    fs, path = storage.open_uri(uri)
    if storage.is_local(fs):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise DamageError(f"{uri} is damaged: it is no file")
        file: Any = pa.OSFile(path)
        size = file.size()
    elif num_bytes is None:
        data = storage.read_bytes(uri, patience_s)
        file, size = io.BytesIO(data), len(data)
    else:
        file = storage.with_retries(lambda: fs.open(path, "rb"), uri, patience_s)
        if (size := file.size) <= num_bytes:
            file = io.BytesIO(storage.read_bytes(uri, patience_s))
    with name_damage(uri):
        # pre_buffer: see storage.read_table
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        check_format(parquet.schema_arrow, uri)
        return TableFile(uri, parquet, schema, size)


@dataclass(frozen=True)
class Tables:
    """Parquet files of an OUTPUT that have the same columns, in their order.

    Attributes:
        uris: their locations.
        schema: as for `TableFile`.
    """

    uris: Sequence[str]
    schema: pa.Schema

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yield the location of each file with its rows, as `TableFile.pieces`; the next files open in the meantime."""
        opened: deque[tuple[str, Future[TableFile]]] = deque()
        with ThreadPoolExecutor(_AHEAD) as pool:
            for uri in self.uris:
                opened.append((uri, pool.submit(open_table, uri, self.schema)))
                if len(opened) > _AHEAD:
                    yield from _name(*opened.popleft(), columns)
            while opened:
                yield from _name(*opened.popleft(), columns)


def _name(uri: str, opened: Future[TableFile], columns: Sequence[str] | None) -> Iterator[tuple[str, pa.Table]]:
    for piece in opened.result().pieces(columns):
        yield uri, piece
