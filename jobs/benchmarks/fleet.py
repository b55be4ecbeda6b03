"""Many GPUs under one driver, simulated on this machine: what bounds the images per second of a segment run."""

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa

from jobs import segment_pipeline
from jobs.benchmarks.cost import kind_of
from jobs.benchmarks.figures import write_json
from jobs.segment_tasks import Task
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.images.preprocess import Square
from vlsm.segmentation.shard import Entry, Logits, ShardBatch

_SIDE_PX = 352
_TASK_CPUS = 6  # of the simulated cluster beside its actors: eight tasks at once
_WARM_SHARDS = 0.25  # share of the shards before the measurement


@dataclass(frozen=True)
class Fleet:
    """Figures of one simulation.

    Attributes:
        num_actors: simulated GPUs.
        shard_rows: images per shard.
        has_pixels: whether the stages pass on pixels and masks of real size; otherwise nothing but their entries.
        shards_per_s: shards per second that the driver has seen finished.
        images_per_s: shards_per_s times shard_rows.
        core_ms: CPU milliseconds per shard by kind of process.
        driver_shards_per_s: shards per second at which the driver would use a whole core.
    """

    num_actors: int
    shard_rows: int
    has_pixels: bool
    shards_per_s: float
    images_per_s: float
    core_ms: dict[str, float]
    driver_shards_per_s: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark fleet`."""
    parser.add_argument("--actors", action="append", type=int, metavar="N", help="may be repeated (default: 8 and 32)")
    parser.add_argument("--shards", type=int, default=1000, metavar="N", help="of each simulation (1000)")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="images of a shard (256)")
    parser.add_argument("--rate", type=float, default=4000, metavar="R", help="images/s of a simulated GPU (4000)")
    parser.add_argument("--pixels", action="store_true", help="pass on pixels and masks of real size")


def measure(args: Namespace) -> int:
    """Simulate segment runs with many actors on this machine: real pipeline, driver, board and metrics, no work.

    A simulated model sleeps as long as a GPU computes. Tasks read, decode and write nothing. Without --pixels they also
    pass on nothing: what is left is what Ray and the driver cost for each shard. The CPU time of the driver says at
    which rate one driver is busy all the time; the rate of the simulation itself is that of this machine's cores.
    """
    import ray

    from jobs.command import init_ray

    fleets = []
    os.environ.setdefault("RAY_num_workers_soft_limit", "64")
    os.environ.setdefault("RAY_worker_niceness", "0")
    for num_actors in args.actors or (8, 32):
        init_ray(
            "local", num_cpus=num_actors + _TASK_CPUS, num_gpus=num_actors, include_dashboard=False, log_to_driver=False
        )
        try:
            fleet = _simulate(num_actors, args)
        finally:
            ray.shutdown()
        fleets.append(asdict(fleet))
        told = ", ".join(f"{kind} {ms:.2f}" for kind, ms in fleet.core_ms.items())
        print(
            f"{num_actors} actors, shards of {fleet.shard_rows}: {fleet.shards_per_s:.1f} shards/s = "
            f"{fleet.images_per_s:,.0f} images/s; core ms a shard: {told}; one driver at most "
            f"{fleet.driver_shards_per_s:.0f} shards/s",
            flush=True,
        )
        write_json(args.json, "fleet", {"rate": args.rate, "runs": fleets})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"Simulated segment runs with many GPUs of {figures['rate']:,.0f} images/s: real pipeline, driver, board and "
        "metrics; models sleep, tasks do no work. At the rate in the last column one driver is busy all the time.",
        "",
        "| actors | images a shard | pixels | shards/s here | core ms a shard: driver | board | Ray | a driver's most "
        "shards/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        ms = row["core_ms"]
        of_ray = sum(ms.get(kind, 0.0) for kind in ("raylet", "GCS", "agents", "Ray's actors"))
        lines.append(
            f"| {row['num_actors']} | {row['shard_rows']} | {'yes' if row['has_pixels'] else 'no'} | "
            f"{row['shards_per_s']:.0f} | {ms['driver']:.1f} | {ms.get('board', 0):.1f} | {of_ray:.1f} | "
            f"{row['driver_shards_per_s']:.0f} |"
        )
    return lines


@dataclass(frozen=True)
class _Simulated(Task):
    """The data of a simulated run."""

    shard_rows: int = 256
    rate: float = 4000
    has_pixels: bool = False


def _fetch_shard(batch: Mapping[str, np.ndarray], task: _Simulated) -> pa.Table:
    shard = int(batch["shard"][0])
    with task.watch("fetch", shard):
        entries = [
            Entry(number, 1, 560, 560, number if task.has_pixels else 0, int(task.has_pixels), number)
            for number in range(task.shard_rows)
        ]
        count = task.shard_rows if task.has_pixels else 0
        return ShardBatch(shard, False, entries, {task.squares[0]: _pixels(count)}).pack()


class _SegmentActor:
    def __init__(self, task: _Simulated, weights: list[Any], members: tuple[int, ...], num_threads: int) -> None:
        self._task = task

    def __call__(self, table: pa.Table) -> pa.Table:
        batch = ShardBatch.unpack(table)
        with self._task.watch("segment 0", batch.shard) as watch:
            time.sleep(self._task.shard_rows / self._task.rate)
            watch.note(self._task.shard_rows)
        batch.pixels = {}
        count = self._task.shard_rows if self._task.has_pixels else 0
        # packed bits of a mask take a fifth of float16 logits of 352 x 352
        batch.logits = {0: Logits("simulated", np.zeros((batch.num_logits, 140, 140), np.float16))} if count else {}
        return batch.pack()


def _write_masks(table: pa.Table, task: _Simulated) -> dict[str, Any]:
    batch = ShardBatch.unpack(table)
    with task.watch("write", batch.shard):
        return {"shard": [batch.shard], "num_images": [len(batch.entries)], "failed": ["{}"], "first_errors": ["[]"]}


def _pixels(count: int) -> np.ndarray:
    return np.zeros((count, _SIDE_PX, _SIDE_PX, 3), np.uint8)


def _simulate(num_actors: int, args: Namespace) -> Fleet:
    import ray

    from jobs.crash_watch import CrashBoard, start_board
    from jobs.progress import Progress

    segment_pipeline.configure_ray_data()
    ray.data.DataContext.get_current().enable_progress_bars = False
    settings = SegmentSettings(input="in", output="out", members=(MemberSettings(checkpoint="none"),))
    board = start_board(CrashBoard, {"start": time.time()})
    squares = (Square(_SIDE_PX),)
    task = _Simulated(settings, "run", "plan", squares, False, board, args.shard_rows, args.rate, args.pixels)
    stages: dict[str, Any] = {"fetch_shard": _fetch_shard, "SegmentActor": _SegmentActor, "write_masks": _write_masks}
    total = args.shards * args.shard_rows
    first, before = int(args.shards * _WARM_SHARDS), dict[str, float]()
    start_s = 0.0
    with mock.patch.multiple(segment_pipeline, **stages), Progress(lambda: total, 0, 0, board, "out") as progress:
        rows = segment_pipeline.plan_stream([(shard, False) for shard in range(args.shards)], task, []).iter_rows()
        for number, part in enumerate(rows, start=1):
            progress.finish_shard(part["shard"], part["num_images"], {})
            if number == first:
                start_s, before = time.monotonic(), _core_seconds()
        seconds, after = time.monotonic() - start_s, _core_seconds()
    count = args.shards - first
    core_ms = {kind: 1000 * (after[kind] - before.get(kind, 0.0)) / count for kind in after}
    rate = count / seconds
    return Fleet(
        num_actors, args.shard_rows, args.pixels, rate, rate * args.shard_rows, core_ms, 1000 / core_ms["driver"]
    )


def _core_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process and of its children, by kind."""
    driver = psutil.Process()
    times = driver.cpu_times()
    seconds = {"driver": times.user + times.system}
    for process in driver.children(recursive=True):
        try:
            kind, times = kind_of(process), process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
    return seconds
