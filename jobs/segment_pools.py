"""Where a run's models stand: the pools of actors that it has, and what Ray is asked for each."""

import math
from dataclasses import dataclass
from typing import Any

from jobs.command import logger
from vlsm.config import MemberSettings, RunSettings, SegmentSettings, parse_range
from vlsm.errors import ConfigError

_FEW_CPUS = 4  # of all nodes: with more there is room for a task beside what Ray Data reserves


@dataclass(frozen=True)
class Pool:
    """Actors with the same members of the ensemble, and the CPU tasks before and after them.

    Attributes:
        members: numbers of the members that each actor holds.
        num_actors: the fewest and the most, between which the pool follows the work.
        num_cpus, num_gpus: that Ray is asked for an actor.
        task_cpus: that Ray is asked for a task.
        num_threads: that torch uses in an actor.
    """

    members: tuple[int, ...]
    num_actors: tuple[int, int]
    num_cpus: float
    num_gpus: float
    task_cpus: float
    num_threads: int

    @property
    def task_options(self) -> dict[str, Any]:
        """The arguments of `map_batches` for a stage of CPU tasks."""
        return {"batch_size": 1, "num_cpus": self.task_cpus}

    @property
    def actor_options(self) -> dict[str, Any]:
        """The arguments of `map_batches` for the stage of these actors."""
        import ray.data

        compute = ray.data.ActorPoolStrategy(min_size=self.num_actors[0], max_size=self.num_actors[1])
        return {"batch_size": 1, "compute": compute, "num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def prepare_pools(settings: SegmentSettings, num_shards: int) -> list[Pool]:
    """Plan the pools for the present cluster, log them, and let Ray Data reserve what its tasks need beside them."""
    import ray.data

    nodes = ray.nodes()
    pools = plan_pools(settings, nodes)
    for pool in pools:
        logger.info(
            "%d shards; up to %d actors of %d models with %s CPUs and %s GPUs each",
            *(num_shards, pool.num_actors[1], len(pool.members), pool.num_cpus, pool.num_gpus),
        )
        warn_if_none_fits(pool.num_cpus, pool.num_gpus, nodes)
    if (cpus := ray.cluster_resources().get("CPU", math.inf)) < _FEW_CPUS:
        # Ray Data rounds down the CPUs that are left: of two CPUs a run has an actor's 1.25 and 0.18 for each of two
        # tasks. It would reserve a sixth of that for fetching, more than one task, and leave less than one for writing:
        # no part was written before the last fetch
        share = (2 + len(pools)) * pools[0].task_cpus / cpus
        ray.data.DataContext.get_current().op_resource_reservation_ratio = min(0.5, share)
    return pools


def plan_pools(settings: SegmentSettings, nodes: list[dict[str, Any]]) -> list[Pool]:
    """One pool of all members, or one for each (placement "apart"), which share what the cluster has.

    As many actors as the cluster has GPUs, or nodes; CPU tasks keep room beside them.

    Without GPUs the models have as many threads as a node has CPUs, but ask Ray for less, so that fetching and writing
    can always run beside them: with room for two tasks, Ray Data held all writing back until the last fetch. They ask
    for more than half a node, so that the actors of two jobs can never take all of it and both wait for their tasks.
    """
    everybody = tuple(range(len(settings.members)))
    if settings.run.placement == "together":
        return [_pool(everybody, settings.run, nodes, 1)]
    count = len(everybody)
    return [_pool((number,), _merge(settings.run, settings.members[number]), nodes, count) for number in everybody]


def warn_if_none_fits(num_cpus: float, num_gpus: float, nodes: list[dict[str, Any]]) -> None:
    """Say what a run waits for, where no node of the cluster has room for one of its actors or workers."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in resources):
        logger.warning(
            "no node has %g CPUs and %g GPUs yet: the run waits until one is started; if none will be, ask for less",
            *(num_cpus, num_gpus),
        )


def _merge(run: RunSettings, member: MemberSettings) -> RunSettings:
    """What a run asks for an actor, where its member does not say otherwise."""
    own = {name: getattr(member, name) for name in ("actors", "gpus_per_actor", "cpus_per_actor")}
    return run.model_copy(update={name: value for name, value in own.items() if value is not None})


def _pool(members: tuple[int, ...], run: RunSettings, nodes: list[dict[str, Any]], num_pools: int) -> Pool:
    # a head may have no CPUs, and be all that there is until the autoscaler has seen what is asked for
    resources = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    gpus = sum(node.get("GPU", 0) for node in resources)
    cpus = min((node["CPU"] for node in resources), default=math.inf)
    num_gpus = run.gpus_per_actor
    if not resources and not num_gpus and not run.cpus_per_actor:
        raise ConfigError(
            "no node of the cluster has CPUs yet: tell what those that are to be started have, "
            "--set run.gpus_per_actor=1 or --set run.cpus_per_actor=4, and how many actors, --set run.actors=1..8"
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
    # unequal CPUs keep Ray from fusing the fetching tasks into the actors, which would decode on the model's time
    task_cpus = 0.75 if num_gpus else min(0.25, 0.09 * cpus)
    task_cpus = task_cpus / 2 if task_cpus == num_cpus else task_cpus
    return Pool(members, num_actors, num_cpus, num_gpus, task_cpus, num_threads)
