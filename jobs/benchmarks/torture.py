"""The segment job with everything that can break broken on purpose, and each time the proof by counting.

Every scenario runs the job as a user does, disturbs it, runs it again until it is done, and then compares: planned rows
are there once each, every mask says what its row says, and all equal those of a run that nobody disturbed.
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
from vlsm.errors import ResultError, VlsmError


class CannotTortureError(VlsmError):
    """This machine has not what a scenario needs."""


def kill_driver(arena: Arena) -> dict[str, int]:
    """The job is killed at random moments, again and again until it is done."""
    output, kills = str(arena.folder / "kill_driver"), 0
    shards = num_parts(str(arena.folder / "undisturbed"))
    while True:
        job = arena.start(output, "run.batch_size=1")
        arena.wait_for_parts(output, arena.random.randint(1, max(1, shards // 3)), job)
        time.sleep(arena.random.uniform(0, 0.3))
        if (code := job.poll()) is not None:
            if code:
                raise ResultError(f"the job ended by itself with exit code {code}")
            break
        job.kill()
        kills += 1
        job.wait()
    arena.prove(output)
    return {"kills": kills}


def kill_actor(arena: Arena) -> dict[str, int]:
    """The processes of model actors and of tasks are killed in the middle of their work."""
    output, kills = str(arena.folder / "kill_actor"), 0
    job = arena.start(output, "run.batch_size=1")
    for what in ("SegmentActor", "fetch_shard", "SegmentActor", "write_masks"):
        arena.wait_for_parts(output, 1, job)
        for process in _ray_processes(what):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                kills += 1
    if job.wait(LONGEST_S):
        raise ResultError("the job did not survive its workers")
    arena.prove(output)
    return {"kills": kills}


def stop_actor(arena: Arena) -> dict[str, int]:
    """One of two model actors stands still for as long as the other finds something to do."""
    output, in_hand = str(arena.folder / "stop_actor"), 6  # shards that Ray gives to an actor in advance, and some
    job = arena.start(output, "run.actors=2..2", "run.cpus_per_actor=0.5", "shard_rows=2", "run.batch_size=1")
    arena.wait_for_parts(output, 1, job)
    actors = _ray_processes("SegmentActor")
    if len(actors) < 2:
        raise ResultError(f"there are {len(actors)} model actors and not two")
    before = num_parts(output)
    actors[0].suspend()
    try:
        arena.wait_for_parts(output, arena.num_images - in_hand - before, job)
        meanwhile = num_parts(output) - before
    finally:
        actors[0].resume()
    if job.wait(LONGEST_S):
        raise ResultError("the job did not survive an actor that stood still")
    if before + meanwhile < arena.num_images - in_hand:
        raise ResultError(f"only {meanwhile} of {arena.num_images - before} shards were done beside it")
    arena.prove(output)
    return {"shards done beside it": meanwhile}


def _ray_processes(what: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):  # of the cluster of this process or of its job
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::") and any(what in word for word in process.cmdline()):
                found.append(process)
    return found


def kill_node(arena: Arena) -> dict[str, int]:
    """Nodes of a cluster are lost with all that runs on them, and replaced: one that decodes and one with a model.

    The head has no CPUs; the models stand where there is a GPU, as Ray sees it.
    """
    from ray.cluster_utils import Cluster

    output, kills = str(arena.folder / "kill_node"), 0
    store = {"object_store_memory": 100 << 20}
    kinds = {"num_cpus": 1}, {"num_cpus": 2, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    try:
        nodes = [(cluster.add_node(**kind, **store), kind) for kind in kinds]
        settings = "run.batch_size=1", "run.gpus_per_actor=1", "run.actors=1..2"
        job = arena.start(output, *settings, environment={"RAY_ADDRESS": cluster.address})
        for node, kind in nodes:
            arena.wait_for_parts(output, 2, job)
            if job.poll() is None:
                cluster.remove_node(node, allow_graceful=False)
                kills += 1
                cluster.add_node(**kind, **store)
        if job.wait(LONGEST_S):
            raise ResultError("the job did not survive its nodes")
    finally:
        cluster.shutdown()
    arena.prove(output)
    return {"nodes lost": kills}


@contextlib.contextmanager
def _environment(names: dict[str, str]) -> Iterator[None]:
    """Of this process, for a while."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _store(arena: Arena, name: str) -> Iterator[tuple[S3Server, str, str]]:
    """A store with the archive in it: the server, INPUT and OUTPUT."""
    import s3fs

    server = S3Server(arena.folder / f"store of {name}")
    server.start()
    try:
        with _environment(server.environment()):
            s3fs.S3FileSystem.clear_instance_cache()  # which lead to another server
            fs = s3fs.S3FileSystem()
            fs.put(f"{arena.archive}/", f"{BUCKET}/archive/", recursive=True)
            yield server, f"s3://{BUCKET}/archive", f"s3://{BUCKET}/{name}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.kill()


def restart_store(arena: Arena) -> dict[str, int]:
    """The object store's server is killed in the middle of a run, twice, and comes back after some seconds."""
    kills = 0
    with _store(arena, "restart_store") as (server, source, output):
        # a cluster of the job's own: its workers take the store's address from its environment
        job = arena.start(output, "run.batch_size=1", source=source, environment={"RAY_ADDRESS": "local"})
        for _ in range(2):
            time.sleep(arena.random.uniform(12, 18))
            if job.poll() is None:
                server.kill()
                kills += 1
                time.sleep(arena.random.uniform(2, 6))
                server.start()
        if job.wait(LONGEST_S):
            raise ResultError("the job did not survive its store")
        arena.prove(output)
    return {"kills": kills}


def faulty_store(arena: Arena) -> dict[str, int]:
    """A store that answers 500, 503, resets, stalls or ends bodies early, at some percent of requests."""
    rates = {"error": 0.02, "slow_down": 0.02, "reset": 0.02, "lost": 0.01, "truncate": 0.02, "stall": 0.003}
    with _store(arena, "faulty_store") as (server, source, output):
        proxy = FaultyProxy(server.address, rates, arena.stall_s, arena.seed)
        with proxy.serve():
            environment = server.environment(proxy.address) | {"RAY_ADDRESS": "local"}
            arena.finish(output, source=source, environment=environment)
        arena.prove(output)
    return dict(proxy.faults)


def fill_disk(arena: Arena) -> dict[str, int]:
    """The disk of the output is full in the middle of a run; with room again the same command goes on."""
    disk = arena.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise CannotTortureError(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    output = str(disk / "out")
    try:
        job = arena.start(output, "run.batch_size=1")
        arena.wait_for_parts(output, 2, job)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        if not job.wait(LONGEST_S):
            raise ResultError("the job did not notice that the disk was full")
        if "No space left on device" not in (arena.folder / "jobs.log").read_text():
            raise ResultError("the job did not say that the disk was full")
        done = num_parts(output)
        (disk / "filler").unlink()
        arena.finish(output)
        arena.prove(output)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return {"parts before": done}


def run_twice(arena: Arena) -> dict[str, int]:
    """The same job is started twice at the same time on one output: both end, and each row is there once."""
    output = str(arena.folder / "run_twice")
    jobs = [arena.start(output) for _ in range(2)]
    codes = [job.wait(LONGEST_S) for job in jobs]
    if any(codes):
        raise ResultError(f"the jobs ended with exit codes {codes}")
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
    """Those of `python -m jobs.benchmark torture`."""
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="all of them by default")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="of the archive (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of images and moments (0)")


def measure(args: Namespace) -> int:
    """The segment job, disturbed in every way; each scenario ends with the proof that no row is lost or done twice."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), args.images, seed=args.seed)
        arena.prepare()
        print(f"{len(arena.expected):,} rows, undisturbed: proved")
        for name in args.scenario or SCENARIOS:
            started_s = time.monotonic()
            try:
                disturbances, outcome = SCENARIOS[name](arena), "proved"
            except CannotTortureError as error:
                disturbances, outcome = {}, f"left out: {error}"
            except VlsmError as error:
                disturbances, outcome = {}, f"FAILED: {error}"
                arena.stop()
            seconds = time.monotonic() - started_s
            told = ", ".join(f"{count} {what}" for what, count in disturbances.items())
            print(f"{name:14} {seconds:7.0f} s  {told}: {outcome}", flush=True)
            results.append({"scenario": name, "seconds": round(seconds, 1), **disturbances, "outcome": outcome})
    write_json(args.json, "torture", {"images": args.images, "seed": args.seed, "runs": results})
    return int(any(str(result["outcome"]).startswith("FAILED") for result in results))


def tell(figures: dict[str, Any]) -> list[str]:
    """The README's lines of what was measured."""
    lines = [
        f"{figures['images']:,} images:",
        "",
        "| scenario | seconds | disturbances | outcome |",
        "|---|---|---|---|",
    ]
    for result in figures["runs"]:
        about = {key: value for key, value in result.items() if key not in ("scenario", "seconds", "outcome")}
        told = ", ".join(f"{count} {what}" for what, count in about.items())
        lines.append(f"| {result['scenario']} | {result['seconds']:.0f} | {told} | {result['outcome']} |")
    return lines
