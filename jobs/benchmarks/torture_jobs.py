"""Scenarios of the torture that disturb jobs and their processes."""

import contextlib
import shutil
import subprocess
import time

import psutil

from jobs.benchmarks.torture_setup import LONGEST_S, ROOT, Arena, num_parts
from vlsm.errors import ResultError
from vlsm.version import __version__


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
        for process in ray_processes(title):
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
    actors = ray_processes("SegmentActor")
    if len(actors) < 2:
        raise ResultError(f"there are {len(actors)} model actors; there should be 2")
    before = num_parts(output)
    actors[0].suspend()
    try:
        arena.wait_for_parts(output, arena.num_images - assigned - before, job)
        meanwhile = num_parts(output) - before
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # the job ends a process that is silent for too long
            actors[0].resume()
    if job.wait(LONGEST_S):
        raise ResultError("the job failed after an actor was paused")
    if before + meanwhile < arena.num_images - assigned:
        raise ResultError(f"the other actor wrote only {meanwhile} of {arena.num_images - before} shards meanwhile")
    arena.prove(output)
    return {"shards done beside it": meanwhile}


def run_twice(arena: Arena) -> dict[str, int]:
    """Start the same job twice on one output at the same time; return the number of jobs."""
    output = str(arena.folder / "run_twice")
    _end_together([arena.start(output) for _ in range(2)])
    arena.prove(output)
    return {"jobs": 2}


def two_versions(arena: Arena) -> dict[str, int]:
    """Start the job of this and of another version on one output at the same time; return the number of jobs."""
    output, other = str(arena.folder / "two_versions"), arena.folder / "other version"
    for package in ("vlsm", "jobs"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    version = other / "vlsm" / "version.py"
    version.write_text(version.read_text().replace(__version__, f"{__version__}.post1"))
    _end_together([arena.start(output), arena.start(output, root=other)])
    arena.prove(output)
    return {"jobs": 2}


def _end_together(jobs: "list[subprocess.Popen[str]]") -> None:
    codes = [job.wait(LONGEST_S) for job in jobs]
    if any(codes):
        raise ResultError(f"the jobs ended with exit codes {codes}; both should be 0")


def ray_processes(title: str) -> list[psutil.Process]:
    """Return the Ray workers below this process whose title contains `title`; for "raylet", the processes of nodes."""
    processes = []
    for process in psutil.Process().children(recursive=True):  # Ray runs below this process or below its job
        with contextlib.suppress(psutil.NoSuchProcess):
            is_worker = process.name().startswith("ray::") and any(title in word for word in process.cmdline())
            if process.name() == title == "raylet" or is_worker:
                processes.append(process)
    return processes
