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


def node(cpus, memory_gib, store_gib, gpus=0):
    """What Ray offers of a node: the memory beside its object store."""
    memory = {"memory": (memory_gib - store_gib) * 2**30} if memory_gib else {}
    return {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) | memory}


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize(
    ("cpus", "memory_gib", "store_gib"),
    [
        (1, 2, 0.6),
        (2, 4, 1),
        (2, 8, 2),
        (4, 16, 5),
        (16, 32, 10),
        (16, 64, 16),
        (64, 128, 38),
        (96, 768, 200),
        (192, 384, 99),
    ],
)
def test_tasks_request_memory_and_still_fit_on_every_node(cpus, memory_gib, store_gib, gpus):
    (pool,) = plan([node(cpus, memory_gib, store_gib, gpus)], members=1)
    memory = (memory_gib - store_gib) * 2**30
    assert 0 < pool.write_bytes <= pool.fetch_bytes
    assert 3 * pool.fetch_bytes + pool.write_bytes <= memory
    assert memory // pool.fetch_bytes >= cpus // 2  # however many pixels an image may have
    assert pool.fetch_options["memory"] == pool.fetch_bytes and pool.write_options["memory"] == pool.write_bytes


def test_as_many_tasks_run_as_can_decode_the_largest_image_that_is_admitted():
    """A float TIFF of 100 megapixels takes 2.45 GB while it is decoded."""
    large = node(16, 64, 16)
    (pool,) = plan([large], members=1)
    beside = large["Resources"]["memory"] // pool.fetch_bytes
    assert pool.fetch_bytes >= 2.45e9 and beside * 2.45e9 < 48 * 2**30 and beside >= 16
    (pool,) = plan([large], "max_pixels=4_000_000", members=1)
    assert pool.fetch_bytes < 1e9 and not pool.is_bound_by_memory([large])
    assert plan([large], members=2)[0].write_bytes > plan([large], members=1)[0].write_bytes


def test_the_smallest_node_decides_and_an_unknown_one_is_asked_for_no_memory():
    small, large = node(16, 24, 10), node(16, 64, 16)
    assert plan([large, small])[0].fetch_bytes == plan([small])[0].fetch_bytes < plan([large])[0].fetch_bytes
    assert plan([small])[0].is_bound_by_memory([small])
    assert not plan([node(2, 24, 7)])[0].is_bound_by_memory([node(2, 24, 7)]), "both CPUs have a task"
    for nodes in (SMALL, [{"Alive": True, "Resources": {"memory": 1e9}}]):
        (pool,) = plan(nodes, "run.gpus_per_actor=1", members=1)
        assert "memory" not in pool.fetch_options and "memory" not in pool.write_options
        assert not pool.is_bound_by_memory(nodes)
