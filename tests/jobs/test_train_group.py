"""Tests of the sizes of training groups, from what Ray says of its nodes."""

import pytest

from jobs.train_group import GroupSize, group_size, share_cpus
from vlsm.training.settings import TrainSettings


def node(**resources):
    return {"Alive": True, "Resources": {key: float(value) for key, value in resources.items()}}


def settings(**run):
    return TrainSettings(output="x", datasets={"a": "b"}, model="unet_d", run=run)


@pytest.mark.parametrize(
    ("nodes", "run", "size"),
    [
        ([node(CPU=2)], {}, GroupSize((1, 1), 1.5, 0, 2)),
        ([node(CPU=16), node(CPU=16)], {"workers": 2}, GroupSize((2, 2), 12, 0, 16)),
        ([node(CPU=16)], {"cpus_per_worker": 2}, GroupSize((1, 1), 2, 0, 2)),
        ([node(CPU=16, GPU=4)], {}, GroupSize((4, 4), 1, 1, 1)),
        ([node(CPU=16), {"Alive": False, "Resources": {"CPU": 64.0}}], {}, GroupSize((1, 1), 12, 0, 16)),
    ],
)
def test_a_worker_computes_with_the_cpus_that_it_asks_for(nodes, run, size):
    assert group_size(settings(**run), nodes) == size


@pytest.mark.parametrize(("parallel", "cpus", "threads"), [(1, 12, 16), (2, 6, 6), (4, 3, 3), (64, 0.18, 1)])
def test_parallel_trainings_fit_the_cpus_together(parallel, cpus, threads):
    nodes = [node(CPU=16)]
    size = group_size(share_cpus(settings(), nodes, parallel), nodes)
    assert (size.cpus, size.num_threads) == (cpus, threads)
    assert size.cpus * parallel <= 16


def test_trainings_on_gpus_and_with_cpus_of_their_own_are_left_as_they_are():
    on_gpus, own = settings(), settings(cpus_per_worker=5)
    assert share_cpus(on_gpus, [node(CPU=16, GPU=2)], 2) is on_gpus
    assert share_cpus(own, [node(CPU=16)], 2) is own
