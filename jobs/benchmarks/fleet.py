"""Many GPUs under one driver, simulated on this machine: what bounds the images per second of a segment run."""

import os
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import psutil

from jobs import segment_pipeline
from jobs.benchmarks import fleet_stages
from jobs.benchmarks.cost import kind_of
from jobs.benchmarks.figures import write_json
from vlsm.config import MemberSettings, RunSettings, SegmentSettings
from vlsm.images.preprocess import Square

_TASK_CPUS = 6  # of the simulated cluster beside its actors: eight tasks at once
_WARM_SHARDS = 0.25  # share of the shards before the measurement
_Times = dict[tuple[int, float], tuple[str, float]]  # kind and CPU seconds of a process, by its number and its start


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


def _simulate(num_actors: int, args: Namespace) -> Fleet:
    import ray

    from jobs.crash_watch import CrashBoard, start_board
    from jobs.progress import Progress

    segment_pipeline.configure_ray_data()
    ray.data.DataContext.get_current().enable_progress_bars = False
    run = RunSettings(actors=f"{num_actors}..{num_actors}")  # all of them, also where these cores cannot feed them
    settings = SegmentSettings(input="in", output="out", members=(MemberSettings(checkpoint="none"),), run=run)
    board = start_board(CrashBoard, {"start": time.time()})
    squares = (Square(fleet_stages.SIDE_PX),)
    simulation = args.shard_rows, args.rate, args.pixels
    task = fleet_stages.Simulated(settings, "run", "plan", squares, False, board, *simulation)
    stages = {name: getattr(fleet_stages, name) for name in ("fetch_shard", "SegmentActor", "write_masks")}
    total = args.shards * args.shard_rows
    first, before = int(args.shards * _WARM_SHARDS), _Times()
    start_s = 0.0
    with mock.patch.multiple(segment_pipeline, **stages), Progress(lambda: total, 0, 0, board, "out") as progress:
        rows = segment_pipeline.plan_stream([(shard, False) for shard in range(args.shards)], task, []).iter_rows()
        for number, part in enumerate(rows, start=1):
            progress.finish_shard(part["shard"], part["num_images"], {})
            if number == first:
                before, start_s = _core_seconds(), time.monotonic()
        seconds, after = time.monotonic() - start_s, _core_seconds()
    count = args.shards - first
    core_ms = dict[str, float]()
    for process, (kind, core_s) in after.items():
        core_ms[kind] = core_ms.get(kind, 0.0) + 1000 * (core_s - before.get(process, (kind, 0.0))[1]) / count
    rate = count / seconds
    return Fleet(
        num_actors, args.shard_rows, args.pixels, rate, rate * args.shard_rows, core_ms, 1000 / core_ms["driver"]
    )


def _core_seconds() -> _Times:
    """Return the kind and the CPU seconds of this process and of its children.

    A worker changes its kind with each task: that of the later reading counts. A worker that has ended is not counted.
    """
    driver, found = psutil.Process(), _Times()
    for process in [*driver.children(recursive=True), driver]:
        try:
            times, kind = process.cpu_times(), "driver" if process == driver else kind_of(process)
            found[process.pid, process.create_time()] = kind, times.user + times.system
        except psutil.Error:  # it has ended meanwhile
            continue
    return found
