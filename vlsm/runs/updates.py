"""Updates a plan after its archive has changed: new images are added, changed ones planned again, the rest stays."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vlsm.archive.carried import Carried
from vlsm.runs.carried import CARRIED, cast_carried, plan_schema
from vlsm.runs.plan import Plan, PlanWriter, cut_shards, read_plan
from vlsm.shown import public_uri

_CHUNK = 10_000  # rows per lookup


@dataclass
class Update:
    """Numbers of new, changed and vanished images since the last plan.

    An image has changed if its version, location or prompts have changed, or if it was marked as vanished before. Of an
    image that has not changed, the signature of its location may be another one: it is renewed; and so may be its
    columns of the list: it is relisted. It is segmented for neither.
    """

    num_new: int = 0
    num_changed: int = 0
    num_vanished: int = 0
    num_renewed: int = 0
    num_relisted: int = 0


@dataclass
class _Known:
    """The images of a plan as digests, in the plan's order: 40 bytes per image instead of all rows in memory.

    Attributes:
        ids: digests of the image_ids, (N,) of 16 bytes.
        contents: digests of the columns that make an image a changed one, (N,) uint64.
        locations: digests of the locations with their signatures, (N,) uint64.
        carried: digests of their columns of the list, (N,) uint64.
        order: the permutation that sorts `ids`, (N,).
        seen: whether the archive still has the image, (N,) bool.
        changed: the new row of each changed image, by its position in the plan.
        renewed: the new location of each image that has only another signature, by its position in the plan.
        relisted: the new columns of the list of each image that has not changed otherwise, by its position in the plan.
    """

    ids: np.ndarray
    contents: np.ndarray
    locations: np.ndarray
    carried: np.ndarray
    order: np.ndarray
    seen: np.ndarray
    changed: dict[int, dict[str, Any]] = field(default_factory=dict)
    renewed: dict[int, str] = field(default_factory=dict)
    relisted: dict[int, dict[str, Any]] = field(default_factory=dict)


def update_plan(
    output: str, plan: Plan, rows: Iterable[dict[str, Any]], shard_rows: int, carried: Carried | None = None
) -> tuple[Plan, Update]:
    """Write a new plan for a changed archive; existing shards keep their numbers and images.

    An image that the archive no longer has stays in the plan, marked as vanished. The rows of new images, and new
    values of a list, stay in memory until the whole archive is listed: about 200 MB per million rows.

    Args:
        output: the run's output folder.
        plan: the current plan.
        rows: the archive as it is now, as for `write_plan`.
        shard_rows: most output rows of a new shard.
        carried: columns of a list that travel; the rows have them in `carried`.

    Returns:
        The new plan, and the numbers of new, changed and vanished images.

    Raises:
        ManifestError: two rows have the same image_id, or a column of the list has a type that does not fit the values
            of vanished images.
    """
    columns = None if carried is None else carried.type
    known, update = _index(output, plan, columns), Update()
    writer = PlanWriter(output, kinds=plan.kinds, carried=carried)
    new_shards = [writer.table(shard) for shard in cut_shards(_compare(rows, known), shard_rows)]
    update.num_new = sum(map(len, new_shards))
    position = 0
    for shard in read_plan(output, plan):
        planned = cast_carried(shard, columns).to_pylist()
        revised = [_revise(row, position + index, known, update) for index, row in enumerate(planned)]
        position += len(revised)
        writer.add(writer.table(revised))
    for shard in new_shards:
        writer.add(shard)
    return writer.finish(), update


def _index(output: str, plan: Plan, columns: pa.StructType | None) -> _Known:
    """Return the images of a plan as digests; `columns` of a list are those of the new plan."""
    # they grow: the number of images in the record may be wrong
    id_digests, contents, locations, carried = bytearray(), array("Q"), array("Q"), array("Q")
    for shard in read_plan(output, plan):
        has_columns = shard.schema.names == plan_schema(columns).names
        has_columns = has_columns and (columns is None or shard.schema.field(CARRIED).type == columns)
        for row in shard.to_pylist():
            carried.append(_digest_carried(row) if has_columns else 0)
            id_digests += _digest_id(row)
            contents.append(_digest_content(row))
            locations.append(_digest(row["image_uri"]))
    ids, places = np.frombuffer(id_digests, "S16"), np.frombuffer(locations, np.uint64)
    values = np.frombuffer(carried, np.uint64)
    return _Known(ids, np.frombuffer(contents, np.uint64), places, values, np.argsort(ids), np.zeros(len(ids), bool))


def _compare(rows: Iterable[dict[str, Any]], known: _Known) -> Iterator[dict[str, Any]]:
    """Yield the rows of new images; note in `known` which planned images are still there and which have changed."""
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield from _compare_chunk(chunk, known)
            chunk = []
    yield from _compare_chunk(chunk, known)


def _compare_chunk(rows: list[dict[str, Any]], known: _Known) -> Iterator[dict[str, Any]]:
    digests = np.array([_digest_id(row) for row in rows], "S16")
    ranks = np.searchsorted(known.ids, digests, sorter=known.order)
    for row, digest, rank in zip(rows, digests, ranks, strict=True):
        position = int(known.order[rank]) if rank < len(known.order) else -1
        # An id that is seen twice is kept as a new row, so that the writer reports it.
        if position < 0 or known.ids[position] != digest or known.seen[position]:
            yield row
            continue
        known.seen[position] = True
        if known.contents[position] != _digest_content(row):
            known.changed[position] = row
            continue
        if known.locations[position] != _digest(row["image_uri"]):
            known.renewed[position] = row["image_uri"]
        if known.carried[position] != _digest_carried(row):
            known.relisted[position] = row.get(CARRIED) or {}


def _revise(row: dict[str, Any], position: int, known: _Known, update: Update) -> dict[str, Any]:
    """Return the row of the new plan for an image of the old plan, and count the difference in `update`."""
    if not known.seen[position]:
        update.num_vanished += not row["vanished"]
        return row | {"vanished": True}
    update.num_changed += position in known.changed or row["vanished"]
    update.num_renewed += position in known.renewed
    update.num_relisted += position in known.relisted
    renewed = {"image_uri": known.renewed[position]} if position in known.renewed else {}
    relisted = {CARRIED: known.relisted[position]} if position in known.relisted else {}
    return known.changed.get(position, row) | renewed | relisted | {"vanished": False}


def _digest_id(row: dict[str, Any]) -> bytes:
    # an earlier version planned ids with signatures
    return hashlib.blake2b(public_uri(row["image_id"]).encode(), digest_size=16).digest()


def _digest_content(row: dict[str, Any]) -> int:
    content = repr(
        (public_uri(row["image_uri"]), row["image_version"], row["prompts"], row.get("offset"), row.get("problem"))
    )
    return _digest(content)


def _digest_carried(row: dict[str, Any]) -> int:
    return _digest(repr(sorted((row.get(CARRIED) or {}).items())))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
