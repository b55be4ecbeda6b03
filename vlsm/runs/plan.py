"""The plan of a segment run: its images, cut into shards. It is written before the work on its images begins.

`OUTPUT/manifest/` has Parquet files of up to SHARDS_PER_FILE row groups. A row group is a shard, so that a task reads
only its own shard. A plan never changes: an update writes another plan beside it. config.yaml names the current plan.
"""

import hashlib
import json
import re
import uuid
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, StrictBool, StrictStr, TypeAdapter, ValidationError

from vlsm import storage
from vlsm.archive.carried import Carried
from vlsm.errors import DamageError, ManifestError, ResultError
from vlsm.runs.carried import CARRIED, carried_of_plan, plan_schema
from vlsm.runs.schema import PLAN_SCHEMA, with_format
from vlsm.runs.tables import TableFile, name_damage, open_table

SHARDS_PER_FILE = 64


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]
_PLAN_ID = re.compile(r"\w{1,64}", re.ASCII)  # a part of file names


@dataclass(frozen=True)
class Plan:
    """The size of a plan: number of images, output rows and shards, and the kinds of output rows.

    While the archive is still being listed, the plan is not complete and all numbers are 0.

    `carried` has the columns of a list that its images carry: the names in the results, with those in the list.
    """

    id: StrictStr
    num_images: _Count = 0
    num_rows: _Count = 0
    num_shards: _Count = 0
    is_complete: StrictBool = True
    kinds: list[StrictStr] = field(default_factory=lambda: ["mask"])
    carried: dict[StrictStr, StrictStr] = field(default_factory=dict)


_PLAN = TypeAdapter(Plan)


def plan_of(record: dict[str, Any], output: str) -> Plan:
    """Return the plan in the record of a segment run.

    Raises:
        ResultError: the record has no such plan, as after damage. Its numbers may still differ from the plan's files.
    """
    try:
        plan = _PLAN.validate_python(record["plan"])
    except (ValidationError, LookupError) as error:
        details = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "there is none"}
        where = ".".join(["plan", *map(str, details["loc"])])
        raise ResultError(f"config.yaml of {output!r} is damaged: {where}: {details['msg']}") from error
    if not isinstance(record.get("run_id"), str):
        raise ResultError(f"config.yaml of {output!r} is damaged: run_id is no text")
    if plan.num_shards > plan.num_images or not _PLAN_ID.fullmatch(plan.id):
        raise ResultError(
            f"config.yaml of {output!r} is damaged: its plan {plan.id!r} has {plan.num_images:,} images in "
            f"{plan.num_shards:,} shards"
        )
    return plan


def planned_keys(prompts: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """Return (prompt, kind) of each output row of an image, in order. A label map has all prompts, as a JSON list."""
    keys = [(prompt, kind) for prompt in prompts for kind in kinds if kind != "labels"]
    return [*keys, (json.dumps(prompts, ensure_ascii=False), "labels")] if "labels" in kinds else keys


def cut_shards(rows: Iterable[dict[str, Any]], shard_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Yield consecutive images as shards of at most shard_rows rows; an image with more rows gets its own shard.

    An image counts prompts x windows rows here, because each window takes memory.
    """
    shard: list[dict[str, Any]] = []
    num_rows = 0
    for row in rows:
        image_rows = len(row["prompts"]) * row.get("num_windows", 1)
        if shard and num_rows + image_rows > shard_rows:
            yield shard
            shard, num_rows = [], 0
        shard.append(row)
        num_rows += image_rows
    if shard:
        yield shard


def write_plan(
    output: str,
    rows: Iterable[dict[str, Any]],
    shard_rows: int,
    kinds: list[str] | None = None,
    carried: Carried | None = None,
) -> Plan:
    """Write the plan of a run and return its size.

    Args:
        output: the run's output folder.
        rows: dicts with the columns of PLAN_SCHEMA but `vanished`, and with `carried`.
        shard_rows: most output rows of a shard.
        kinds: kinds of output rows; None for masks only.
        carried: columns of a list that travel.

    Raises:
        ManifestError: two rows have the same image_id.
    """
    writer = PlanWriter(output, kinds=kinds, carried=carried)
    for shard in cut_shards(rows, shard_rows):
        writer.add(writer.table(shard))
    return writer.finish()


def shard_table(rows: list[dict[str, Any]], carried: pa.StructType | None = None) -> pa.Table:
    """Return the rows of a shard as a table; `vanished` is False if a row does not have it."""
    return pa.Table.from_pylist([{"vanished": False} | row for row in rows], schema=plan_schema(carried))


def new_plan_id() -> str:
    """Return an id that no other plan has."""
    return uuid.uuid4().hex[:12]


class PlanWriter:
    """Writes a plan shard by shard; at most one file is in memory.

    A plan file is written once and never replaced. If several jobs write the same plan, the first job to write a file
    decides its content, and the other jobs continue after it. The last file of a plan has fewer than SHARDS_PER_FILE
    shards, and may have none.

    Attributes:
        num_written: number of shards in written files.
        last: image_uri and selector of the last image in them, or None.
        is_ended: whether the last file of the plan is written.
    """

    def __init__(
        self,
        output: str,
        plan_id: str | None = None,
        kinds: list[str] | None = None,
        carried: Carried | None = None,
    ) -> None:
        self.output, self.plan_id, self._kinds = output, plan_id or new_plan_id(), kinds or ["mask"]
        self._carried, self._type = carried, None if carried is None else carried.type
        self.num_written = 0
        self.last: tuple[str, str | None] | None = None
        self.is_ended = False
        self._tables: list[pa.Table] = []
        self._id_hashes = array("Q")
        self._num_rows = 0

    @property
    def num_images(self) -> int:
        """Number of images in written files."""
        return len(self._id_hashes)

    def resume(self) -> None:
        """Continue after the plan files that an interrupted planner or another job has written."""
        while not self.is_ended and storage.exists(uri := self._next_uri()):
            file = _open_file(uri, storage.PATIENT_S)
            self._count([_read_group(file, number) for number in range(file.parquet.num_row_groups)])

    def table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Return the rows of a shard as a table with the columns of this plan."""
        return shard_table(rows, self._type)

    def add(self, shard: pa.Table) -> bool:
        """Add a shard, with the columns of PLAN_SCHEMA.

        Returns:
            False if another job has written the file of this shard. The caller must then continue with the images
            after `last`.
        """
        self._tables.append(shard)
        return len(self._tables) < SHARDS_PER_FILE or self.flush()

    def flush(self) -> bool:
        """Write the shards added since the last file. A file that is not full ends the plan. Returns as `add`."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, with_format(plan_schema(self._type)), compression="zstd") as writer:
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
        """Count the shards of the next written file."""
        for shard in shards:
            self._id_hashes.extend(map(_hash, shard["image_id"].to_pylist()))
            num_labels = self._kinds.count("labels")
            self._num_rows += len(shard["prompts"].combine_chunks().flatten()) * (len(self._kinds) - num_labels)
            self._num_rows += len(shard) * num_labels
            self.last = shard["image_uri"][-1].as_py(), shard["selector"][-1].as_py()
        self.num_written += len(shards)
        self.is_ended = len(shards) < SHARDS_PER_FILE

    def finish(self) -> Plan:
        """Write the remaining shards and return the complete plan.

        Raises:
            ManifestError: two rows have the same image_id. The plan's files are removed first.
        """
        if not self.is_ended:
            self.flush()
        sources = {} if self._carried is None else self._carried.sources
        counts = len(self._id_hashes), self._num_rows, self.num_written
        plan = Plan(self.plan_id, *counts, kinds=self._kinds, carried=dict(sources))
        try:
            _check_unique(self.output, plan, self._id_hashes)
        except ManifestError:
            remove_plan(self.output, plan.id)
            raise
        return plan


def read_shard(output: str, plan_id: str, shard: int, patience_s: float = storage.PATIENT_S) -> pa.Table:
    """Return the planned images of one shard, a table with the columns of `plan_schema`.

    Raises:
        ResultError: the plan's file is damaged or missing, or has no such shard.
    """
    file, row_group = divmod(shard, SHARDS_PER_FILE)
    uri = _file_uri(output, plan_id, file)

    # of a remote file, only the shard is read
    return storage.with_retries(lambda: _read_group(_open_file(uri, patience_s, 0), row_group), uri, patience_s)


def read_plan(output: str, plan: Plan) -> Iterator[pa.Table]:
    """Yield the planned images of every shard, in order; each file is read once.

    Raises:
        ResultError: a file of the plan is damaged or missing, or the files have more or fewer shards than the plan.
    """
    for first in range(0, plan.num_shards, SHARDS_PER_FILE):
        file = _open_file(_file_uri(output, plan.id, first // SHARDS_PER_FILE), storage.PATIENT_S)
        num_shards = min(SHARDS_PER_FILE, plan.num_shards - first)
        if file.parquet.num_row_groups != num_shards:
            raise DamageError(
                f"{file.uri} is damaged: it has {file.parquet.num_row_groups:,} shards; the plan has {num_shards} there"
            )
        for row_group in range(num_shards):
            yield _read_group(file, row_group)


def _open_file(uri: str, patience_s: float, num_bytes: int | None = None) -> TableFile:
    try:
        file = open_table(uri, PLAN_SCHEMA, patience_s, num_bytes)
        with name_damage(uri):
            return replace(file, schema=plan_schema(carried_of_plan(file.parquet.schema_arrow)))
    except FileNotFoundError as error:
        raise DamageError(f"{uri} is missing: the plan of the run is damaged") from error


def _read_group(file: TableFile, row_group: int) -> pa.Table:
    """A shard of a plan file; columns that an earlier version did not write are null."""
    if row_group >= file.parquet.num_row_groups:
        raise DamageError(f"{file.uri} is damaged: it has no shard {row_group}")
    table = file.read(group=row_group)
    with name_damage(file.uri):
        pc.min_max(table["mtime"]).as_py()  # raises an error for years that Python does not know
        if table["prompts"].combine_chunks().flatten().null_count:
            raise ValueError("a prompt is null")
        if CARRIED in table.column_names:
            table[CARRIED].to_pylist()  # so does this
    return table


def count_planned(output: str, plan_id: str) -> tuple[int, int]:
    """Return (number of images, number of shards) of a plan that is still being written, from the footers of its files.

    If there are many files, the number of images is estimated from some of them: all files but the last have the same
    number of shards, and about the same number of images.
    """
    folder = storage.join(output, "manifest")
    names = [name for name in storage.list_names(folder) if name.startswith(f"plan-{plan_id}-")]
    if not names:
        return 0, 0
    *full, last = names
    sample = full[:: -(-len(full) // SHARDS_PER_FILE) or 1]
    with ThreadPoolExecutor(max_workers=16) as pool:
        *footers, last_footer = pool.map(lambda name: _read_footer(storage.join(folder, name)), [*sample, last])
    num_images = sum(footer.num_rows for footer in footers) * len(full) // max(1, len(sample))
    return num_images + last_footer.num_rows, len(full) * SHARDS_PER_FILE + last_footer.num_row_groups


def _read_footer(uri: str) -> pq.FileMetaData:
    return _open_file(uri, storage.QUICK_S, 0).parquet.metadata


def list_plans(output: str) -> set[str]:
    """Return the ids of all plans that have files, current or not."""
    names = storage.list_names(storage.join(output, "manifest"))
    return {name.split("-")[1] for name in names if name.startswith("plan-")}


def remove_plan(output: str, plan_id: str) -> None:
    """Remove the files of a plan that is not the current one."""
    folder = storage.join(output, "manifest")
    for name in storage.list_names(folder):
        if name.startswith(f"plan-{plan_id}-"):
            storage.remove(storage.join(folder, name))


def _file_uri(output: str, plan_id: str, file: int) -> str:
    return storage.join(output, "manifest", f"plan-{plan_id}-{file:06d}.parquet")


def _hash(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def _check_unique(output: str, plan: Plan, id_hashes: "array[int]") -> None:
    """Raise a ManifestError if an image_id stands twice in a plan.

    Memory has 8 bytes of hash per image instead of all ids. Only ids with equal hashes, which are rare, are compared.
    """
    values = np.frombuffer(id_hashes, dtype=np.uint64)
    values.sort()  # in place, without a copy
    suspects = set(values[1:][values[1:] == values[:-1]].tolist())
    if not suspects:
        return
    seen: set[str] = set()
    for shard in read_plan(output, plan):
        for image_id in shard["image_id"].to_pylist():
            if image_id in seen:
                raise ManifestError(
                    f"image_id {image_id!r} stands twice in INPUT; each image must be one row, "
                    "with a list in `prompts` for several prompts"
                )
            if _hash(image_id) in suspects:
                seen.add(image_id)
