"""What is there against what was planned, image by image: the proof that nothing is lost and nothing done twice."""

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vlsm import storage
from vlsm.runs.plan import SHARDS_PER_FILE, Plan, planned_keys, read_plan, read_shard
from vlsm.runs.results import part_name, read_part

logger = logging.getLogger("vlsm")

_COLUMNS = ["image_id", "image_uri", "image_version", "prompt", "kind", "status", "error"]


@dataclass(frozen=True)
class ShardState:
    """How the rows of a shard's part compare with its images in the plan.

    Attributes:
        undone: positions of the images that have not exactly the rows that were planned.
        num_extra: rows that are nobody's.
        counts: of the other images: "ok", "failed", "vanished", "failed: REASON", and their "rows".
    """

    undone: list[int]
    num_extra: int
    counts: Counter[str]


@dataclass
class RunState:
    """How far a run is.

    Attributes:
        pending: the shards that are to be done, and whether each has a part of which something may be kept.
        counts: as for a shard, of all that is done.
    """

    pending: dict[int, bool] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def num_done(self) -> int:
        """Images whose rows are as planned."""
        return self.counts["ok"] + self.counts["failed"] + self.counts["vanished"]


def compare_shard(images: pa.Table, rows: pa.Table | None, kinds: list[str], retry_failed: bool = False) -> ShardState:
    """Compare the rows of a part with the images planned for it.

    An image is done where its rows are those of its prompts and kinds, once each and in their order, made from the file
    that was planned; of one that has vanished they say so.

    Args:
        images: of the shard, with the columns of MANIFEST_SCHEMA.
        rows: of its part, or None where there is none.
        kinds: of rows, as the plan has them.
        retry_failed: whether failed images count as undone.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in [] if rows is None else rows.select(_COLUMNS).to_pylist():
        found[row["image_id"]].append(row)
    undone, counts = [], Counter[str]()
    for position, image in enumerate(images.to_pylist()):
        own = found.pop(image["image_id"], [])
        if not _is_done(image, own, kinds, retry_failed):
            undone.append(position)
            continue
        status, error = own[0]["status"], own[0]["error"]
        counts.update({"rows": len(own), status: 1})
        if status == "failed":
            counts["failed: " + error.partition(":")[0]] += 1
    return ShardState(undone, sum(map(len, found.values())), counts)


def _is_done(image: dict[str, Any], rows: list[dict[str, Any]], kinds: list[str], retry_failed: bool) -> bool:
    if [(row["prompt"], row["kind"]) for row in rows] != planned_keys(image["prompts"], kinds):
        return False
    statuses = {row["status"] for row in rows}
    if image["vanished"]:
        return statuses == {"vanished"}
    source = (image["image_uri"], image["image_version"])
    if any((row["image_uri"], row["image_version"]) != source for row in rows):
        return False
    return statuses == {"ok"} or (statuses == {"failed"} and not retry_failed)


def compare_run(output: str, plan: Plan, run_id: str, retry_failed: bool = False) -> RunState:
    """Compare all parts with the plan, 64 shards in memory at a time; arguments as for `compare_shard`."""
    names = set(storage.list_names(storage.join(output, "masks")))
    state = RunState()

    def compare(numbered: tuple[int, pa.Table]) -> tuple[int, ShardState]:
        shard, images = numbered
        rows = read_part(output, shard, run_id, _COLUMNS) if part_name(shard) in names else None
        return shard, compare_shard(images, rows, plan.kinds, retry_failed)

    with ThreadPoolExecutor(max_workers=16) as pool:
        for chunk in _chunks(enumerate(read_plan(output, plan)), SHARDS_PER_FILE):
            for shard, found in pool.map(compare, chunk):
                state.counts += found.counts
                if found.undone or found.num_extra:
                    state.pending[shard] = part_name(shard) in names
    return state


def sample_run(output: str, plan: Plan, run_id: str, shards: Sequence[int]) -> Counter[str]:
    """Counts, as of a RunState, of some shards alone: a look at a run that is too large to be read for it."""

    def compare(shard: int) -> Counter[str]:
        images, rows = read_shard(output, plan.id, shard), read_part(output, shard, run_id, _COLUMNS)
        return compare_shard(images, rows, plan.kinds).counts

    with ThreadPoolExecutor(max_workers=16) as pool:
        return sum(pool.map(compare, shards), Counter[str]())


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
