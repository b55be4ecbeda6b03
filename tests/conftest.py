"""Shared fixtures: tiny checkpoints in the real formats, drawn archives, one Ray cluster and one S3 server."""

import functools
import gc
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # measure coverage in this process only: child processes would take twice as long
    os.environ.pop("COVERAGE_PROCESS_START", None)
os.environ["RAY_AUTH_MODE"] = "disabled"  # a short-lived cluster on the loopback interface
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # otherwise other tests on these cores always have priority
os.environ["RAY_num_workers_soft_limit"] = "16"  # several jobs at once: keep their idle workers
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # this machine is not preemptible
os.environ["OMP_NUM_THREADS"] = "1"  # threads of torch: pytest-xdist already runs one process per core

import botocore.session
import numpy as np
import pytest
from PIL import Image

from jobs.benchmarks.stores import BUCKET, S3Server
from tests.slow import is_slow, read_table

# each client of S3 parses botocore's description of the service, for 0.13 s; here one parse serves all
botocore.session.create_loader = functools.cache(botocore.session.create_loader)

# a shell without job control starts background commands with SIGINT ignored; the jobs of the tests would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"
LONG_S = 1200  # time limit for tests that hang; working tests stay far below it, even on much slower machines


class _Cluster:
    """The Ray cluster of this process. It runs only while modules with Ray follow each other."""

    context = None
    modules: frozenset[Path] = frozenset()  # those with Ray
    is_set_up = False  # whether the fixture exists

    def start(self):
        from jobs.command import init_ray

        if self.context is None:
            memory_bytes = 600 * 2**20
            self.context = init_ray("local", num_cpus=2, include_dashboard=False, object_store_memory=memory_bytes)
            os.environ["RAY_ADDRESS"] = self.context.address_info["address"]
        return self.context

    def stop(self):
        if self.context is not None:
            import ray

            self.context = None
            del os.environ["RAY_ADDRESS"]
            ray.shutdown()


_cluster = _Cluster()


# the slowest modules start first, so that both processes end at about the same time; those with Ray come before others
ORDER = "train failures torture demo segment resuming evaluate archives ensemble".split()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Run each module in one process, so that its fixtures exist once; each process has one Ray cluster."""
    with_ray, slow_names = set(), read_table()
    for item in items:
        if item.get_closest_marker("nightly") or is_slow(item.nodeid, slow_names):
            item.add_marker(pytest.mark.slow)
        if "ray_cluster" in item.fixturenames:
            with_ray.add(item.path)
            item.add_marker(pytest.mark.ray)
    _cluster.modules = frozenset(with_ray)
    with_store = {item.path for item in items if "s3_server" in item.fixturenames} - with_ray
    for item in items:
        # tests of resuming read a run of the segment tests; tests with only the S3 server share one server
        module = str(item.path).replace("test_resuming", "test_segment")
        item.add_marker(pytest.mark.xdist_group("store" if item.path in with_store else module))
    order = {name: number for number, name in enumerate(ORDER)}
    ranks = {path: order.get(path.stem.removeprefix("test_"), len(ORDER)) for path in {item.path for item in items}}
    items.sort(key=lambda item: (ranks[item.path], item.path not in with_ray))


def pytest_runtest_setup(item):
    """Start the cluster again for a test whose fixtures were made before the cluster was stopped."""
    if "ray_cluster" in item.fixturenames and _cluster.is_set_up:
        _cluster.start()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem):
    """Stop the cluster before tests without Ray: its daemons need CPU time, and their trouble can end this process."""
    if nextitem is None or nextitem.path not in _cluster.modules:
        _cluster.stop()


def pytest_collection():
    """Switch the garbage collector off: imports create many objects, and none of them is garbage."""
    gc.disable()


def pytest_collection_finish():
    """Switch the collector on again; it ignores the imported objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_command(monkeypatch):
    """Jobs that run in this process set how long a store without any answer is waited for."""
    from vlsm import storage

    monkeypatch.setattr(storage, "_first_s", math.inf)
    monkeypatch.setattr(storage, "_answered", set())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny UNet-D whose weights give masks that are neither empty nor full."""
    import torch

    import vlsm

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("checkpoint")
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), folder, prompt="polyp")
    return folder


@pytest.fixture(scope="session")
def bright_checkpoint(tmp_path_factory):
    """A model that marks bright pixels, so that tests know the expected mask."""
    import torch

    import vlsm

    model = vlsm.build_model("pixel", image_size=32)
    with torch.no_grad():
        model.network.weight.fill_(1)
        model.network.bias.zero_()
    folder = tmp_path_factory.mktemp("bright")
    vlsm.save_checkpoint(model, folder, prompt="bright")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with six drawn images of different sizes, in the layout `anns/ images/ masks/`."""
    from jobs.phantoms import write_labelled

    folder = tmp_path_factory.mktemp("drawn")
    write_labelled(folder, {"test": 6}, seed=5)
    return folder


@pytest.fixture
def archive(drawn, tmp_path):
    """A copy of the drawn images as an unlabelled archive, in the temporary folder of the test."""
    return Path(shutil.copytree(drawn / "images", tmp_path / "archive"))


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """A Ray cluster of two CPUs for all tests of this process; subprocesses join it through RAY_ADDRESS.

    The S3 server starts first, because workers inherit the environment in which Ray starts.
    """
    context = _cluster.start()
    _cluster.is_set_up = True
    yield context
    _cluster.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS server that speaks the S3 protocol; the standard AWS variables point to it."""
    from s3fs import S3FileSystem

    server = S3Server(tmp_path_factory.mktemp("weed"))
    server.start()
    environment = server.environment()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    S3FileSystem.clear_instance_cache()  # clients of earlier tests of this process have no credentials
    try:
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def in_process(monkeypatch):
    """The segment and evaluate jobs without Ray; see `tests.in_process`."""
    from tests.in_process import InProcess

    return InProcess(monkeypatch)


@pytest.fixture
def without_ray(monkeypatch, capfd, caplog):
    """Calls the main function of a job where ray cannot be imported, to test what comes before the start of Ray.

    Returns the exit code and what it has printed; stderr begins with the lines of its log.
    """

    def call(main, *words):
        monkeypatch.setitem(sys.modules, "ray", None)
        caplog.set_level(logging.INFO, logger="vlsm")
        caplog.clear()
        capfd.readouterr()
        code, told = main([str(word) for word in words]), capfd.readouterr()
        log = "".join(f"{record.getMessage()}\n" for record in caplog.records)
        return subprocess.CompletedProcess(words, code, told.out, log + told.err)

    return call


@pytest.fixture(params=["obstore", "s3fs"])
def each_client(request, monkeypatch):
    """Runs a test with obstore where it can serve, and with s3fs alone."""
    from s3fs import S3FileSystem

    from vlsm import s3_clients, s3_files

    async def refuse(*_):
        raise s3_clients.NotAlike("the test asks for s3fs")

    if request.param == "s3fs":
        monkeypatch.setattr(s3_files, "find_access", refuse)
    S3FileSystem.clear_instance_cache()
    yield request.param
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_folder(s3_server, request):
    """A new prefix for each test: some servers still list a prefix after its files are deleted."""
    return f"s3://{BUCKET}/{request.node.name}-{time.time_ns()}"


def nightly(*values):
    """Test parameters of one value that only `.ci/nightly` runs."""
    return [pytest.param(value, marks=pytest.mark.nightly, id=str(value)) for value in values]


def rare(*values):
    """A test parameter of one or more values that only `.ci/nightly` runs."""
    return pytest.param(*values, marks=pytest.mark.nightly)


# those that others resemble: of each library of networks, CI has one model
_ALIKE = "biomedclipseg biomedclipseg_d openclip_seg sam3 unetplusplus deeplabv3plus vlsm_a vlsm_b".split()
_ALIKE += ["openclip_seg+unet", "transformers_seg+unet", "sam3+unet"]


def each_model(cases):
    """Test parameters: names of models, or tuples that begin with one. What others resemble runs each night."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [rare(*case) if case[0] in _ALIKE else pytest.param(*case) for case in cases]


def read_mask_rows(output):
    """Return every row of a run by (image_id, prompt); a duplicate pair fails."""
    from vlsm import read_masks

    rows = {}
    for row in read_masks(str(output)):
        key = (row["image_id"], row["prompt"])
        assert key not in rows, f"{key} has two rows"
        rows[key] = row
    return rows


def save_square(path, size=(60, 90), corner="top left", **options):
    """Write a dark image with a bright square in one corner: the expected mask. Return its pixels."""
    height, width = size
    pixels = np.full((height, width, 3), 20, np.uint8)
    rows = slice(0, height // 3) if "top" in corner else slice(2 * height // 3, height)
    columns = slice(0, width // 3) if "left" in corner else slice(2 * width // 3, width)
    pixels[rows, columns] = 250
    Image.fromarray(pixels).save(path, **options)
    return pixels
