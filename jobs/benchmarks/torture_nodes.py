"""Scenarios of the torture that disturb the nodes of a cluster."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.benchmarks.torture_setup import LONGEST_S, Arena, CannotTortureError, environment
from jobs.command import start_patiently
from vlsm.errors import ResultError

_STORE: dict[str, Any] = {"object_store_memory": 100 << 20}
_KINDS: list[dict[str, Any]] = [{"num_cpus": 1}, {"num_cpus": 2, "num_gpus": 1}]  # of nodes: to decode, and for a model
_SETTINGS = "run.batch_size=1", "run.gpus_per_actor=1", "run.actors=1..2"
_FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
)


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Yield a cluster whose head has no CPUs. The models run on the nodes that declare a GPU to Ray."""
    from ray.cluster_utils import Cluster

    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_STORE}))
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _add(cluster: Any, kind: dict[str, Any]) -> Any:
    return start_patiently(lambda: cluster.add_node(**kind, **_STORE))


def kill_node(arena: Arena) -> dict[str, int]:
    """Remove a node that decodes and a node with a model, and add new ones; return the number of removed nodes."""
    output, kills = str(arena.folder / "kill_node"), 0
    with _cluster() as cluster:
        nodes = [(_add(cluster, kind), kind) for kind in _KINDS]
        job = arena.start(output, *_SETTINGS, environment={"RAY_ADDRESS": cluster.address})
        for node, kind in nodes:
            arena.wait_for_parts(output, 2, job)
            if job.poll() is None:
                cluster.remove_node(node, allow_graceful=False)
                kills += 1
                _add(cluster, kind)
        if job.wait(LONGEST_S):
            raise ResultError("the job failed after nodes were lost")
    arena.prove(output)
    return {"nodes lost": kills}


def restart_nodes(arena: Arena) -> dict[str, int]:
    """Replace all nodes one after another, as an upgrade does, the head last; return the number of replaced nodes.

    The job survives the other nodes. With the head it ends, and the same command goes on with a new cluster.
    """
    output, replaced = str(arena.folder / "restart_nodes"), 0
    with _cluster() as cluster:
        nodes = [(_add(cluster, kind), kind) for kind in _KINDS]
        job = arena.start(output, *_SETTINGS, environment={"RAY_ADDRESS": cluster.address})
        for node, kind in nodes:
            arena.wait_for_parts(output, 2, job)
            if job.poll() is None:
                _add(cluster, kind)
                cluster.remove_node(node, allow_graceful=True)
                replaced += 1
        arena.wait_for_parts(output, 1, job)
        is_over = job.poll() == 0
    if not job.wait(LONGEST_S) and not is_over:
        raise ResultError("the job ended with exit code 0 although its cluster was gone")
    if not is_over:
        replaced += 1
        arena.finish(output, "run.batch_size=1", environment={"RAY_ADDRESS": "local"})
    arena.prove(output)
    return {"nodes replaced": replaced}


def skew_clocks(arena: Arena) -> dict[str, int]:
    """Run on nodes whose clocks are an hour ahead and an hour behind that of the job; return the number of nodes."""
    library = next((path for path in _FAKETIME if Path(path).exists()), None)
    if library is None:
        raise CannotTortureError("cannot change the clock of a process: the Debian package faketime is not installed")
    output = str(arena.folder / "skew_clocks")
    with _cluster() as cluster:
        for kind, offset in zip(_KINDS, ("+1h", "-1h"), strict=True):
            with environment({"LD_PRELOAD": library, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}):
                _add(cluster, kind)
        arena.finish(output, *_SETTINGS, environment={"RAY_ADDRESS": cluster.address})
    arena.prove(output)
    return {"nodes": len(_KINDS)}
