"""The plan of a segment run: which images, in which shards. Written before any work, and the truth from then on.

`OUTPUT/manifest/` holds files of up to SHARDS_PER_FILE row groups; a row group is a shard: a task reads just its own.
A plan is never changed: an update writes another one beside it, and config.yaml tells which of them counts.
"""

import hashlib
import io
import json
import uuid
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ManifestError
from vlsm.runs.schema import MANIFEST_SCHEMA

SHARDS_PER_FILE = 64


@dataclass(frozen=True)
class Plan:
    """How much is planned: images, output rows, the shards that they are cut into, and the kinds of rows.

    While the archive is still being listed it is not complete, and counts nothing.
    """

    id: str
    num_images: int = 0
    num_rows: int = 0
    num_shards: int = 0
    is_complete: bool = True
    kinds: list[str] = field(default_factory=lambda: ["mask"])


def planned_keys(prompts: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """Prompt and kind of each row of an image, in order; a label map has all prompts, as a JSON list."""
    keys = [(prompt, kind) for prompt in prompts for kind in kinds if kind != "labels"]
    return [*keys, (json.dumps(prompts, ensure_ascii=False), "labels")] if "labels" in kinds else keys


def cut_shards(rows: Iterable[dict[str, Any]], shard_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Runs of images of so many prompts at most, each as often as an image has windows; one with more is alone."""
    shard: list[dict[str, Any]] = []
    num_rows = 0
    for row in rows:
        own = len(row["prompts"]) * row.get("num_windows", 1)
        if shard and num_rows + own > shard_rows:
            yield shard
            shard, num_rows = [], 0
        shard.append(row)
        num_rows += own
    if shard:
        yield shard


def write_manifest(
    output: str, rows: Iterable[dict[str, Any]], shard_rows: int, kinds: list[str] | None = None
) -> Plan:
    """Write the plan of a run and count it.

    Args:
        output: the run's output folder.
        rows: dicts with the columns of MANIFEST_SCHEMA but `vanished`.
        shard_rows: output rows a shard holds at most.
        kinds: of rows; masks alone unless told.

    Raises:
        ManifestError: two rows have the same image_id.
    """
    writer = ManifestWriter(output, kinds=kinds)
    for shard in cut_shards(rows, shard_rows):
        writer.add(shard_table(shard))
    return writer.finish()


def shard_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of a shard as a table, none of them vanished unless a row says so."""
    return pa.Table.from_pylist([{"vanished": False} | row for row in rows], schema=MANIFEST_SCHEMA)


def new_plan_id() -> str:
    """An id that no other plan has."""
    return uuid.uuid4().hex[:12]


class ManifestWriter:
    """Writes a plan shard by shard; no more of it is in memory than one file.

    A file is put where there is none and never again: of several jobs that write one plan, the first decides what is in
    a file, and the others go on behind it. A file of less than SHARDS_PER_FILE shards, if need be of none, is the last.

    Attributes:
        num_written: shards whose file is written.
        last: the last image_uri and selector in them.
        is_ended: whether the last file is written.
    """

    def __init__(self, output: str, plan_id: str | None = None, kinds: list[str] | None = None) -> None:
        self.output, self.plan_id, self._kinds = output, plan_id or new_plan_id(), kinds or ["mask"]
        self.num_written = 0
        self.last: tuple[str, str | None] | None = None
        self.is_ended = False
        self._tables: list[pa.Table] = []
        self._id_hashes = array("Q")
        self._num_rows = 0

    @property
    def num_images(self) -> int:
        """In the files that are written."""
        return len(self._id_hashes)

    def resume(self) -> None:
        """Go on behind the files that are there: of a planning that was broken off, or of another job."""
        while not self.is_ended and storage.exists(uri := self._next_uri()):
            parquet = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri, storage.PATIENT_S)))
            self._count([parquet.read_row_group(number) for number in range(parquet.num_row_groups)])

    def add(self, shard: pa.Table) -> bool:
        """Add a shard, with the columns of MANIFEST_SCHEMA.

        Returns:
            False where another job has written the file in which it would be: what is next is what follows `last`.
        """
        self._tables.append(shard)
        return len(self._tables) < SHARDS_PER_FILE or self.flush()

    def flush(self) -> bool:
        """Write what was added since the last file, which ends the plan unless a file is full; returns as for `add`."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, MANIFEST_SCHEMA, compression="zstd") as writer:
            for table in self._tables:
                writer.write_table(table, row_group_size=len(table))
        tables, self._tables = self._tables, []
        if storage.create_bytes(self._next_uri(), sink.getvalue().to_pybytes()):
            self._count(tables)
            return True
        self.resume()
        return False

    def _next_uri(self) -> str:
        return _file_uri(self.output, self.plan_id, self.num_written // SHARDS_PER_FILE)

    def _count(self, shards: list[pa.Table]) -> None:
        """Take in what the next file holds."""
        for shard in shards:
            self._id_hashes.extend(map(_hash, shard["image_id"].to_pylist()))
            num_labels = self._kinds.count("labels")
            self._num_rows += len(shard["prompts"].combine_chunks().flatten()) * (len(self._kinds) - num_labels)
            self._num_rows += len(shard) * num_labels
            self.last = shard["image_uri"][-1].as_py(), shard["selector"][-1].as_py()
        self.num_written += len(shards)
        self.is_ended = len(shards) < SHARDS_PER_FILE

    def finish(self) -> Plan:
        """Write what is left.

        Raises:
            ManifestError: two rows have the same image_id; what was written is removed.
        """
        if not self.is_ended:
            self.flush()
        plan = Plan(self.plan_id, len(self._id_hashes), self._num_rows, self.num_written, kinds=self._kinds)
        try:
            _check_unique(self.output, plan, self._id_hashes)
        except ManifestError:
            remove_plan(self.output, plan.id)
            raise
        return plan


def read_shard(output: str, plan_id: str, shard: int, patience_s: float = storage.PATIENT_S) -> pa.Table:
    """The manifest rows of one shard, as planned."""
    file, row_group = divmod(shard, SHARDS_PER_FILE)
    uri = _file_uri(output, plan_id, file)
    fs, path = storage.open_uri(uri)

    def read() -> pa.Table:
        with fs.open(path, "rb") as opened:
            return pq.ParquetFile(opened).read_row_group(row_group)

    return storage.with_retries(read, uri, patience_s)


def read_plan(output: str, plan: Plan) -> Iterator[pa.Table]:
    """The manifest rows of all shards, in order, each file fetched once."""
    for file in range(-(-plan.num_shards // SHARDS_PER_FILE)):
        data = storage.read_bytes(_file_uri(output, plan.id, file), storage.PATIENT_S)
        parquet = pq.ParquetFile(io.BytesIO(data))
        for row_group in range(parquet.num_row_groups):
            yield parquet.read_row_group(row_group)


def count_planned(output: str, plan_id: str) -> tuple[int, int]:
    """Images and shards of a plan that is still being written, from its files' footers.

    Of many files some are read: all but the last hold equally many shards, and about as many images.
    """
    folder = storage.join(output, "manifest")
    names = [name for name in storage.list_names(folder) if name.startswith(f"plan-{plan_id}-")]
    if not names:
        return 0, 0
    *full, last = names
    read = full[:: -(-len(full) // SHARDS_PER_FILE) or 1]
    with ThreadPoolExecutor(max_workers=16) as pool:
        *found, end = pool.map(lambda name: _read_footer(storage.join(folder, name)), [*read, last])
    num_images = sum(metadata.num_rows for metadata in found) * len(full) // max(1, len(read))
    return num_images + end.num_rows, len(full) * SHARDS_PER_FILE + end.num_row_groups


def _read_footer(uri: str) -> pq.FileMetaData:
    fs, path = storage.open_uri(uri)

    def read() -> pq.FileMetaData:
        with fs.open(path, "rb") as opened:
            return pq.read_metadata(opened)

    return storage.with_retries(read, uri, storage.QUICK_S)


def list_plans(output: str) -> set[str]:
    """The ids of all plans of which there are files, whether they count or not."""
    names = storage.list_names(storage.join(output, "manifest"))
    return {name.split("-")[1] for name in names if name.startswith("plan-")}


def remove_plan(output: str, plan_id: str) -> None:
    """Remove a plan that does not count."""
    folder = storage.join(output, "manifest")
    for name in storage.list_names(folder):
        if name.startswith(f"plan-{plan_id}-"):
            storage.remove(storage.join(folder, name))


def _file_uri(output: str, plan_id: str, file: int) -> str:
    return storage.join(output, "manifest", f"plan-{plan_id}-{file:06d}.parquet")


def _hash(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def _check_unique(output: str, plan: Plan, id_hashes: "array[int]") -> None:
    """Equal hashes are rare enough to look the names up: 8 bytes an image instead of every id in memory."""
    values = np.frombuffer(id_hashes, dtype=np.uint64)
    values.sort()  # in place: nothing is copied
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    for shard in read_plan(output, plan):
        for image_id in shard["image_id"].to_pylist():
            if image_id in seen:
                raise ManifestError(
                    f"image_id {image_id!r} stands twice in the manifest; each image is one row, "
                    "with a list in `prompts` for several prompts"
                )
            if _hash(image_id) in suspects:
                seen.add(image_id)
