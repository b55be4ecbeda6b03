"""What tests share: tiny checkpoints in the real formats, drawn archives, one Ray cluster and one S3 server."""

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # this process is measured, its children are not: they would take twice as long
    os.environ.pop("COVERAGE_PROCESS_START", None)
os.environ["RAY_AUTH_MODE"] = "disabled"  # a cluster on loopback for a few minutes
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # or the other tests on these cores would always come first
os.environ["RAY_num_workers_soft_limit"] = "16"  # several jobs at once: their idle processes need not be started anew
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away
os.environ["OMP_NUM_THREADS"] = "1"  # of torch: pytest-xdist has a process for each core already

import numpy as np
import pytest
from PIL import Image

from jobs.benchmarks.stores import BUCKET, S3Server

SHARED = Path(__file__).parents[2] / "shared"
LONG_S = 1200  # ends what hangs; nothing that works comes near it, on machines that are several times slower too


# the modules that take longest come first: no process is to wait for the other in the end
ORDER = "train failures torture demo segment resuming evaluate archives ensemble imports zoo learner".split()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Each module in one process, where its fixtures are made once; each process has one Ray cluster for all of its."""
    with_ray = {item.path for item in items if "ray_cluster" in item.fixturenames}
    with_store = {item.path for item in items if "s3_server" in item.fixturenames} - with_ray
    for item in items:
        # tests of resuming look at a run of the segment tests; one S3 server is enough
        module = str(item.path).replace("test_resuming", "test_segment")
        item.add_marker(pytest.mark.xdist_group("store" if item.path in with_store else module))
    order = {name: number for number, name in enumerate(ORDER)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(ORDER)))


def pytest_collection():
    """Switch the garbage collector off: imports create many objects, and all of them stay."""
    gc.disable()


def pytest_collection_finish():
    """Switch the collector on again; it ignores the imported objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A UNet-D small enough to run anywhere, with weights that give masks which are neither empty nor full."""
    import torch

    import vlsm

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("checkpoint")
    vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=32, width=4), folder, prompt="polyp")
    return folder


@pytest.fixture(scope="session")
def bright_checkpoint(tmp_path_factory):
    """A model that marks what is bright: its masks can be predicted by eye."""
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
    """Six drawn images of different sizes: a folder in the `anns/ images/ masks/` layout."""
    from jobs.phantoms import write_labelled

    folder = tmp_path_factory.mktemp("drawn")
    write_labelled(folder, {"test": 6}, seed=5)
    return folder


@pytest.fixture
def archive(drawn, tmp_path):
    """The drawn images as an unlabelled archive of the test's own, with room beside it."""
    return Path(shutil.copytree(drawn / "images", tmp_path / "archive"))


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """Two CPUs of Ray for all tests of this process, which subprocesses join through RAY_ADDRESS.

    The S3 server comes first: workers inherit the environment of the time when Ray starts.
    """
    import ray

    context = ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=600 * 2**20)
    os.environ["RAY_ADDRESS"] = context.address_info["address"]
    yield context
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS server with S3's own protocol; the standard AWS environment leads to it."""
    server = S3Server(tmp_path_factory.mktemp("weed"))
    server.start()
    environment = server.environment()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def s3_folder(s3_server, request):
    """A prefix of the test's own: emptied ones linger on some servers."""
    return f"s3://{BUCKET}/{request.node.name}-{time.time_ns()}"


def slow(*values):
    """Parameters of a test that `.ci/nightly` runs."""
    return [pytest.param(value, marks=pytest.mark.slow, id=str(value)) for value in values]


def read_mask_rows(output):
    """Every row of a run's output, by (image_id, prompt); a pair that stands there twice fails."""
    from vlsm import read_masks

    rows = {}
    for row in read_masks(str(output)):
        key = (row["image_id"], row["prompt"])
        assert key not in rows, f"{key} stands there twice"
        rows[key] = row
    return rows


def without_ray(*words):
    """The segment job where importing ray fails: what it does before Ray starts."""
    code = (
        f"import sys; sys.modules['ray'] = None; from jobs.segment import main; sys.exit(main({[*map(str, words)]!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=LONG_S
    )


def save_square(path, size=(60, 90), corner="top left", **options):
    """A dark image with a bright square in one corner: where the mask must be, in an upright picture."""
    height, width = size
    pixels = np.full((height, width, 3), 20, np.uint8)
    rows = slice(0, height // 3) if "top" in corner else slice(2 * height // 3, height)
    columns = slice(0, width // 3) if "left" in corner else slice(2 * width // 3, width)
    pixels[rows, columns] = 250
    Image.fromarray(pixels).save(path, **options)
    return pixels
