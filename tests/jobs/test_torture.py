"""Scenarios of the torture at a small size; `python -m jobs.benchmark torture` has all of them."""

import shutil

import pytest

from jobs import segment, verify
from jobs.benchmarks.stores import FaultyProxy
from jobs.benchmarks.torture import SCENARIOS
from jobs.benchmarks.torture_setup import Arena, CannotTortureError
from tests.conftest import nightly, read_mask_rows
from tests.in_process import InProcess
from tests.jobs.conftest import exit_code


@pytest.fixture(scope="module")
def arena(ray_cluster, tmp_path_factory):
    arena = Arena(tmp_path_factory.mktemp("torture"), num_images=48, stall_s=3, num_kills=5)
    with pytest.MonkeyPatch.context() as patch:
        InProcess(patch)  # nothing disturbs it
        arena.prepare(segment.main)
    return arena


_QUICK = ["kill_driver", "kill_actor"]  # the nightly run has all of them


@pytest.mark.parametrize("name", [*_QUICK, *nightly(*(name for name in SCENARIOS if name not in _QUICK))])
def test_nothing_is_lost_and_nothing_done_twice(arena, name):
    try:
        disturbances = SCENARIOS[name](arena)
    except CannotTortureError as error:
        pytest.skip(str(error))
    finally:
        arena.stop()
    assert sum(disturbances.values()) > 0


@pytest.mark.usefixtures("in_process")
def test_faults_of_a_store_cost_no_row(s3_server, s3_folder, archive, tiny_checkpoint, tmp_path, monkeypatch):
    """The scenario `faulty_store` without Ray: reading, planning and writing try again by themselves."""
    import s3fs

    for path in sorted(archive.iterdir()):
        for number in range(2):
            shutil.copy(path, archive / f"copy {number} of {path.name}")
    words = ["--checkpoint", tiny_checkpoint, "--set", "shard_rows=4"]
    assert exit_code(archive, tmp_path / "undisturbed", *words) == 0
    s3fs.S3FileSystem().put(f"{archive}/", f"{s3_folder}/in/", recursive=True)
    faults = ("error", "slow_down", "reset", "lost", "truncate", "stall")
    proxy = FaultyProxy(s3_server.address, dict.fromkeys(faults, 0.02), stall_s=1)
    with proxy.serve(), monkeypatch.context() as patch:
        for name, value in s3_server.environment(proxy.address).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        assert exit_code(f"{s3_folder}/in", f"{s3_folder}/out", *words) == 0
    s3fs.S3FileSystem.clear_instance_cache()
    assert proxy.faults.total() > 5
    assert verify.main([f"{s3_folder}/out"]) == 0
    rows, expected = (read_mask_rows(output) for output in (f"{s3_folder}/out", tmp_path / "undisturbed"))
    assert {key: row["mask_rle"] for key, row in rows.items()} == {
        key: row["mask_rle"] for key, row in expected.items()
    }
