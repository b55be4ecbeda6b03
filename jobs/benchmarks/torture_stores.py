"""Scenarios of the torture that disturb the store of a run: S3 with faults, and a disk that is full."""

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import psutil

from jobs.benchmarks.stores import BUCKET, FaultyProxy, S3Server
from jobs.benchmarks.torture_jobs import ray_processes
from jobs.benchmarks.torture_setup import LONGEST_S, Arena, CannotTortureError, environment, num_parts
from vlsm.errors import ResultError


@contextlib.contextmanager
def _store(arena: Arena, name: str) -> Iterator[tuple[S3Server, str, str]]:
    """Start a store that holds the archive; yield the server, INPUT and OUTPUT."""
    import s3fs

    server = S3Server(arena.folder / f"store of {name}")
    server.start()
    try:
        with environment(server.environment()):
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


def slow_network(arena: Arena) -> dict[str, int]:
    """Delay a third of the requests to the store, and send a tenth of them twice; return the number of faults."""
    with _store(arena, "slow_network") as (server, source, output):
        proxy = FaultyProxy(server.address, {"delay": 0.3, "duplicate": 0.1}, seed=arena.seed)
        with proxy.serve():
            variables = server.environment(proxy.address) | {"RAY_ADDRESS": "local"}
            arena.finish(output, source=source, environment=variables)
        arena.prove(output)
    return dict(proxy.faults)


def stale_listing(arena: Arena) -> dict[str, int]:
    """Kill the job, and resume it from a store whose listings are old half of the time; return the number of those."""
    with _store(arena, "stale_listing") as (server, source, output):
        proxy = FaultyProxy(server.address, {"stale": 0.5}, seed=arena.seed)
        with proxy.serve():
            variables = server.environment(proxy.address) | {"RAY_ADDRESS": "local"}
            job = arena.start(output, "run.batch_size=1", source=source, environment=variables)
            arena.wait_for_parts(output, 2, job)
            job.kill()
            job.wait()
            arena.finish(output, source=source, environment=variables)
        arena.prove(output)
    return dict(proxy.faults)


def kill_at_random(arena: Arena) -> dict[str, int]:
    """Kill drivers, actors, tasks, nodes and the store in one run, in random order; return the number of kills of each.

    Each kill waits for a part that is written after the last one, so that a run of many kills has an end.
    """
    kills = Counter[str]()
    with _store(arena, "kill_at_random") as (server, source, output):

        def start() -> "subprocess.Popen[str]":
            return arena.start(output, "run.batch_size=1", source=source, environment={"RAY_ADDRESS": "local"})

        job = start()
        while kills.total() < arena.num_kills:
            arena.wait_for_parts(output, 1, job)
            time.sleep(arena.random.uniform(0, 1))
            if job.poll() is not None:
                break
            victim = arena.random.choice(["driver", "node", "actor", "task", "store"])
            kills[victim] += _kill(victim, job, server, arena)
            if victim in ("driver", "node"):
                job.wait(LONGEST_S)
                job = start()
        if code := job.wait(LONGEST_S):
            raise ResultError(f"the job failed by itself with exit code {code} after {dict(kills)}")
        # an image during which its process was killed twice counts as its cause; it is done again on demand
        arena.finish(output, "retry_failed=true", source=source, environment={"RAY_ADDRESS": "local"})
        arena.prove(output)
    return dict(kills)


def _kill(victim: str, job: "subprocess.Popen[str]", server: S3Server, arena: Arena) -> int:
    """Kill one victim; return the number of kills. A killed store is started again some seconds later."""
    if victim == "store":
        server.kill()
        time.sleep(arena.random.uniform(1, 5))
        server.start()
    elif victim == "driver":
        job.kill()
    else:
        names = {"node": ["raylet"], "actor": ["SegmentActor"], "task": ["fetch_shard", "write_masks"]}[victim]
        found = [process for name in names for process in ray_processes(name)]
        if not found:
            return 0
        with contextlib.suppress(psutil.NoSuchProcess):
            arena.random.choice(found).kill()
    return 1
