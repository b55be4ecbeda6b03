"""What Ray is asked for, by what a cluster has."""

import pytest

from jobs.segment_pools import plan_pools, warn_if_none_fits
from vlsm.config import SegmentSettings, load_settings
from vlsm.errors import ConfigError

SMALL = [{"Alive": True, "Resources": {"CPU": 2.0}}]
GPUS = [
    {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}},
    {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}},
]


def plan(nodes, *words, members=2):
    arguments = {"input": "in", "output": "out", "members": [{"checkpoint": "c"}] * members}
    return plan_pools(load_settings(SegmentSettings, None, list(words), arguments), nodes)


def test_a_run_that_waits_for_a_node_says_for_which(caplog):
    warn_if_none_fits(1, 1, SMALL)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for a node with 1 CPU and 1 GPU: none of 1 has them; if none will start, request less"
    ]
    warn_if_none_fits(1, 1, GPUS)
    warn_if_none_fits(1.25, 0, SMALL)
    assert len(caplog.records) == 1


def test_together_they_are_one_pool_of_all():
    (pool,) = plan(SMALL)
    assert (pool.members, pool.num_actors, pool.num_threads) == ((0, 1), (1, 1), 2)
    (pool,) = plan(GPUS)
    assert (pool.num_actors, pool.num_gpus, pool.num_cpus) == ((1, 8), 1.0, 1.0)


@pytest.mark.parametrize("nodes", [SMALL, GPUS])
@pytest.mark.parametrize("members", [2, 3])
def test_apart_all_pools_have_room_and_leave_some_for_tasks(nodes, members):
    pools = plan(nodes, "run.placement=apart", members=members)
    assert [pool.members for pool in pools] == [(number,) for number in range(members)]
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    assert sum(pool.num_cpus * pool.num_actors[1] for pool in pools) + pools[0].task_cpus <= cpus
    assert sum(pool.num_gpus * pool.num_actors[1] for pool in pools) <= gpus


def test_a_head_without_cpus_has_no_actor():
    head = {"Alive": True, "Resources": {"memory": 1e9}}
    assert plan([head, *SMALL, *SMALL])[0] == plan([*SMALL, *SMALL])[0]
    assert plan([head], "run.cpus_per_actor=4", "run.actors=1..3")[0].num_actors == (1, 3)
    (pool,) = plan([head], "run.gpus_per_actor=1")
    assert (pool.num_actors, pool.num_cpus, pool.task_cpus) == ((1, 1), 1.0, 0.75)
    with pytest.raises(ConfigError, match="no node of the cluster has CPUs yet"):
        plan([head])


def test_actors_are_a_number_or_a_range():
    assert plan(GPUS, "run.actors=3")[0].num_actors == (1, 3)
    assert plan(GPUS, "run.actors=2..8")[0].num_actors == (2, 8)
    for wrong in ("0", "many", "3..x", "0..2", "5..2"):
        with pytest.raises(ConfigError, match="run.actors is "):
            plan(GPUS, f"run.actors={wrong}")
