"""The rows of a finished or unfinished run: reading them with their masks, and counting them against the plan."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ConfigError, ResultError
from vlsm.manifest import planned_rows, read_shard
from vlsm.masks import decode_mask
from vlsm.schema import RESULT_SCHEMA


def part_name(shard: int) -> str:
    """The name of a shard's part file: its presence means that the shard is done."""
    return f"part-{shard:08d}.parquet"


def read_masks(uri: str, filters: Any = None, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a run's output one by one, each with its decoded mask.

    Args:
        uri: the run's OUTPUT folder, local or on an object store.
        filters: as `pandas.read_parquet` takes them: [("status", "==", "ok"), ("confidence", "<", 0.6)] or a
            `pyarrow.compute` expression. Nothing that does not match is decoded.
        columns: those wanted beside `mask`; all unless told.

    Yields:
        A dict per row: the columns, and "mask", an array (height, width) uint8 of 0 and 1, or None for failed rows.

    Raises:
        ConfigError: there are no masks at the location, or a column is unknown.
    """
    unknown = sorted(set(columns or ()) - set(RESULT_SCHEMA.names))
    if unknown:
        raise ConfigError(f"unknown column {unknown[0]!r}; columns: {', '.join(RESULT_SCHEMA.names)}")
    wanted = None if columns is None else [*dict.fromkeys([*columns, "mask_rle", "height", "width"])]
    expression = pq.filters_to_expression(filters) if isinstance(filters, list) else filters
    for batch in open_results(uri).to_batches(columns=wanted, filter=expression, batch_size=256):
        for row in batch.to_pylist():
            mask = None if row["mask_rle"] is None else decode_mask(row["mask_rle"], (row["height"], row["width"]))
            yield (row if columns is None else {name: row[name] for name in columns}) | {"mask": mask}


def open_results(uri: str) -> ds.Dataset:
    """The part files of a run's output as one Arrow dataset.

    Raises:
        ConfigError: there are none.
    """
    fs, path = storage.open_uri(storage.join(storage.absolute(uri), "masks"))
    names = [
        name for name in storage.list_names(storage.join(storage.absolute(uri), "masks")) if name.startswith("part-")
    ]
    if not names:
        raise ConfigError(f"there are no masks in {uri!r}; it must be the OUTPUT of a segment run")
    return ds.dataset([f"{path}/{name}" for name in names], schema=RESULT_SCHEMA, filesystem=fs, format="parquet")


def count_rows(output: str, shards: Iterable[int]) -> Counter[str]:
    """The images of some shards, counted anew from storage and compared row by row with the plan.

    Args:
        output: the run's output folder.
        shards: those whose part files are there.

    Returns:
        Counts of "rows", "ok" and "failed" images, and "failed: REASON" for every reason.

    Raises:
        ResultError: a part's rows are not exactly the planned (image_id, prompt) pairs.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        return sum(pool.map(lambda shard: _count_part(output, shard), shards), Counter())


def _count_part(output: str, shard: int) -> Counter[str]:
    fs, path = storage.open_uri(storage.join(output, "masks", part_name(shard)))
    with fs.open(path, "rb") as file:
        rows = pq.read_table(file, columns=["image_id", "prompt", "status", "error"])
    check_rows(output, shard, rows, planned_rows(read_shard(output, shard)))
    errors = dict(zip(rows["image_id"].to_pylist(), rows["error"].to_pylist(), strict=True))
    counts = Counter(rows=len(rows))
    for error in errors.values():
        counts["ok" if error is None else "failed"] += 1
        if error is not None:
            counts["failed: " + error.partition(":")[0]] += 1
    return counts


def check_rows(output: str, shard: int, rows: pa.Table, planned: list[tuple[str, str]]) -> None:
    """Nothing, where a part's rows are the planned (image_id, prompt) pairs in their order; else a ResultError."""
    found = list(zip(rows["image_id"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
    if found != planned:
        missing, extra = Counter(planned) - Counter(found), Counter(found) - Counter(planned)
        raise ResultError(
            f"{part_name(shard)} in {output!r} is not what was planned: {missing.total()} rows missing "
            f"{list(missing)[:3]}, {extra.total()} too many {list(extra)[:3]}; remove it and run again"
        )
