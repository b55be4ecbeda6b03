"""Images inside Parquet files: a column of bytes, one image per row, with the selector "row=17".

Hubs of datasets write a struct of bytes and path, img2dataset writes the bytes in a column `jpg`, Spark in `content`.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlsm.errors import ImageError
from vlsm.images.fetch import WatchedFile
from vlsm.images.formats import FORMATS, HEAD_BYTES, Look, kind_of, sniff_kind
from vlsm.limits import MAX_CELL_BYTES, MAX_IMAGES

PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeError, OverflowError)  # of a damaged file

_IMAGE_NAMES = ("image", "img", "image_bytes", "bytes", "content")
_PATH_NAMES = ("path", "file_name", "filename")  # beside a binary column; a struct has its own field `path`
_BATCH_ROWS, _BATCH_BYTES = 8, 1 << 28  # at most, of images that are unpacked at once
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of BigTIFF as well


def find_image_column(schema: pa.Schema, chosen: str | None = None) -> str | None:
    """Return the name of the column that holds images, or None if a Parquet file holds no images.

    It is a struct with the field `bytes`, or a binary column whose name is image, img, image_bytes, bytes, content or
    the ending of an image file (jpg, png, dcm). If there are several, it is the one named image.

    Args:
        schema: of the file.
        chosen: the column that the setting `columns.image` names. It may have any name.

    Raises:
        ImageError: there are several columns, or the chosen one is absent or holds no bytes.
    """
    if chosen is not None:
        holders = [field.name for field in schema if _holds_bytes(field.type)]
        if holders.count(chosen) != 1:
            known = ", ".join(holders) or "none"
            raise ImageError("unreadable", f"columns.image is {chosen!r}; the columns with bytes are: {known}")
        return chosen
    names = list_image_columns(schema)
    wanted = names if len(names) == 1 else [name for name in names if name.lower() == "image"]
    if names and len(wanted) != 1:
        raise ImageError(
            "unreadable",
            f"it has images in the columns {', '.join(names)}; --set columns.image={names[0]} chooses one",
        )
    return wanted[0] if wanted else None


def list_image_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that hold images, by their type and name; see `find_image_column`."""
    return [
        field.name
        for field in schema
        if _holds_bytes(field.type) and (pa.types.is_struct(field.type) or _is_image_name(field.name))
    ]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        # null: every row has only a path; each says so when it is read
        return index >= 0 and (_holds_bytes(inner := kind.field(index).type) or pa.types.is_null(inner))
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image_name(name: str) -> bool:
    return name.lower() in _IMAGE_NAMES or _format_of_column(name) is not None


def _format_of_column(column: str) -> str | None:
    """Return the kind of the images in a column that is named after the ending of a file."""
    kind = kind_of(f"x.{column}")
    return kind if kind in FORMATS else None


def kind_by_name(column: str | None, path: str | None) -> str | None:
    """Return the kind of an image by the path that its row states, or by the name of the column: a key of FORMATS.

    None if neither states a format. Only the bytes can then tell it.
    """
    kinds = (kind_of(path) if isinstance(path, str) else None, _format_of_column(column or ""))
    return next((kind for kind in kinds if kind in FORMATS), None)


def kind_by_bytes(data: bytes, name: str) -> str:
    """Return the kind of an image whose row states no format.

    Raises:
        ImageError: the bytes hold several images. The plan has one row for them, because it was made by the names.
    """
    kind = "tiff" if data.startswith(_TIFF_HEADS) else sniff_kind(data[:HEAD_BYTES]) or "image"
    if kind != "image":
        selectors, _ = FORMATS[kind].load().list_images(io.BytesIO(data), name, len(data), Look())
        if len(selectors) > 1:
            raise ImageError(
                "unreadable", f"{name} holds {len(selectors):,} images ({kind}); its path must end as such a file does"
            )
    return kind


class ParquetImages:
    """Reads the images of a Parquet file by their rows. Going forward, each row group is unpacked once, in batches.

    Args:
        file: the opened file.
        chosen: as for `find_image_column`.

    Attributes:
        schema: of the file.
        column: the column with the images, or None.
        num_rows: number of rows of the file.

    Raises:
        ImageError: as for `find_image_column`; or the file is damaged, here and in every method.
        OSError: the store fails, here and in every method.
    """

    def __init__(self, file: BinaryIO, chosen: str | None = None) -> None:
        # buffered, not pre-buffered: a row group may be larger than the memory
        self._file = WatchedFile(file)
        with self._damage("the file"):
            self._parquet = pq.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False)
            self.schema = self._parquet.schema_arrow
        self.column = find_image_column(self.schema, chosen)
        metadata = self._parquet.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.num_rows = sum(counts)
        if self.column is not None and self.num_rows > MAX_IMAGES:
            raise ImageError("too_large", f"the file has {self.num_rows:,} rows; {MAX_IMAGES:,} are the most")
        self._bytes_leaf, self._path_leaf = self._leaves()
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: list[pa.Array] = []  # of the bytes, and of the paths
        self._group = -1  # the row group that is being read
        self._first = self._end = 0  # the rows of the batch

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Turn the errors of pyarrow into an ImageError. Errors of the store stay: pyarrow has OSErrors of its own."""
        try:
            yield
        except PARQUET_ERRORS as error:
            if self._file.error is not None:
                raise self._file.error from None
            raise ImageError("corrupt", f"{name} cannot be read as Parquet: {error}") from error

    def _leaves(self) -> tuple[str, str | None]:
        """Return the Parquet columns of the bytes and of the paths."""
        if self.column is None:
            return "", None
        kind = self.schema.field(self.column).type
        if pa.types.is_struct(kind):
            has_path = kind.get_field_index("path") >= 0
            return f"{self.column}.bytes", f"{self.column}.path" if has_path else None
        return self.column, next((name for name in _PATH_NAMES if name in self.schema.names), None)

    def read_cells(
        self, columns: list[str], convert: Callable[[int, pa.Array], list[Any]] | None = None, batch_rows: int = 4096
    ) -> Iterator[tuple[str | None, tuple[Any, ...]]]:
        """Yield the path of each image, and the values of some columns in its row. No bytes of images are read.

        Args:
            columns: their names.
            convert: returns the cells of a column, by its position among these; None for `read_texts`. It may raise an
                error of its own.
            batch_rows: rows whose cells are in memory at once.
        """
        leaves = list(dict.fromkeys([*columns, *([self._path_leaf] if self._path_leaf else [])]))
        if not leaves:
            yield from ((None, ()) for _ in range(self.num_rows))
            return
        with self._damage("the file"):
            texts = open_texts(self._file, self._parquet, leaves)
        batches = texts.iter_batches(batch_size=batch_rows, columns=leaves)
        while (batch := self._next(batches, "the file")) is not None:
            with self._damage("the file"):
                paths = read_texts(_values(batch, self._path_leaf)) if self._path_leaf else [None] * len(batch)
                read = convert or (lambda _, column: read_texts(column))
                cells = [read(position, batch.column(name)) for position, name in enumerate(columns)]
            yield from zip(paths, zip(*cells, strict=True) if cells else [()] * len(batch), strict=True)

    def _next(self, batches: Iterator[pa.RecordBatch], name: str) -> pa.RecordBatch | None:
        with self._damage(name):
            return next(batches, None)

    def read(self, row: int, name: str) -> tuple[bytes, str | None]:
        """Return the bytes and the path of the image in a row, counted from 0; `name` is for messages.

        Raises:
            ImageError: there is no such row, or it has no bytes.
        """
        if self.column is None or row >= self.num_rows:
            raise ImageError("missing", f"there is no {name}: the file has {self.num_rows:,} rows with images")
        leaves = [leaf for leaf in (self._bytes_leaf, self._path_leaf) if leaf]
        group = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        if group != self._group or row < self._first:
            self._group = group
            self._first = self._end = start
            self._batches = self._parquet.iter_batches(self._batch_rows(group), row_groups=[group], columns=leaves)
        while row >= self._end:
            if (batch := self._next(self._batches, name)) is None:
                raise ImageError("corrupt", f"{name} is behind the end of its row group")
            self._batch = [_values(batch, leaf) for leaf in leaves]
            self._first, self._end = self._end, self._end + len(batch)
        data, *paths = (values[row - self._first].as_py() for values in self._batch)
        if not data:
            only = f", only the path {paths[0]!r}; a list with image_uri can name it" if paths and paths[0] else ""
            raise ImageError("empty", f"{name} has no bytes in the column {self.column}{only}")
        return data, paths[0] if paths else None

    def _batch_rows(self, group: int) -> int:
        """Return how many images of a row group are unpacked at once.

        Each row of a dictionary can repeat an image that is as large as the group. Whether there is one is not asked:
        pyarrow ends the process if the footer of a column is damaged.
        """
        is_small = self._parquet.metadata.row_group(group).total_byte_size * _BATCH_ROWS <= _BATCH_BYTES
        return _BATCH_ROWS if is_small else 1


def open_texts(file: Any, opened: pq.ParquetFile, columns: list[str]) -> pq.ParquetFile:
    """Return a Parquet file again, with columns of texts as dictionaries, for `read_texts`.

    A text of megabytes that stands in every row takes its place in the file once, and would be unpacked for each row.
    """
    schema = opened.metadata.schema
    leaves = Counter(schema.column(number).path for number in range(len(schema)))  # a flat a.b beside a struct: two
    flat = {name for name in opened.schema_arrow.names if "." in name}  # a name may have a dot
    texts = [column for column in columns if leaves[column] == 1 and ("." not in column or column in flat)]
    return pq.ParquetFile(file, metadata=opened.metadata, read_dictionary=texts, buffer_size=1 << 20, pre_buffer=False)


def read_texts(column: pa.Array) -> list[Any]:
    """Return the cells of a column.

    Raises:
        OverflowError: a text has more than MAX_CELL_BYTES.
    """
    stored = column.dictionary if pa.types.is_dictionary(column.type) else column
    stored = stored.flatten() if pa.types.is_list(stored.type) else stored
    if pa.types.is_string(stored.type) or pa.types.is_binary(stored.type) or pa.types.is_large_string(stored.type):
        longest = pc.max(pc.binary_length(stored)).as_py() or 0
        if longest > MAX_CELL_BYTES:
            raise OverflowError(f"a text has {longest:,} bytes; {MAX_CELL_BYTES:,} are the most")
    cells: list[Any] = column.to_pylist()
    return cells


def _values(batch: pa.RecordBatch, leaf: str) -> pa.Array:
    """Return a column of a batch, or the field of a struct that a name such as "image.bytes" means."""
    column, _, name = leaf.rpartition(".")
    # a flat column can be named "image.bytes" too
    if column not in batch.schema.names or not pa.types.is_struct(batch.schema.field(column).type):
        return batch.column(leaf)
    return pc.struct_field(batch.column(column), name)  # null where the struct is null
