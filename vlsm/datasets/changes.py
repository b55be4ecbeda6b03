"""What has changed in the data of a run since the run was planned: its records, and the contents of their files.

A file whose version (its etag, or its size and time) is as recorded is unchanged; a listing of the folders tells. Files
with another version are read again, and their contents decide: a copy with a new time is the same file.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from vlsm import storage
from vlsm.datasets.inspection import Facts, records_from_table
from vlsm.datasets.records import Record, locations_of
from vlsm.shown import public_uri
from vlsm.words import count

_SHOWN = 3  # names in a phrase
_COLUMNS = ("image_version", "mask_version")

Inspect = Callable[[Sequence[Record]], list[Facts]]
Versions = tuple[str | None, str | None]  # of the image, and of all masks of the record


def list_versions(records: Sequence[Record]) -> list[Versions]:
    """Return the versions of the files of each record; None where the store has none. It lists their folders."""
    folders: dict[str, dict[str, str]] = {}

    def version_of(uri: str) -> str:
        if public_uri(uri) != uri:  # a signature is for one file: its folder cannot be listed
            return ""
        folder, _, name = uri.rpartition("/")
        if folder not in folders:
            try:
                folders[folder] = storage.list_versions(folder)
            except (OSError, ValueError, NotImplementedError):  # a store that lists nothing, or not for this user
                folders[folder] = {}
        return folders[folder].get(name, "")

    return [
        (version_of(record.image_uri) or None, " ".join(map(version_of, record.mask_uris)) or None)
        for record in records
    ]


def add_versions(table: pa.Table, versions: Sequence[Versions]) -> pa.Table:
    """Return a table of examples with the columns `image_version` and `mask_version`."""
    for position, name in enumerate(_COLUMNS):
        table = table.append_column(name, pa.array([pair[position] for pair in versions], pa.string()))
    return table


def describe_changed_records(table: pa.Table, records: Sequence[Record]) -> list[str]:
    """Return phrases about records that were added, removed or changed. Their order is of no importance.

    Args:
        table: the table of examples of the run, with versions; one without, of an earlier version, is not compared.
        records: the records as they are read now. One without a split is not compared by its split.
    """
    if not is_comparable(table):
        return []
    now, before = _group_by_files(records), _group_by_files(records_from_table(table))
    added, removed, changed = list[str](), list[str](), list[str]()
    for key in now.keys() | before.keys():
        is_split = all(record.split for record in now[key])
        new, old = (Counter(_content_of(record, is_split) for record in group[key]) for group in (now, before))
        num_new, num_old = (new - old).total(), (old - new).total()
        name = f"{key[1]} in {key[0]}"
        changed += [name] * min(num_new, num_old)
        added += [name] * (num_new - num_old)
        removed += [name] * (num_old - num_new)
    kinds = {"added": added, "removed": removed, "with another prompt, split, group or label": changed}
    return [_phrase("record", kind, names) for kind, names in kinds.items() if names]


def describe_changed_files(table: pa.Table, inspect: Inspect) -> list[str]:
    """Return a phrase about files with another content, or none. Only files with another version are read.

    Args:
        table: as for `describe_changed_records`.
        inspect: returns the facts of records.
    """
    if not is_comparable(table):
        return []
    records = records_from_table(table)
    stored = table.select([*_COLUMNS, "error", "image_sha256", "mask_sha256"]).to_pylist()
    now = list_versions(records)
    doubtful = [index for index, row in enumerate(stored) if tuple(row[name] for name in _COLUMNS) != now[index]]
    if not doubtful:
        return []
    facts = inspect([records[index] for index in doubtful])
    names = []
    for index, fact in zip(doubtful, facts, strict=True):
        row, record = stored[index], records[index]
        before = (row["error"] is None, row["image_sha256"], row["mask_sha256"])
        if (fact.error is None, fact.image_sha256, fact.mask_sha256) != before:
            names.append(fact.error or f"{record.image_uri} or its mask in {record.dataset}")
    return [_phrase("file", "with another content", names)] if names else []


def renew_signatures(records: Sequence[Record], current: Iterable[Record]) -> list[Record]:
    """Return the records of a run with the locations that its datasets give them now: signatures expire."""
    now = {public_uri(uri): uri for record in current for uri in locations_of(record)}
    return [
        replace(
            record,
            image_uri=now.get(public_uri(record.image_uri), record.image_uri),
            mask_uri=now.get(public_uri(record.mask_uri), record.mask_uri),
            more_masks=tuple(now.get(public_uri(uri), uri) for uri in record.more_masks),
        )
        for record in records
    ]


def is_comparable(table: pa.Table) -> bool:
    """Return whether a table of examples has the versions of the files."""
    return set(_COLUMNS) <= set(table.column_names)


def _phrase(what: str, kind: str, names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{count(len(names), what)} {kind} ({shown})"


def _group_by_files(records: Iterable[Record]) -> defaultdict[tuple[Any, ...], list[Record]]:
    groups = defaultdict[tuple[Any, ...], list[Record]](list)
    for record in records:
        masks = (public_uri(record.mask_uri), record.mask_selector, tuple(map(public_uri, record.more_masks)))
        groups[record.dataset, public_uri(record.image_uri), record.image_selector, *masks].append(record)
    return groups


def _content_of(record: Record, is_split: bool) -> str:
    """Return a text that is equal for equal records, wherever they stand in their lists."""
    plain = replace(record, where="", split=record.split if is_split else "", prompts={})
    plain = replace(plain, image_uri="", mask_uri="", more_masks=())  # as in the key of the group
    return f"{plain} {sorted(record.prompts.items())}"
