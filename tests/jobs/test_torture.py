"""Scenarios of the torture at a small size; `python -m jobs.benchmark torture` has all of them."""

import pytest

from jobs.benchmarks.arena import Arena
from jobs.benchmarks.torture import SCENARIOS, CannotTortureError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def arena(ray_cluster, tmp_path_factory):
    arena = Arena(tmp_path_factory.mktemp("torture"), num_images=48)
    arena.prepare()
    return arena


# what is left out has tests of its own: a store that is away, and two jobs that write one plan
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("restart_store", "run_twice")])
def test_nothing_is_lost_and_nothing_done_twice(arena, name):
    try:
        disturbances = SCENARIOS[name](arena)
    except CannotTortureError as error:
        pytest.skip(str(error))
    finally:
        arena.stop()
    assert sum(disturbances.values()) > 0
