"""Marks of a reviewer: accept, redo or reject for masks of one segment run, as the report of the run saves them.

- **accept**: the mask is good.
- **redo**: the image is good, but its mask must be made again.
- **reject**: the image is of no use. Scores and training lists leave it out, whatever its prompts are.

A CSV file has the columns of MARKS_SCHEMA; cells are as `vlsm.cells` writes them. A JSON file is
`{"kind": "vlsm.marks", "run_id": ..., "marks": [{"image_id": ..., "prompt": ..., "mark": ..., "time": ...,
"mask_digest": ...}]}`. All marks of a file are of one run, and no mask is marked twice.
"""

import csv
import datetime
import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlsm import storage
from vlsm.cells import read_cell
from vlsm.documents import parse_json
from vlsm.errors import ConfigError
from vlsm.limits import MAX_NAME_BYTES

ACCEPT, REDO, REJECT = MARKS = ("accept", "redo", "reject")
RUN_ID = r"[0-9A-Za-z_-]{1,64}"
MARKS_KIND = "vlsm.marks"
MAX_MARKS, MAX_MARKS_BYTES = 1_000_000, 1 << 28
# one row per mask; mask_digest tells a mask from one that was made later, see `digest_mask`
MARKS_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("mark", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC")),
        pa.field("mask_digest", pa.string()),
    ]
)
_OPTIONAL = {"time", "mask_digest"}
_DIGEST = r"[0-9a-f]{16}"


def read_marks(uri: str) -> pa.Table:
    """Return the marks of a reviewer, a table with the columns of MARKS_SCHEMA and at least one row.

    Args:
        uri: a .csv or .json file, local or on an object store. `time` and `mask_digest` may be absent or empty.

    Raises:
        ConfigError: the file cannot be read, or is no such file; the message names the row.
    """
    if (ending := uri.rpartition(".")[2].lower()) not in ("csv", "json"):
        raise ConfigError(f"marks {uri!r} must be a .csv or .json file, as the report of a segment run saves it")
    with storage.name_errors("marks", uri):
        data = storage.read_bytes(uri, max_bytes=MAX_MARKS_BYTES)
    if len(data) > MAX_MARKS_BYTES:
        raise ConfigError(f"marks {uri!r} is longer than {MAX_MARKS_BYTES:,} bytes, which are the most")
    marks, known = list[dict[str, Any]](), set[tuple[str, str]]()
    for number, cells in enumerate(_read_csv(uri, data) if ending == "csv" else _read_json(uri, data), start=1):
        if number > MAX_MARKS:
            raise ConfigError(f"marks {uri!r} has more than {MAX_MARKS:,} marks, which are the most")
        try:
            marks.append(_read_mark(cells))
            _check_once(marks[0], marks[-1], known)
        except ValueError as error:
            raise ConfigError(f"marks {uri!r}, mark {number}: {error}") from None
    if not marks:
        raise ConfigError(f"marks {uri!r} has no mark")
    return pa.Table.from_pylist(marks, schema=MARKS_SCHEMA)


def digest_mask(mask_rle: str | None) -> str:
    """Return 16 hex digits that tell a mask from a later one of the same image and prompt; "" for no mask."""
    return hashlib.sha256(mask_rle.encode()).hexdigest()[:16] if isinstance(mask_rle, str) else ""


def rejected_images(marks: pa.Table) -> set[str]:
    """Return the image_ids of the images that have the mark `reject` for any prompt."""
    return set(marks.filter(pc.equal(marks["mark"], REJECT))["image_id"].to_pylist())


def _read_csv(uri: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the cells of each row of a CSV file, with the texts that they stand for."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"marks {uri!r} is no text in UTF-8: {error.reason}") from None
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        names = next(rows, [])
        _check_names(uri, names)
        for number, row in enumerate(rows, start=1):
            if not row:  # an empty line
                continue
            if len(row) != len(names):
                raise ConfigError(f"marks {uri!r}, mark {number}: {len(row)} cells; the header has {len(names)}")
            yield dict(zip(names, map(read_cell, row), strict=True))
    except csv.Error as error:
        raise ConfigError(f"marks {uri!r} is no CSV file: {error}") from None


def _check_names(uri: str, names: list[str]) -> None:
    known = set(MARKS_SCHEMA.names)
    if len(set(names)) < len(names) or not known - _OPTIONAL <= set(names) <= known:
        columns = ", ".join(names)[:200] or "none"
        raise ConfigError(f"marks {uri!r} has the columns {columns}; it must have {', '.join(MARKS_SCHEMA.names)}")


def _read_json(uri: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the members of each mark of a JSON file."""
    tree = parse_json(data, f"marks {uri!r}", ConfigError)
    if not isinstance(tree, dict) or tree.get("kind") != MARKS_KIND or not isinstance(tree.get("marks"), list):
        raise ConfigError(f'marks {uri!r} must be {{"kind": "{MARKS_KIND}", "run_id": ..., "marks": [...]}}')
    for mark in tree["marks"]:
        yield {"run_id": tree.get("run_id")} | mark if isinstance(mark, dict) else {}


def _read_mark(cells: dict[str, Any]) -> dict[str, Any]:
    """Return a checked row of MARKS_SCHEMA. Raise a ValueError if a value is wrong."""
    if unknown := cells.keys() - set(MARKS_SCHEMA.names):
        raise ValueError(f"unknown member {min(unknown)[:80]!r}")
    for name in ("run_id", "image_id", "prompt", "mark"):
        if not isinstance(cells.get(name), str):
            raise ValueError(f"{name} is {_brief(cells.get(name))}; it must be a text")
    if not re.fullmatch(RUN_ID, cells["run_id"], re.ASCII):
        raise ValueError(f"run_id is {_brief(cells['run_id'])}, which is no id of a run")
    if not 1 <= _num_bytes(cells["image_id"]) <= MAX_NAME_BYTES:
        raise ValueError(f"image_id is {_brief(cells['image_id'])}; it must have 1 to {MAX_NAME_BYTES:,} bytes")
    if _num_bytes(cells["prompt"]) > MAX_NAME_BYTES:
        raise ValueError(f"prompt is {_brief(cells['prompt'])}; it must have at most {MAX_NAME_BYTES:,} bytes")
    if cells["mark"] not in MARKS:
        raise ValueError(f"mark is {_brief(cells['mark'])}; it must be {', '.join(MARKS[:-1])} or {MARKS[-1]}")
    return cells | {"time": _read_time(cells.get("time")), "mask_digest": _read_digest(cells.get("mask_digest"))}


def _read_digest(text: Any) -> str | None:
    if text in (None, ""):
        return None
    if not isinstance(text, str) or not re.fullmatch(_DIGEST, text):
        raise ValueError(f"mask_digest is {_brief(text)}; it must have 16 hex digits")
    return text


def _read_time(text: Any) -> datetime.datetime | None:
    if text in (None, ""):
        return None
    try:
        time = datetime.datetime.fromisoformat(text)
        return time.astimezone(datetime.UTC) if time.tzinfo else time.replace(tzinfo=datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"time is {_brief(text)}; it must be a time such as 2026-01-02T03:04:05Z") from None


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))  # a lone surrogate, which is no text, is a ValueError


def _check_once(first: dict[str, Any], mark: dict[str, Any], known: set[tuple[str, str]]) -> None:
    if mark["run_id"] != first["run_id"]:
        raise ValueError(f"run_id is {mark['run_id']!r}, but the first mark is of run {first['run_id']!r}")
    key = mark["image_id"], mark["prompt"]
    if key in known:
        raise ValueError(f"{_brief(key[0])} with the prompt {_brief(key[1])} has a mark already")
    known.add(key)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
