"""The plan of a segment run: which images, in which shards. Written once, before any work, and the truth from then on.

`OUTPUT/manifest/` holds files of up to SHARDS_PER_FILE row groups; a row group is a shard: a task reads just its own.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ManifestError
from vlsm.schema import MANIFEST_SCHEMA

SHARDS_PER_FILE = 64


@dataclass(frozen=True)
class Plan:
    """How much is planned: images, output rows (one per image and prompt), and the shards that they are cut into."""

    num_images: int
    num_rows: int
    num_shards: int


def cut_shards(rows: Iterable[dict[str, Any]], shard_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Runs of images of shard_rows output rows at most; an image with more prompts than that is a shard alone."""
    shard: list[dict[str, Any]] = []
    num_rows = 0
    for row in rows:
        if shard and num_rows + len(row["prompts"]) > shard_rows:
            yield shard
            shard, num_rows = [], 0
        shard.append(row)
        num_rows += len(row["prompts"])
    if shard:
        yield shard


def write_manifest(output: str, rows: Iterable[dict[str, Any]], shard_rows: int) -> Plan:
    """Write the plan of a run and count it.

    Args:
        output: the run's output folder; the manifest of an unfinished planning there is replaced.
        rows: dicts with the columns of MANIFEST_SCHEMA.
        shard_rows: output rows a shard holds at most.

    Raises:
        ManifestError: two rows have the same image_id.
    """
    for name in storage.list_names(storage.join(output, "manifest")):
        storage.remove(storage.join(output, "manifest", name))
    id_hashes = array("Q")
    num_rows = num_shards = 0
    tables: list[pa.Table] = []
    for shard in cut_shards(rows, shard_rows):
        tables.append(pa.Table.from_pylist(shard, schema=MANIFEST_SCHEMA))
        id_hashes.extend(_hash(row["image_id"]) for row in shard)
        num_rows += sum(len(row["prompts"]) for row in shard)
        num_shards += 1
        if len(tables) == SHARDS_PER_FILE:
            _write_file(output, num_shards - 1, tables)
            tables = []
    if tables:
        _write_file(output, num_shards - 1, tables)
    plan = Plan(num_images=len(id_hashes), num_rows=num_rows, num_shards=num_shards)
    _check_unique(output, plan, id_hashes)
    return plan


def read_shard(output: str, shard: int) -> pa.Table:
    """The manifest rows of one shard, as planned."""
    file, row_group = divmod(shard, SHARDS_PER_FILE)
    fs, path = storage.open_uri(_file_uri(output, file))
    with fs.open(path, "rb") as opened:
        return pq.ParquetFile(opened).read_row_group(row_group)


def planned_rows(manifest_rows: pa.Table) -> list[tuple[str, str]]:
    """Every (image_id, prompt) of some manifest rows, in order: the output rows that they must become."""
    ids, prompts = manifest_rows["image_id"].to_pylist(), manifest_rows["prompts"].to_pylist()
    return [(image_id, prompt) for image_id, own in zip(ids, prompts, strict=True) for prompt in own]


def _file_uri(output: str, file: int) -> str:
    return storage.join(output, "manifest", f"manifest-{file:06d}.parquet")


def _write_file(output: str, last_shard: int, tables: list[pa.Table]) -> None:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, MANIFEST_SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    storage.write_bytes(_file_uri(output, last_shard // SHARDS_PER_FILE), sink.getvalue().to_pybytes())


def _hash(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def _check_unique(output: str, plan: Plan, id_hashes: "array[int]") -> None:
    """Equal hashes are rare enough to look the names up: 8 bytes an image instead of every id in memory."""
    values, counts = np.unique(np.frombuffer(id_hashes, dtype=np.uint64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    for shard in range(plan.num_shards):
        for image_id in read_shard(output, shard)["image_id"].to_pylist():
            if image_id in seen:
                raise ManifestError(
                    f"image_id {image_id!r} stands twice in the manifest; each image is one row, "
                    "with a list in `prompts` for several prompts"
                )
            if _hash(image_id) in suspects:
                seen.add(image_id)
