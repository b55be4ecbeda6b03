"""Proves a run from storage: every planned row exists once, and its columns agree with its mask."""

import contextlib
import itertools
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from vlsm import storage
from vlsm.errors import ConfigError, DamageError, ImageError, ResultError
from vlsm.images.run_lengths import measure_run_lengths
from vlsm.runs.compare import COMPARED, compare_shard, failed_by_reason, images_by_rule
from vlsm.runs.extremes import EMPTY, MASKS, WHOLE_IMAGE
from vlsm.runs.plan import Plan, count_planned, plan_of, planned_keys, read_plan
from vlsm.runs.record import SUMMARY_NAME, read_record, read_segment_summary
from vlsm.runs.results import open_part, part_name, shard_of
from vlsm.segmentation.masks import decode_png, encode_mask
from vlsm.words import count

_SHARDS_AT_ONCE = 16
_LARGE_PIXELS = 1 << 24  # larger maps are decoded one at a time
_LENGTH_ERROR = 0.01  # of an embedding in half precision
_one_large_map = threading.Lock()


@dataclass
class Proof:
    """The result of the verification of a run.

    Attributes:
        plan: the size of the run's plan.
        counts: numbers of images by "ok", "failed", "vanished" and "failed: REASON", and of "rows", "parts", "masks".
        differences: one sentence for each error in the run; empty for a finished run without errors. Of a run that is
            not finished, the first one says so, and no other one is about rows that it has not written yet.
        is_finished: whether the run has a complete plan and its summary.
        has_embeddings: whether the run keeps the embedding of each image.
    """

    plan: Plan
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    is_finished: bool = True
    has_embeddings: bool = False


def verify_run(output: str) -> Iterator[Proof]:
    """Read the plan, every row and every mask of a run, and compare them.

    Args:
        output: OUTPUT of a segment run, finished or not.

    Yields:
        The same Proof object after every few shards, so that a caller can show progress. It is complete after the last.

    Raises:
        ConfigError: there is no run at OUTPUT.
    """
    record = read_record(output)
    if record is None or "run_id" not in record:
        raise ConfigError(f"there is no segment run in {output!r}; it must be the OUTPUT of a segment run")
    # listed before the plan of a run that still plans: each part is of a shard that is planned then
    names = [name for name in storage.list_names(storage.join(output, "masks")) if not name.startswith(".")]
    proof = _begin(output, plan_of(record, output))
    plan = proof.plan
    others = [name for name in names if (shard := shard_of(name)) is None or shard >= plan.num_shards]
    proof.differences += [f"masks/{name} is no part of this run" for name in others]
    ids = array("q")  # hashes of the image_ids: 8 bytes per image
    numbered = enumerate(read_plan(output, plan))
    proof.has_embeddings = (record.get("config") or {}).get("embedding") is True

    def verify(item: tuple[int, pa.Table]) -> tuple[Counter[str], list[str]]:
        return _verify_shard(output, record["run_id"], proof, *item)

    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        while chunk := list(itertools.islice(numbered, _SHARDS_AT_ONCE)):
            for counts, differences in pool.map(verify, chunk):
                proof.counts += counts
                proof.differences += differences
            for _, images in chunk:
                ids.extend(map(hash, images["image_id"].to_pylist()))
            yield proof
    if proof.is_finished:
        proof.differences += _verify_counts(output, proof, len(np.unique(ids)))
    else:
        proof.differences.insert(0, _describe_progress(proof))
    yield proof


def _begin(output: str, plan: Plan) -> Proof:
    if not plan.is_complete:
        num_images, num_shards = count_planned(output, plan.id)
        return Proof(replace(plan, num_images=num_images, num_shards=num_shards), is_finished=False)
    return Proof(plan, is_finished=storage.exists(storage.join(output, SUMMARY_NAME)))


def _describe_progress(proof: Proof) -> str:
    plan, counts = proof.plan, proof.counts
    num_done = counts["ok"] + counts["failed"] + counts["vanished"]
    so_far = "" if plan.is_complete else " that are planned so far"
    return (
        f"the run is not finished: {num_done:,} of {plan.num_images:,} images{so_far} have all of their rows, and "
        f"{counts['parts']:,} of {plan.num_shards:,} parts are written"
    )


def _verify_shard(
    output: str, run_id: str, proof: Proof, shard: int, images: pa.Table
) -> tuple[Counter[str], list[str]]:
    """Return the counts and the differences of one shard; see `Proof`."""
    name, kinds = f"masks/{part_name(shard)}", proof.plan.kinds
    try:
        part = open_part(output, shard, run_id)
        state = compare_shard(images, part.read(COMPARED), kinds)
    except (FileNotFoundError, DamageError) as error:
        if isinstance(error, FileNotFoundError) and not proof.is_finished:
            return Counter(), []
        return Counter(), [f"{name} is missing, damaged or of another run: no rows of {count(len(images), 'image')}"]
    differences = []
    if state.undone:
        ids = images["image_id"].take(pa.array(state.undone, pa.int64())).to_pylist()
        first_ids = ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")
        differences.append(f"{name}: not exactly the planned rows for {count(len(ids), 'image')}: {first_ids}")
    if state.num_extra:
        differences.append(f"{name}: {count(state.num_extra, 'row')} too many, not planned")
    counts = state.counts + Counter(parts=1)
    planned = sum(len(planned_keys(prompts, kinds)) for prompts in images["prompts"].to_pylist())
    try:
        # a damaged part may have millions of rows, and masks of any size: they pass one after the other
        rows = (row for piece in part.pieces() for row in piece.to_pylist())
        last_id = None
        for row in itertools.islice(rows, planned):
            counts["masks"] += row["mask_rle"] is not None
            needs_embedding = proof.has_embeddings and row["image_id"] != last_id
            if problem := _describe_problem(row, needs_embedding):
                differences.append(f"{name}: {row['image_id']!r}, {row['prompt']!r}: {problem}")
            last_id = row["image_id"]
    except DamageError as error:
        differences.append(str(error))
    return counts, differences


def _describe_problem(row: dict[str, Any], needs_embedding: bool) -> str | None:
    try:
        return _find_contradiction(row) or _describe_embedding(
            row["embedding"], needs_embedding and row["status"] == "ok"
        )
    except Exception as error:  # a damaged row can raise any error
        return f"the row cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _describe_embedding(embedding: Any, is_needed: bool) -> str | None:
    """Return what is wrong with the embedding of a row, or None."""
    if embedding is None:
        return "status is ok, but the first row of the image has no embedding" if is_needed else None
    length = float(np.linalg.norm(np.asarray(embedding, np.float32)))
    return None if abs(length - 1) < _LENGTH_ERROR else f"the embedding has the length {length:.3g}; it must be 1"


def _find_contradiction(row: dict[str, Any]) -> str | None:
    """Return a description of the first contradiction between the columns of a row, or None."""
    if row["status"] == "failed" and (row["error"] or "").partition(": ")[0] not in ImageError.REASONS:
        return f"status is failed, but error {row['error']!r} has no known reason"
    if row["mask_rle"] is None:
        return "status is ok, but there is no mask" if row["status"] == "ok" else None
    size = (row["height"], row["width"])
    area, box = measure_run_lengths(row["mask_rle"], size)
    if area != row["area_px"]:
        return f"area_px is {row['area_px']}, but the mask has {area} pixels"
    with _one_large_map if size[0] * size[1] > _LARGE_PIXELS else contextlib.nullcontext():
        if row["label_map"] is not None:
            labels = decode_png(row["label_map"], size)
            if labels.shape != size or encode_mask(labels > 0) != row["mask_rle"]:
                return "the foreground of the label map is not the mask"
        if row["probability_map"] is not None:
            if decode_png(row["probability_map"], size).shape != size:
                return "the probability map has another size than the mask"
    return None if box == row["bbox"] else f"bbox is {row['bbox']}, but the mask's bounding box is {box}"


def _verify_counts(output: str, proof: Proof, num_ids: int) -> list[str]:
    """Return the differences between the counted images and rows, the plan's size and summary.json."""
    plan, counts = proof.plan, proof.counts
    differences = []
    if num_ids != plan.num_images:
        differences.append(f"the plan has {num_ids} different image_ids; it should have {plan.num_images}")
    if counts["rows"] != plan.num_rows:
        differences.append(f"{counts['rows']} rows are as planned; there should be {plan.num_rows}")
    try:
        summary = read_segment_summary(output, plan.num_images, plan.num_rows)
    except ResultError as error:
        return [*differences, str(error)]
    if summary is None:  # removed just now
        return [*differences, f"{SUMMARY_NAME} is missing"]
    expected: dict[str, Any] = {"planned": plan.num_images} | {
        key: counts[key] for key in ("ok", "failed", "vanished", "rows")
    }
    expected["failed_by_reason"] = failed_by_reason(counts)
    later = {"grey_levels": images_by_rule(counts)} | {key: counts[key] for key in (MASKS, EMPTY, WHOLE_IMAGE)}
    expected |= {key: value for key, value in later.items() if key in summary}  # earlier versions did not count them
    for key, value in expected.items():
        if summary.get(key) != value:
            differences.append(f"summary.json has {key} {summary.get(key)}; it should be {value}")
    return differences
