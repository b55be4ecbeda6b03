"""Columns of a list that travel with its images into the results of a run: the setting `carry`.

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.columns import CARRIED, Columns, normalize, shorten
from vlsm.archive.text_tables import open_text, read_header, read_records
from vlsm.cells import INDEX_COLUMNS
from vlsm.errors import ManifestError
from vlsm.images.formats import file_name
from vlsm.images.parquet import PARQUET_ERRORS
from vlsm.limits import MAX_CARRIED_BYTES, MAX_CARRIED_COLUMNS
from vlsm.shown import public_uri

logger = logging.getLogger("vlsm")

READ = ("image_uri", "image_id", "selector", "prompt", "prompts", "size_bytes", "etag", "mtime")  # by the run itself
_PREFIX = "list_"
_MAX_NAME_BYTES = 255
_RUN = {"image_id", "prompt", "kind", "mask_rle"}  # a list with these columns is made of rows of a run
_SHOWN = 20  # columns that a line of the log names

Types = dict[str, pa.DataType | None]  # the further columns of a list file; None: it does not travel


class Carry(NamedTuple):
    """What shall travel: names of columns or "all", and names that results have already."""

    columns: Literal["all"] | tuple[str, ...]
    reserved: Collection[str] = ()


@dataclass(frozen=True)
class Carried:
    """The columns that travel.

    Attributes:
        sources: the name of each column in the list, by its name in the results.
        type: a struct of their values, with the names in the results.
    """

    sources: dict[str, str]
    type: pa.StructType

    def find(self, names: Sequence[str]) -> dict[str, int]:
        """Return the positions of these columns in a header or in the keys of a record, by their marked names."""
        places = {name.strip(" "): position for position, name in enumerate(names)}
        return {f"{CARRIED}{name}": places[source] for name, source in self.sources.items() if source in places}

    def cast(self, name: str, column: pa.Array) -> pa.Array:
        """Return the column of a Parquet file in its type here; a dictionary of texts stays one."""
        kind = self.type.field(name.removeprefix(CARRIED)).type
        is_text = pa.types.is_dictionary(column.type) and pa.types.is_string(kind)
        return column if is_text else column.cast(kind, safe=not pa.types.is_temporal(kind))  # below microseconds

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
) -> Carried | None:
    """Return the columns of a list that travel, or None if there are none. The headers of all files are read.

    Args:
        uri: the list, for messages.
        files: its files.
        chosen: the setting `columns`.
        partition: columns that the folders of the files state.
        carry: what shall travel.
        allow: the setting `run.allow`.

    Raises:
        ManifestError: as for `vlsm.archive.tables.read_manifest_rows`; a column that `carry` names is absent or cannot
            travel; there are too many; or the files of the list have it in types that do not fit.
    """
    found: Types = {}
    for file in files:
        for name, kind in _read_types(file, chosen, carry, allow).items():
            found[name] = _unite(found[name], kind, f"{file}: column {name!r}") if name in found else kind
    found = _further(uri, [(name, pa.string()) for name in partition], chosen, carry) | found
    fitting = [name for name, kind in found.items() if kind is not None]
    if carry.columns == "all":
        if left_out := [name for name in found if name not in fitting]:
            logger.info("%s: columns that cannot travel into the masks: %s", uri, _join(left_out))
        names = fitting
    else:
        names = [_choose(name, found, uri) for name in dict.fromkeys(carry.columns)]
    if len(names) > MAX_CARRIED_COLUMNS:
        raise ManifestError(
            f"{uri} has {len(names):,} further columns; {MAX_CARRIED_COLUMNS} are the most that travel; {_hint(names)}"
        )
    if not names:
        return None
    sources = _name_columns(names, carry.reserved)
    logger.info("%s: columns that travel into the masks (setting carry): %s", uri, _join(list(sources)))
    return Carried(
        sources, pa.struct([pa.field(name, _with_values(found[source])) for name, source in sources.items()])
    )


def _with_values(kind: pa.DataType | None) -> pa.DataType:
    """Return the type of a column; one without any value is text."""
    return pa.string() if kind is None or pa.types.is_null(kind) else kind


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _hint(names: Iterable[str]) -> str:
    few = [name for name in names if name.isidentifier()][:2] or ["NAME"]
    return f"--set 'carry=[{', '.join(few)}]' chooses columns"


def _choose(name: str, found: Types, uri: str) -> str:
    """Return the column of a list that `carry` names: it is compared as all columns are."""
    same = [each for each in found if each == name] or [each for each in found if normalize(each) == normalize(name)]
    if len(same) != 1:
        raise ManifestError(f"carry names {name!r}; the further columns of {uri} are: {_join(list(found)) or 'none'}")
    if found[same[0]] is None:
        raise ManifestError(
            f"carry names {name!r}, a column of {uri} that cannot travel: each cell must hold one text, number, truth "
            "value, date or time, and no other column may have its name"
        )
    return same[0]


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
                        pairs = list(_types_of_records(text, uri))
                    else:
                        pairs = [(name, pa.string()) for name in read_header(text, uri, Columns(chosen))[0]]
    except (*PARQUET_ERRORS, csv.Error, EOFError, zlib.error) as error:
        raise ManifestError(f"{uri} cannot be read as a manifest: {error}") from error
    return _further(uri, pairs, chosen, carry)


def _further(
    uri: str, pairs: Sequence[tuple[str, pa.DataType | None]], chosen: Mapping[str, str], carry: Carry
) -> Types:
    """Return the columns that the run does not read itself. None of a name that stands twice, or is none, travels."""
    names = [name for name, _ in pairs]
    places = Columns(chosen).find(names, uri)
    read = {position for known, position in places.items() if known in READ}
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


_KEPT = (
    *(pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_float32, pa.types.is_float64),
    *(pa.types.is_decimal128, pa.types.is_decimal256),
)
_CHANGED = (
    *((is_text, pa.string()) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)),
    *((pa.types.is_float16, pa.float32()), (pa.types.is_date, pa.date32()), (pa.types.is_time, pa.time64("us"))),
)


def travelling_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type in which a column of a Parquet file travels, or None if it does not."""
    if pa.types.is_dictionary(kind):
        return travelling_type(kind.value_type)
    if any(is_kept(kind) for is_kept in _KEPT):
        return kind
    if pa.types.is_timestamp(kind):
        moment = pa.timestamp("us", kind.tz)
        try:
            pa.scalar(0, moment).as_py()
        except (pa.ArrowException, ValueError, LookupError, OSError):  # a time zone that nobody knows
            return None
        return moment
    return next((target for is_such, target in _CHANGED if is_such(kind)), None)


def _types_of_records(text: Any, uri: str) -> Iterator[tuple[str, pa.DataType | None]]:
    """Yield the columns of a JSON Lines file with their types."""
    kinds: dict[str, set[str]] = {}
    for _, _, record in read_records(text, uri):
        for name, value in record.items():
            kinds.setdefault(name, set()).add(_kind(value))
    for name, found in kinds.items():
        found.discard("null")
        yield name, None if "nested" in found else _JSON.get(frozenset(found), pa.string())


_JSON = {
    frozenset(): pa.null(),
    frozenset({"bool"}): pa.bool_(),
    frozenset({"whole"}): pa.int64(),
    frozenset({"number"}): pa.float64(),
    frozenset({"whole", "number"}): pa.float64(),
}


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "whole" if abs(value) < 1 << 63 else "text"
    return {type(None): "null", bool: "bool", float: "number", str: "text"}.get(type(value), "nested")


def _unite(one: pa.DataType | None, other: pa.DataType | None, what: str) -> pa.DataType | None:
    """Return the type that holds the values of two files of a list.

    Raises:
        ManifestError: there is none; `what` names the column.
    """
    if one is None or other is None or one == other:
        return one and other
    try:
        schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException as error:
        raise ManifestError(
            f"{what} has the type {other}, and {one} in the files before; leave it out with the setting carry"
        ) from error
