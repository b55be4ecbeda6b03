"""A plan brought up to date with its archive: what is new is added, what changed is planned again, the rest stays."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlsm.runs.plan import ManifestWriter, Plan, cut_shards, read_plan, shard_table

_CHUNK = 10_000  # rows that are looked up at once


@dataclass
class Update:
    """Images that are new, changed (their version, place or prompts) or vanished since the last plan."""

    num_new: int = 0
    num_changed: int = 0
    num_vanished: int = 0


@dataclass
class _Known:
    """The images of a plan, in its order, by digests: 24 bytes an image instead of every row in memory."""

    ids: np.ndarray  # of image_ids
    contents: np.ndarray  # of all that a row of the plan says
    order: np.ndarray  # that sorts ids
    seen: np.ndarray
    changed: dict[int, dict[str, Any]] = field(default_factory=dict)


def update_manifest(output: str, plan: Plan, rows: Iterable[dict[str, Any]], shard_rows: int) -> tuple[Plan, Update]:
    """Write the plan that follows on another when the archive has changed; shards keep their numbers and images.

    An image that is no longer there keeps its place, marked as vanished. Rows that are new are kept in memory until the
    whole archive is listed, some 200 MB a million.

    Args:
        output: the run's output folder.
        plan: the one that counts.
        rows: the archive as it is now, as for `write_manifest`.
        shard_rows: output rows a new shard holds at most.

    Returns:
        The new plan, and what is different; the old plan where nothing is.

    Raises:
        ManifestError: two rows have the same image_id.
    """
    known, update = _index(output, plan), Update()
    new = [shard_table(shard) for shard in cut_shards(_compare(rows, known), shard_rows)]
    update.num_new = sum(map(len, new))
    writer = ManifestWriter(output, kinds=plan.kinds)
    position = 0
    for shard in read_plan(output, plan):
        revised = [_revise(row, position + index, known, update) for index, row in enumerate(shard.to_pylist())]
        position += len(revised)
        writer.add(shard_table(revised))
    for shard in new:
        writer.add(shard)
    return writer.finish(), update


def _index(output: str, plan: Plan) -> _Known:
    ids = np.zeros(plan.num_images, "S16")
    contents = np.zeros(plan.num_images, np.uint64)
    position = 0
    for shard in read_plan(output, plan):
        for row in shard.to_pylist():
            ids[position], contents[position] = _digest_id(row), _digest_content(row)
            position += 1
    return _Known(ids, contents, np.argsort(ids), np.zeros(plan.num_images, bool))


def _compare(rows: Iterable[dict[str, Any]], known: _Known) -> Iterator[dict[str, Any]]:
    """The rows that no one knows; of the others it is noted that they were seen, and which have changed."""
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield from _compare_chunk(chunk, known)
            chunk = []
    yield from _compare_chunk(chunk, known)


def _compare_chunk(rows: list[dict[str, Any]], known: _Known) -> Iterator[dict[str, Any]]:
    wanted = np.array([_digest_id(row) for row in rows], "S16")
    places = np.searchsorted(known.ids, wanted, sorter=known.order)
    for row, digest, place in zip(rows, wanted, places, strict=True):
        position = int(known.order[place]) if place < len(known.order) else -1
        if position < 0 or known.ids[position] != digest or known.seen[position]:  # seen twice: its id is not unique
            yield row
            continue
        known.seen[position] = True
        if known.contents[position] != _digest_content(row):
            known.changed[position] = row


def _revise(row: dict[str, Any], position: int, known: _Known, update: Update) -> dict[str, Any]:
    if not known.seen[position]:
        update.num_vanished += not row["vanished"]
        return row | {"vanished": True}
    update.num_changed += position in known.changed or row["vanished"]
    return known.changed.get(position, row) | {"vanished": False}


def _digest_id(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(row["image_id"].encode(), digest_size=16).digest()


def _digest_content(row: dict[str, Any]) -> int:
    content = repr((row["image_uri"], row["image_version"], row["prompts"], row.get("offset"), row.get("problem")))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
