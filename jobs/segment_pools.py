"""Plans the pools of model actors of a segment run, and the CPUs and GPUs that each pool requests from Ray."""

import math
from dataclasses import dataclass, replace
from typing import Any

from jobs.command import cluster_address, logger
from vlsm.config import MemberSettings, RunSettings, SegmentSettings, parse_range
from vlsm.errors import ConfigError
from vlsm.segmentation.finished import cpu_reason
from vlsm.segmentation.gpu_decode import check_gpu_decoding
from vlsm.words import count

_FETCH_BYTES_PX = 24.5  # of one pixel while it is decoded: a float TIFF, the largest; measured
# estimates, which nobody has measured yet: the process of a task with its shard, a mask of one model, one of several
_TASK_BYTES, _WRITE_BYTES_PX, _WRITE_SEVERAL_BYTES_PX = 400_000_000, 12, 30
_FEW_CPUS = 4  # in the cluster; with more CPUs, a writing task has room beside Ray Data's reservations


@dataclass(frozen=True)
class Pool:
    """Actors that run the same members of the ensemble, with the CPU tasks before and after them.

    Attributes:
        members: numbers of the members that each actor runs.
        num_actors: minimum and maximum number of actors; Ray Data scales the pool between them.
        num_cpus: CPUs that an actor requests from Ray.
        num_gpus: GPUs that an actor requests from Ray.
        task_cpus: CPUs that a task requests from Ray.
        num_threads: number of torch threads in an actor.
        fetch_bytes, write_bytes: memory that a task before or after the actors requests from Ray; 0 for none.
    """

    members: tuple[int, ...]
    num_actors: tuple[int, int]
    num_cpus: float
    num_gpus: float
    task_cpus: float
    num_threads: int
    fetch_bytes: int = 0
    write_bytes: int = 0

    @property
    def fetch_options(self) -> dict[str, Any]:
        """Arguments of `map_batches` for the tasks that fetch."""
        return {"batch_size": 1, "num_cpus": self.task_cpus} | _memory(self.fetch_bytes)

    @property
    def write_options(self) -> dict[str, Any]:
        """Arguments of `map_batches` for the tasks that write."""
        return {"batch_size": 1, "num_cpus": self.task_cpus} | _memory(self.write_bytes)

    def is_bound_by_memory(self, nodes: list[dict[str, Any]]) -> bool:
        """Whether some node has more CPUs than its memory holds fetching tasks: some would have nothing to do."""
        return any(
            node["Resources"].get("CPU", 0) > node["Resources"].get("memory", math.inf) / self.fetch_bytes
            for node in nodes
            if node["Alive"] and self.fetch_bytes
        )

    @property
    def actor_options(self) -> dict[str, Any]:
        """Arguments of `map_batches` for the stage of these actors."""
        import ray.data

        compute = ray.data.ActorPoolStrategy(min_size=self.num_actors[0], max_size=self.num_actors[1])
        return {"batch_size": 1, "compute": compute, "num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def prepare_pools(settings: SegmentSettings, num_shards: int) -> list[Pool]:
    """Plan the pools for the current cluster, log them, and set the share of the CPUs that Ray Data reserves."""
    import ray.data

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    pools = plan_pools(settings, nodes)
    if settings.decode == "gpu":
        check_gpu_decoding(all(pool.num_gpus for pool in pools))
    for pool in pools:
        logger.info(
            "%s; up to %s of %s with %s and %s each",
            *(count(num_shards, "shard"), count(pool.num_actors[1], "actor"), count(len(pool.members), "model")),
            *(count(pool.num_cpus, "CPU"), count(pool.num_gpus, "GPU")),
        )
        warn_if_none_fits(pool.num_cpus, pool.num_gpus, nodes)
    if pools[0].is_bound_by_memory(nodes):
        logger.info(
            "each fetching task reserves %.1f GB, for an image of %s pixels (max_pixels); a lower max_pixels lets more "
            "tasks run beside each other",
            *(pools[0].fetch_bytes / 1e9, f"{settings.max_pixels:,}"),
        )
    on_gpu = any(pool.num_gpus for pool in pools)
    if on_gpu or settings.run.finish == "device":
        reason = cpu_reason(settings, on_gpu)
        logger.info("masks are made %s", f"in the writing tasks: {reason}" if reason else "on the models' device")
    if (cpus := ray.cluster_resources().get("CPU", math.inf)) < _FEW_CPUS:  # type: ignore[no-untyped-call]
        # Ray Data rounds down the remaining CPUs. With two CPUs, an actor takes 1.25 and each of two tasks 0.18. By
        # default Ray Data reserves a sixth of the CPUs for fetching, more than one task needs, and less than one task
        # is left for writing: no part would be written before the last fetch.
        share = (2 + len(pools)) * pools[0].task_cpus / cpus
        ray.data.DataContext.get_current().op_resource_reservation_ratio = min(0.5, share)
    return pools


def check_decoding(settings: SegmentSettings) -> None:
    """Raise a ConfigError if `decode: gpu` cannot work on this machine. Of a cluster, `prepare_pools` finds out."""
    if settings.decode == "gpu" and not cluster_address():
        import torch

        check_gpu_decoding(torch.cuda.is_available() and settings.run.gpus_per_actor != 0)


def plan_pools(settings: SegmentSettings, nodes: list[dict[str, Any]]) -> list[Pool]:
    """Return one pool of all members, or one pool per member (placement "apart") that share the cluster.

    There are as many actors as GPUs in the cluster, or as nodes if it has no GPUs. CPU tasks keep room beside them.

    Without GPUs, a model has as many threads as a node has CPUs, but requests fewer CPUs from Ray, so that fetching and
    writing always run beside it. With room for only two tasks, Ray Data held back all writing until the last fetch. An
    actor requests more than half a node. Otherwise the actors of two jobs could fill a node, and both jobs would wait
    for room for their tasks.

    Raises:
        ConfigError: no node has CPUs yet, and the settings do not state the resources of an actor.
    """
    numbers = tuple(range(len(settings.members)))
    if settings.run.placement == "together":
        pools = [_pool(numbers, settings.run, nodes, 1)]
    else:
        runs = [_merge(settings.run, member) for member in settings.members]
        pools = [_pool((number,), run, nodes, len(runs)) for number, run in enumerate(runs)]
    return [_with_memory(pool, settings, nodes) for pool in pools]


def _merge(run: RunSettings, member: MemberSettings) -> RunSettings:
    """Return the run's settings with the number and resources of actors that a member sets itself."""
    member_settings = {name: getattr(member, name) for name in ("actors", "gpus_per_actor", "cpus_per_actor")}
    return run.model_copy(update={name: value for name, value in member_settings.items() if value is not None})


def _pool(members: tuple[int, ...], run: RunSettings, nodes: list[dict[str, Any]], num_pools: int) -> Pool:
    # a head node may have no CPUs, and may be the only node until the autoscaler sees the requests
    resources = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    gpus = sum(node.get("GPU", 0) for node in resources)
    cpus = min((node["CPU"] for node in resources), default=math.inf)
    num_gpus = run.gpus_per_actor
    if not resources and not num_gpus and not run.cpus_per_actor:
        raise ConfigError(
            "no node of the cluster has CPUs yet: state the resources of an actor on the nodes to be started, "
            "--set run.gpus_per_actor=1 or --set run.cpus_per_actor=4, and the number of actors, --set run.actors=1..8"
        )
    if num_gpus is None:
        num_gpus = min(1.0, int(100 * gpus / num_pools) / 100) if gpus else 0.0
    share = max(0.625 * cpus, cpus - 1) / num_pools
    num_cpus = run.cpus_per_actor or (1.0 if num_gpus else share)
    num_threads = math.ceil(num_cpus) if num_gpus or run.cpus_per_actor else max(1, int(cpus / num_pools))
    num_actors = parse_range(
        run.actors, max(1, int(gpus / num_gpus / num_pools)) if num_gpus else max(1, len(resources))
    )
    if ".." not in str(run.actors):
        num_actors = 1, num_actors[1]
    # with equal CPUs, Ray would fuse the fetching tasks into the actors, and the model would wait for the decoding
    task_cpus = 0.75 if num_gpus else min(0.25, 0.09 * cpus)
    task_cpus = task_cpus / 2 if task_cpus == num_cpus else task_cpus
    return Pool(members, num_actors, num_cpus, num_gpus, task_cpus, num_threads)


def _with_memory(pool: Pool, settings: SegmentSettings, nodes: list[dict[str, Any]]) -> Pool:
    """Return the pool with the memory that its tasks request, for the largest image that the settings admit.

    Ray then starts no more tasks on a node than its memory holds. A small node still has room for four tasks, and a
    larger one for one task per two CPUs: few archives have images as large as `max_pixels`.
    """
    shares = [
        node["Resources"]["memory"] / max(4, node["Resources"]["CPU"] / 2)
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU") and node["Resources"].get("memory")
    ]
    most_bytes = min(shares, default=0)  # a cluster without nodes yet: what they will have is unknown
    num_members = len(settings.members)
    needs = (_FETCH_BYTES_PX, _WRITE_BYTES_PX if num_members == 1 else _WRITE_SEVERAL_BYTES_PX)
    fetch_bytes, write_bytes = (
        int(min(most_bytes, _TASK_BYTES + bytes_px * settings.max_pixels)) for bytes_px in needs
    )
    return replace(pool, fetch_bytes=fetch_bytes, write_bytes=write_bytes)


def _memory(num_bytes: int) -> dict[str, int]:
    return {"memory": num_bytes} if num_bytes else {}


def warn_if_none_fits(num_cpus: float, num_gpus: float, nodes: list[dict[str, Any]]) -> None:
    """Log a warning if no node of the cluster has room for an actor or worker, because the run then waits."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in resources):
        logger.warning(
            "waiting for a node with %s and %s: none of %d has them; if none will start, request less",
            *(count(num_cpus, "CPU"), count(num_gpus, "GPU"), len(resources)),
        )
