"""Columns of a list that travel with its images into the results of a run: the setting `carry`.

Parquet files with images in them are a list as well, of the images in their rows.

**Which columns.** All that the run does not read itself, if each cell holds one value: a text, a number, true or false,
a date or a time. Lists, structs and bytes do not travel; the log names them. A list made of rows of a run, or the index
of an export, gives only the columns that are not ours.

**Types.** A column of Parquet keeps its type; texts are one type, times have microseconds. A column of CSV and TSV is
text, also where it looks like a number: 007 stays 007. A column of JSON Lines is true or false, whole numbers, numbers
or texts, if all its values are; else it is text. Cells that mean no value (`vlsm.archive.columns`) are null.

**Names.** As in the list. A name that results have already, in any case of its letters, gets `list_` in front.

**Limits.** MAX_CARRIED_COLUMNS, and MAX_CARRIED_BYTES for all values of an image. Beyond a limit, and if a column that
`carry` names cannot travel, the command ends before any work, with the setting that helps.
"""

import csv
import json
import logging
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.column_types import travelling_type, types_of_records, unite
from vlsm.archive.columns import CARRIED, Columns, normalize, shorten
from vlsm.archive.text_tables import open_text, read_header
from vlsm.cells import INDEX_COLUMNS
from vlsm.errors import ImageError, ManifestError
from vlsm.images.formats import file_name
from vlsm.images.parquet import PARQUET_ERRORS, ParquetImages, read_texts
from vlsm.limits import MAX_CARRIED_BYTES, MAX_CARRIED_COLUMNS
from vlsm.shown import public_uri

logger = logging.getLogger("vlsm")

READ = ("image_uri", "image_id", "selector", "prompt", "prompts", "size_bytes", "etag", "mtime")  # by the run itself
STATED = ("image_id", "prompt", "prompts")  # of these, by Parquet files for the images in them
_PREFIX = "list_"
_MAX_NAME_BYTES = 255
_RUN = {"image_id", "prompt", "kind", "mask_rle"}  # a list with these columns is made of rows of a run
CARRIED_ROWS = 256  # of a batch of a Parquet file: 100 columns of texts of 8,192 bytes are 210 MB
_AHEAD = 16  # headers that are read in parallel
_SHOWN, _SHOWN_LETTERS = 20, 60  # columns that a message names, and letters of each

Types = dict[str, pa.DataType | None]  # the further columns of a list file; None: it does not travel


class Carry(NamedTuple):
    """What shall travel: names of columns or "all", names that results have already, and whether some may be absent."""

    columns: Literal["all"] | tuple[str, ...]
    reserved: Collection[str] = ()
    may_lack: bool = False


@dataclass(frozen=True)
class Carried:
    """The columns that travel.

    Attributes:
        sources: the name of each column in the list, by its name in the results.
        type: a struct of their values, with the names in the results.
        folder: folders below this one state columns.
    """

    sources: dict[str, str]
    type: pa.StructType
    folder: str = ""

    def find(self, names: Sequence[str]) -> dict[str, int]:
        """Return the positions of these columns in a header or in the keys of a record, by their marked names."""
        places = {name.strip(" "): position for position, name in enumerate(names)}
        return {f"{CARRIED}{name}": places[source] for name, source in self.sources.items() if source in places}

    def cast(self, name: str, column: pa.Array) -> pa.Array:
        """Return the column of a Parquet file in its type here; a dictionary of texts stays one."""
        kind = self.type.field(name.removeprefix(CARRIED)).type
        if pa.types.is_dictionary(column.type) and pa.types.is_string(kind):
            return column
        if not pa.types.is_temporal(kind):
            return column.cast(kind)
        cast = pc.cast(column, options=pc.CastOptions(kind, allow_time_truncate=True))  # what is below microseconds
        try:
            cast.to_pylist()
        except (ValueError, OverflowError) as error:
            raise OverflowError(f"column {name.removeprefix(CARRIED)!r} has a date that no calendar has") from error
        return cast

    def read(self, name: str, column: pa.Array) -> list[Any]:
        """Return the cells of a column of a Parquet file, by its marked name.

        Raises:
            OverflowError: a text is too long to travel, or a date is in no calendar.
            ArrowException: a value does not fit the type.
        """
        cast = self.cast(name, column)
        stored = cast.dictionary if pa.types.is_dictionary(cast.type) else cast
        if pa.types.is_string(stored.type) and (longest := pc.max(pc.binary_length(stored)).as_py() or 0):
            if longest > MAX_CARRIED_BYTES:  # a text of a dictionary may stand in every row
                source = self.sources[name.removeprefix(CARRIED)]
                raise OverflowError(
                    f"a text of {source!r} has {longest:,} bytes; {MAX_CARRIED_BYTES:,} are the most that travel; "
                    + _hint(each for each in self.sources.values() if each != source)
                )
        return read_texts(cast)

    def collect(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the values that travel from a row with marked names, checked; passwords in locations are left out.

        Raises:
            ManifestError: a text is not valid Unicode or has a NUL, or the values are too long.
        """
        values: dict[str, Any] = {}
        for field in self.type:
            value = row.get(f"{CARRIED}{field.name}")
            if pa.types.is_string(field.type) and value is not None:
                value = public_uri(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                _check_text(value, f"{where}: column {self.sources[field.name]}")
            elif pa.types.is_floating(field.type) and value is not None:
                value = float(value)
            values[field.name] = value
        sizes = Counter({name: len(value.encode()) for name, value in values.items() if isinstance(value, str)})
        if sizes.total() > MAX_CARRIED_BYTES:
            longest = sizes.most_common(1)[0][0]
            raise ManifestError(
                f"{where}: the texts of its further columns have {sizes.total():,} bytes, most of them in "
                f"{self.sources[longest]!r}; {MAX_CARRIED_BYTES:,} are the most; "
                + _hint(source for name, source in self.sources.items() if name != longest)
            )
        return values


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{what}: {shorten(text)} is no Unicode text; write the list as UTF-8, or leave the column out with carry"
        ) from error
    if "\0" in text:
        raise ManifestError(f"{what}: {shorten(text)} has a NUL; leave the column out with carry")


def find_carried(  # noqa: PLR0913 - every property of a list
    uri: str,
    files: Sequence[str],
    chosen: Mapping[str, str],
    partition: Iterable[str],
    carry: Carry,
    allow: tuple[str, ...] = (),
    is_inside: bool = False,
) -> Carried | None:
    """Return the columns of a list that travel, or None if there are none. The headers of all files are read.

    Args:
        uri: the list, for messages.
        files: its files.
        chosen: the setting `columns`.
        partition: columns that the folders of the files state.
        carry: what shall travel.
        allow: the setting `run.allow`.
        is_inside: whether the list is Parquet files with images in them. Then a file that cannot be read has no
            columns: its image fails later.

    Raises:
        ManifestError: as for `vlsm.archive.tables.read_manifest_rows`; a column that `carry` names is absent or cannot
            travel; there are too many; or the files of the list have it in types that do not fit.
    """
    found: dict[str, list[tuple[str, pa.DataType | None]]] = {}  # by name: the files, and the types there
    read_types = partial(_read_inside if is_inside else _read_types, chosen=chosen, carry=carry, allow=allow)
    of_folders = _further(uri, [(name, pa.string()) for name in partition], chosen, carry, is_inside)
    with ThreadPoolExecutor(_AHEAD) as pool:  # stores answer slowly
        types_of_files = list(pool.map(read_types, files))
    for file, types in zip(files, types_of_files, strict=True):
        for name, kind in (types | {name: of_folders[name] for name in of_folders if name not in types}).items():
            if kind not in [known for _, known in found.setdefault(name, [])]:
                found[name].append((file, kind))
    fitting = [name for name, kinds in found.items() if all(kind is not None for _, kind in kinds)]
    if carry.columns == "all":
        if left_out := [name for name in found if name not in fitting]:
            logger.info("%s: columns that cannot travel into the results: %s", uri, _join(left_out))
        names = fitting
    else:
        wanted = [name for name in dict.fromkeys(carry.columns) if not carry.may_lack or _find_same(name, found)]
        names = [_choose(name, list(found), fitting, uri) for name in wanted]
    if len(names) > MAX_CARRIED_COLUMNS:
        raise ManifestError(
            f"{uri} has {len(names):,} further columns; {MAX_CARRIED_COLUMNS} are the most that travel; {_hint(names)}"
        )
    if not names:
        return None
    sources = _name_columns(names, carry.reserved)
    logger.info("%s: columns that travel into the results: %s", uri, _join(list(sources)))
    fields = [pa.field(name, unite(source, found[source])) for name, source in sources.items()]
    return Carried(sources, pa.struct(fields))


def _join(names: Sequence[str]) -> str:
    shown = [name if len(name) < _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..." for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _hint(names: Iterable[str]) -> str:
    few = [name for name in names if name.isidentifier() and len(name) < _SHOWN_LETTERS][:2] or ["NAME"]
    return f"--set 'carry=[{', '.join(few)}]' chooses columns"


def _choose(name: str, found: list[str], fitting: list[str], uri: str) -> str:
    """Return the column of a list that `carry` names: it is compared as all columns are."""
    same = _find_same(name, found)
    if len(same) != 1:
        raise ManifestError(f"carry names {name!r}; the further columns of {uri} are: {_join(found) or 'none'}")
    if same[0] not in fitting:
        raise ManifestError(
            f"carry names {name!r}, a column of {uri} that cannot travel: each cell must hold one text, number, truth "
            "value, date or time, and no other column may have its name"
        )
    return same[0]


def _find_same(name: str, found: Iterable[str]) -> list[str]:
    names = list(found)
    return [each for each in names if each == name] or [each for each in names if normalize(each) == normalize(name)]


def _name_columns(names: Sequence[str], reserved: Collection[str]) -> dict[str, str]:
    """Return the name of each column in the list by its name in the results. DuckDB and others ignore case."""
    taken, sources = {name.lower() for name in reserved}, {}
    for source in names:
        name = source
        while name.lower() in taken:
            name = _PREFIX + name
        taken.add(name.lower())
        sources[name] = source
    return sources


def _read_inside(uri: str, chosen: Mapping[str, str], carry: Carry, allow: tuple[str, ...]) -> Types:
    """Return the types of the further columns of a Parquet file with images. A damaged one has none."""
    fs, path = storage.open_uri(uri, allow)

    def read() -> ParquetImages:
        with fs.open(path, "rb") as file:
            return ParquetImages(file, chosen.get("image"))

    try:
        images = storage.with_retries(read, uri, storage.PATIENT_S)
    except (ImageError, FileNotFoundError, PermissionError):
        return {}
    pairs = [(field.name, travelling_type(field.type)) for field in images.schema if field.name != images.column]
    return _further(uri, pairs, chosen, carry, is_inside=True) if images.column is not None else {}


def _read_types(uri: str, chosen: Mapping[str, str], carry: Carry, allow: tuple[str, ...]) -> Types:
    """Return the types of the further columns of a list file, without blanks around their names."""
    fs, path = storage.open_uri(uri, allow)
    try:
        with fs.open(path, "rb") as file:
            base = file_name(uri)
            if base.endswith(".parquet"):
                schema = pq.read_schema(file)
                pairs = [(field.name, travelling_type(field.type)) for field in schema]
            else:
                with open_text(file, uri) as text:
                    if ".jsonl" in base:
                        pairs = list(types_of_records(text, uri))
                    else:
                        pairs = [(name, pa.string()) for name in read_header(text, uri, Columns(chosen))[0]]
    except (*PARQUET_ERRORS, csv.Error, EOFError, zlib.error) as error:
        raise ManifestError(f"{uri} cannot be read as a manifest: {error}") from error
    return _further(uri, pairs, chosen, carry)


def _further(
    uri: str,
    pairs: Sequence[tuple[str, pa.DataType | None]],
    chosen: Mapping[str, str],
    carry: Carry,
    is_inside: bool = False,
) -> Types:
    """Return the columns that the run does not read itself. None of a name that stands twice, or is none, travels."""
    names = [name for name, _ in pairs]
    columns = Columns(chosen)
    places = columns.find(names, uri)
    read = {position for known, position in places.items() if known in (STATED if is_inside else READ)}
    if not is_inside and "image_uri" not in places and (location := columns.guess_location(names)) is not None:
        read.add(location)
    is_index = tuple(names[: len(INDEX_COLUMNS)]) == INDEX_COLUMNS
    ours = INDEX_COLUMNS if is_index else carry.reserved if set(names) >= _RUN else ()
    counts = Counter(name.strip(" ") for name in names)
    types: Types = {}
    for position, (name, kind) in enumerate(pairs):
        plain = name.strip(" ")
        if position not in read and name not in ours and plain:
            types[plain] = kind if counts[plain] == 1 and _is_name(plain) else None
    return types


def _is_name(name: str) -> bool:
    try:
        return len(name.encode()) <= _MAX_NAME_BYTES and "\0" not in name
    except UnicodeEncodeError:
        return False
