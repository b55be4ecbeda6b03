"""Types of columns that travel from a list into the results of a run; `vlsm.archive.carried` has the rule."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from vlsm.archive.text_tables import read_records
from vlsm.errors import ManifestError

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
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_timestamp(kind):
        moment = pa.timestamp("us", kind.tz)
        try:
            pa.scalar(0, moment).as_py()
        except (pa.ArrowException, ValueError, LookupError, OSError):  # a time zone that nobody knows
            return None
        return moment
    return next((target for is_such, target in _CHANGED if is_such(kind)), None)


def types_of_records(text: IO[str], uri: str) -> Iterator[tuple[str, pa.DataType | None]]:
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


def unite(name: str, found: Sequence[tuple[str, pa.DataType | None]]) -> pa.DataType:
    """Return the type that holds the values of a column in all files. A column without any value is text.

    Raises:
        ManifestError: there is none.
    """
    united = pa.null()
    for file, kind in found:
        try:
            schemas = [pa.schema([("x", each)]) for each in (united, kind)]
            united = pa.unify_schemas(schemas, promote_options="permissive").field("x").type
        except pa.ArrowException as error:
            raise ManifestError(
                f"{file}: column {name!r} has the type {kind}, and {united} in the files before; leave it out with the "
                "setting carry"
            ) from error
    return pa.string() if pa.types.is_null(united) else united
