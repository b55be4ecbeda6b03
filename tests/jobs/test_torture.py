"""Scenarios of the torture at a small size; `python -m jobs.benchmark torture` has all of them."""

import pytest

from jobs.benchmarks.torture import SCENARIOS
from jobs.benchmarks.torture_setup import Arena, CannotTortureError
from tests.conftest import slow

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def arena(ray_cluster, tmp_path_factory):
    arena = Arena(tmp_path_factory.mktemp("torture"), num_images=48, stall_s=3, num_kills=5)
    arena.prepare()
    return arena


_QUICK = ["kill_driver", "kill_actor", "faulty_store", "fill_disk"]  # the nightly run has all of them


@pytest.mark.parametrize("name", [*_QUICK, *slow(*(name for name in SCENARIOS if name not in _QUICK))])
def test_nothing_is_lost_and_nothing_done_twice(arena, name):
    try:
        disturbances = SCENARIOS[name](arena)
    except CannotTortureError as error:
        pytest.skip(str(error))
    finally:
        arena.stop()
    assert sum(disturbances.values()) > 0
