"""The segment job under deliberate faults, with a check of every row after each scenario.

Every scenario runs the job as a user does, disturbs it, runs it again until it is done, and then checks the output:
each planned row exists once, each mask matches its row, and all rows equal those of an undisturbed run.
"""

import contextlib
import os
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.benchmarks.figures import write_json
from jobs.benchmarks.stores import BUCKET, FaultyProxy, S3Server
from jobs.benchmarks.torture_setup import LONGEST_S, Arena, num_parts
from jobs.command import start_patiently
from vlsm.errors import ResultError, VlsmError


class CannotTortureError(VlsmError):
    """This machine lacks something that a scenario needs."""


def kill_driver(arena: Arena) -> dict[str, int]:
    """Kill the job at random moments and restart it, until it is done; return the number of kills."""
    output, kills = str(arena.folder / "kill_driver"), 0
    shards = num_parts(str(arena.folder / "undisturbed"))
    while True:
        job = arena.start(output, "run.batch_size=1")
        arena.wait_for_parts(output, arena.random.randint(1, max(1, shards // 3)), job)
        time.sleep(arena.random.uniform(0, 0.3))
        if (code := job.poll()) is not None:
            if code:
                raise ResultError(f"the job failed by itself with exit code {code}")
            break
        job.kill()
        kills += 1
        job.wait()
    arena.prove(output)
    return {"kills": kills}


def kill_actor(arena: Arena) -> dict[str, int]:
    """Kill the processes of model actors and tasks during their work; return the number of kills."""
    output, kills = str(arena.folder / "kill_actor"), 0
    job = arena.start(output, "run.batch_size=1")
    for title in ("SegmentActor", "fetch_shard", "SegmentActor", "write_masks"):
        arena.wait_for_parts(output, 1, job)
        for process in _ray_processes(title):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                kills += 1
    if job.wait(LONGEST_S):
        raise ResultError("the job failed after its workers were killed")
    arena.prove(output)
    return {"kills": kills}


def stop_actor(arena: Arena) -> dict[str, int]:
    """Pause one of two model actors while the other one has work; return the shards that were written meanwhile."""
    output, assigned = (
        str(arena.folder / "stop_actor"),
        6,
    )  # shards that Ray assigns to an actor in advance, and a margin
    job = arena.start(output, "run.actors=2..2", "run.cpus_per_actor=0.5", "shard_rows=2", "run.batch_size=1")
    arena.wait_for_parts(output, 1, job)
    actors = _ray_processes("SegmentActor")
    if len(actors) < 2:
        raise ResultError(f"there are {len(actors)} model actors; there should be 2")
    before = num_parts(output)
    actors[0].suspend()
    try:
        arena.wait_for_parts(output, arena.num_images - assigned - before, job)
        meanwhile = num_parts(output) - before
    finally:
        actors[0].resume()
    if job.wait(LONGEST_S):
        raise ResultError("the job failed after an actor was paused")
    if before + meanwhile < arena.num_images - assigned:
        raise ResultError(f"the other actor wrote only {meanwhile} of {arena.num_images - before} shards meanwhile")
    arena.prove(output)
    return {"shards done beside it": meanwhile}


def _ray_processes(title: str) -> list[psutil.Process]:
    """Return the Ray workers below this process whose title contains `title`."""
    processes = []
    for process in psutil.Process().children(recursive=True):  # Ray runs below this process or below its job
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::") and any(title in word for word in process.cmdline()):
                processes.append(process)
    return processes


def kill_node(arena: Arena) -> dict[str, int]:
    """Remove a node that decodes and a node with a model, and add new ones; return the number of removed nodes.

    The head has no CPUs. The models run on the node that declares a GPU to Ray.
    """
    from ray.cluster_utils import Cluster

    output, kills = str(arena.folder / "kill_node"), 0
    store: dict[str, Any] = {"object_store_memory": 100 << 20}
    kinds: list[dict[str, Any]] = [{"num_cpus": 1}, {"num_cpus": 2, "num_gpus": 1}]
    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store}))

    def add(kind: dict[str, Any]) -> Any:
        return start_patiently(lambda: cluster.add_node(**kind, **store))

    try:
        nodes = [(add(kind), kind) for kind in kinds]
        settings = "run.batch_size=1", "run.gpus_per_actor=1", "run.actors=1..2"
        job = arena.start(output, *settings, environment={"RAY_ADDRESS": cluster.address})
        for node, kind in nodes:
            arena.wait_for_parts(output, 2, job)
            if job.poll() is None:
                cluster.remove_node(node, allow_graceful=False)
                kills += 1
                add(kind)
        if job.wait(LONGEST_S):
            raise ResultError("the job failed after nodes were lost")
    finally:
        cluster.shutdown()
    arena.prove(output)
    return {"nodes lost": kills}


@contextlib.contextmanager
def _environment(names: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and restore them at the end of the context."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _store(arena: Arena, name: str) -> Iterator[tuple[S3Server, str, str]]:
    """Start a store that holds the archive; yield the server, INPUT and OUTPUT."""
    import s3fs

    server = S3Server(arena.folder / f"store of {name}")
    server.start()
    try:
        with _environment(server.environment()):
            s3fs.S3FileSystem.clear_instance_cache()  # cached clients use another server
            fs = s3fs.S3FileSystem()
            fs.put(f"{arena.archive}/", f"{BUCKET}/archive/", recursive=True)
            yield server, f"s3://{BUCKET}/archive", f"s3://{BUCKET}/{name}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.kill()


def restart_store(arena: Arena) -> dict[str, int]:
    """Kill the object store twice during a run, and start it again some seconds later; return the number of kills."""
    kills = 0
    with _store(arena, "restart_store") as (server, source, output):
        # a new cluster for this job: workers take the address of the store from their environment
        job = arena.start(output, "run.batch_size=1", source=source, environment={"RAY_ADDRESS": "local"})
        for _ in range(2):
            time.sleep(arena.random.uniform(12, 18))
            if job.poll() is None:
                server.kill()
                kills += 1
                time.sleep(arena.random.uniform(2, 6))
                server.start()
        if job.wait(LONGEST_S):
            raise ResultError("the job failed after its store was restarted")
        arena.prove(output)
    return {"kills": kills}


def faulty_store(arena: Arena) -> dict[str, int]:
    """Inject faults into about 9 % of the requests to the store; return the number of faults by name."""
    rates = {"error": 0.02, "slow_down": 0.02, "reset": 0.02, "lost": 0.01, "truncate": 0.02, "stall": 0.003}
    with _store(arena, "faulty_store") as (server, source, output):
        proxy = FaultyProxy(server.address, rates, arena.stall_s, arena.seed)
        with proxy.serve():
            environment = server.environment(proxy.address) | {"RAY_ADDRESS": "local"}
            arena.finish(output, source=source, environment=environment)
        arena.prove(output)
    return dict(proxy.faults)


def fill_disk(arena: Arena) -> dict[str, int]:
    """Fill the disk of the output during a run, free it, and continue; return the number of parts before."""
    disk = arena.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise CannotTortureError(f"cannot mount a small disk (needs root): {mounted.stderr.strip()}")
    output = str(disk / "out")
    try:
        job = arena.start(output, "run.batch_size=1")
        arena.wait_for_parts(output, 2, job)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        if not job.wait(LONGEST_S):
            raise ResultError("the job ended with exit code 0 although the disk was full")
        if "No space left on device" not in (arena.folder / "jobs.log").read_text():
            raise ResultError("the log of the job does not contain 'No space left on device'")
        parts_before = num_parts(output)
        (disk / "filler").unlink()
        arena.finish(output)
        arena.prove(output)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return {"parts before": parts_before}


def run_twice(arena: Arena) -> dict[str, int]:
    """Start the same job twice on one output at the same time; return the number of jobs."""
    output = str(arena.folder / "run_twice")
    jobs = [arena.start(output) for _ in range(2)]
    codes = [job.wait(LONGEST_S) for job in jobs]
    if any(codes):
        raise ResultError(f"the jobs ended with exit codes {codes}; both should be 0")
    arena.prove(output)
    return {"jobs": len(jobs)}


SCENARIOS: dict[str, Callable[[Arena], dict[str, int]]] = {
    scenario.__name__: scenario
    for scenario in (
        kill_driver,
        kill_actor,
        stop_actor,
        kill_node,
        restart_store,
        faulty_store,
        fill_disk,
        run_twice,
    )
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark torture`."""
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="may be repeated (default: all)")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="images in the archive (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of images and times (0)")


def measure(args: Namespace) -> int:
    """Disturb the segment job in several scenarios, and check after each that no row is missing, duplicate or wrong."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), args.images, seed=args.seed)
        arena.prepare()
        print(f"{len(arena.expected):,} rows, undisturbed: proved")
        for scenario in args.scenario or SCENARIOS:
            started_s = time.monotonic()
            try:
                disturbances, outcome = SCENARIOS[scenario](arena), "proved"
            except CannotTortureError as error:
                disturbances, outcome = {}, f"left out: {error}"
            except VlsmError as error:
                disturbances, outcome = {}, f"FAILED: {error}"
                arena.stop()
            seconds = time.monotonic() - started_s
            counts = ", ".join(f"{count} {name}" for name, count in disturbances.items())
            print(f"{scenario:14} {seconds:7.0f} s  {counts}: {outcome}", flush=True)
            results.append({"scenario": scenario, "seconds": round(seconds, 1), **disturbances, "outcome": outcome})
    write_json(args.json, "torture", {"images": args.images, "seed": args.seed, "runs": results})
    return int(any(str(result["outcome"]).startswith("FAILED") for result in results))


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"{figures['images']:,} images:",
        "",
        "| scenario | seconds | disturbances | outcome |",
        "|---|---|---|---|",
    ]
    for result in figures["runs"]:
        faults = {key: value for key, value in result.items() if key not in ("scenario", "seconds", "outcome")}
        counts = ", ".join(f"{count} {name}" for name, count in faults.items())
        lines.append(f"| {result['scenario']} | {result['seconds']:.0f} | {counts} | {result['outcome']} |")
    return lines
