"""Compares output rows with the plan, image by image, to prove that no row is missing and none is written twice."""

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlsm import storage
from vlsm.runs.carried import carried_names, find_stale
from vlsm.runs.extremes import count_extremes
from vlsm.runs.plan import SHARDS_PER_FILE, Plan, planned_keys, read_plan, read_shard
from vlsm.runs.results import part_name, read_part
from vlsm.runs.schema import RESULT_SCHEMA
from vlsm.shown import public_uri

logger = logging.getLogger("vlsm")

# columns that `compare_shard` needs
COMPARED = ["image_id", "image_uri", "image_version", "prompt", "kind", "status", "error", "grey_rule", "area_fraction"]
_PLANNED = ["image_id", "image_uri", "image_version", "prompts", "vanished"]


@dataclass(frozen=True)
class ShardState:
    """The comparison of a shard's part file with the plan.

    Attributes:
        undone: positions in the shard of the images whose rows differ from the planned rows.
        num_extra: number of rows whose image_id is not in the shard.
        num_stale: number of done images whose rows have other carried values than the plan; no mask depends on them.
        counts: numbers of the done images by status ("ok", "failed", "vanished"), by "failed: REASON" and by
            "levels: RULE" (`vlsm.images.grey_levels`); "rows", the number of their rows; and the counts of their masks
            (`vlsm.runs.extremes`).
    """

    undone: list[int]
    num_extra: int
    counts: Counter[str]
    num_stale: int = 0


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        pending: numbers of the unfinished shards; the value is whether a part file exists, whose good rows are reused.
        counts: as `ShardState.counts`, for all shards.
        num_stale: as `ShardState.num_stale`, for all shards.
    """

    pending: dict[int, bool] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    num_stale: int = 0

    @property
    def num_done(self) -> int:
        """Number of images whose rows are as planned."""
        return self.counts["ok"] + self.counts["failed"] + self.counts["vanished"]


def compare_shard(images: pa.Table, rows: pa.Table | None, kinds: list[str], retry_failed: bool = False) -> ShardState:
    """Compare the rows of a part file with the planned images of its shard.

    An image is done if it has one row per planned prompt and kind, in order, made from the planned version of its file.
    The rows of a vanished image must have the status "vanished".

    Args:
        images: the images of the shard, with the columns of its plan.
        rows: the rows of the part file, with its carried columns, or None if there is no valid one.
        kinds: the kinds of rows of the plan.
        retry_failed: whether failed images count as undone.
    """
    rows = RESULT_SCHEMA.empty_table() if rows is None else rows
    rows = rows.select([*COMPARED, *carried_names(rows.schema)])
    is_planned = pc.is_in(rows["image_id"], images["image_id"].combine_chunks())
    num_extra = len(rows) - int(pc.sum(is_planned).as_py() or 0)
    planned = images.select(_PLANNED).to_pylist()
    rows_by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    kept = _keep_planned(rows.filter(is_planned), planned, kinds)
    for row in kept.select(COMPARED).to_pylist():
        rows_by_image[row["image_id"]].append(row)
    stale = find_stale(images, kept)
    undone, counts, num_stale = [], Counter[str](), 0
    for position, image in enumerate(planned):
        image_rows = rows_by_image.pop(image["image_id"], [])
        if not _is_done(image, image_rows, kinds, retry_failed):
            undone.append(position)
            continue
        num_stale += image["image_id"] in stale
        status, error = image_rows[0]["status"], image_rows[0]["error"]
        counts.update({"rows": len(image_rows), status: 1})
        if status == "failed":
            counts["failed: " + (error or "").partition(":")[0]] += 1
        for row in image_rows:
            counts.update(count_extremes(row["kind"], row["status"], row["area_fraction"]))
        if rule := image_rows[0]["grey_rule"]:
            counts["levels: " + rule] += 1
    return ShardState(undone, num_extra, counts, num_stale)


def _keep_planned(rows: pa.Table, images: list[dict[str, Any]], kinds: list[str]) -> pa.Table:
    """Return the rows of the images that have as many rows as planned; so a part with millions of rows costs little."""
    counts = {item["values"]: item["counts"] for item in pc.value_counts(rows["image_id"]).to_pylist()}
    kept = [
        image["image_id"]
        for image in images
        if counts.get(image["image_id"]) == len(planned_keys(image["prompts"], kinds))
    ]
    return rows.filter(pc.is_in(rows["image_id"], pa.array(kept, pa.string())))


def _is_done(image: dict[str, Any], rows: list[dict[str, Any]], kinds: list[str], retry_failed: bool) -> bool:
    if [(row["prompt"], row["kind"]) for row in rows] != planned_keys(image["prompts"], kinds):
        return False
    statuses = {row["status"] for row in rows}
    if image["vanished"]:
        return statuses == {"vanished"}
    source = (public_uri(image["image_uri"]), image["image_version"])
    if any((public_uri(row["image_uri"]), row["image_version"]) != source for row in rows):
        return False
    return statuses == {"ok"} or (statuses == {"failed"} and not retry_failed)


def compare_run(
    output: str, plan: Plan, run_id: str, retry_failed: bool = False, are_written: bool = False
) -> RunState:
    """Compare all part files with the plan, 64 shards in memory at a time.

    Args:
        output: the run's output folder.
        plan: the plan.
        run_id: id of the run.
        retry_failed: as for `compare_shard`.
        are_written: whether all parts should exist. Each is then asked for by its name: a listing of the store may be
            older than the parts. Otherwise the listing saves the requests for those that do not exist.
    """
    names = set() if are_written else set(storage.list_names(storage.join(output, "masks")))
    state = RunState()

    def compare(numbered: tuple[int, pa.Table]) -> tuple[int, bool, ShardState]:
        shard, images = numbered
        is_expected = are_written or part_name(shard) in names
        rows = read_part(output, shard, run_id, COMPARED) if is_expected else None
        exists = rows is not None if are_written else is_expected
        return shard, exists, compare_shard(images, rows, plan.kinds, retry_failed)

    with ThreadPoolExecutor(max_workers=16) as pool:
        for chunk in _chunks(enumerate(read_plan(output, plan)), SHARDS_PER_FILE):
            for shard, exists, shard_state in pool.map(compare, chunk):
                state.counts += shard_state.counts
                state.num_stale += shard_state.num_stale
                if shard_state.undone or shard_state.num_extra or shard_state.num_stale:
                    state.pending[shard] = exists
    return state


def sample_run(output: str, plan: Plan, run_id: str, shards: Sequence[int]) -> Counter[str]:
    """Return counts, as `RunState.counts`, of some shards only, for runs that are too large to read whole."""

    def compare(shard: int) -> Counter[str]:
        images, rows = read_shard(output, plan.id, shard), read_part(output, shard, run_id, COMPARED)
        return compare_shard(images, rows, plan.kinds).counts

    with ThreadPoolExecutor(max_workers=16) as pool:
        return sum(pool.map(compare, shards), Counter[str]())


def failed_by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of failed images by reason, from counts as in `RunState.counts`."""
    return _counts_by("failed", counts)


def images_by_rule(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of images by the rule for their grey levels, from counts as in `RunState.counts`."""
    return _counts_by("levels", counts)


def _counts_by(kind: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {key.partition(": ")[2]: counts[key] for key in sorted(counts) if key.startswith(kind + ": ")}


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
