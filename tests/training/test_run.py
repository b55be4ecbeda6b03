"""The folder of a training: who may write to it, and what an earlier job left there."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import vlsm
from jobs import train
from jobs.phantoms import write_labelled
from tests.conftest import LONG_S
from vlsm import storage
from vlsm.config import load_settings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import inspect_record
from vlsm.errors import LeaseError, StorageError
from vlsm.runs.lease import Lease
from vlsm.training.run import prepare_training
from vlsm.training.settings import TrainSettings
from vlsm.training.state import copy_best, put_progress

ROOT = Path(__file__).parents[2]
WORDS = ["model=unet_d", "options.image_size=32", "options.width=4"]
LEFTOVER = f".model.safetensors.{'0' * 32}.tmp"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "drawn"
    write_labelled(folder, {"train": 2, "val": 1}, seed=2)
    return folder


def settings_of(labelled, output, *words):
    tree = {"output": str(output), "datasets": {"drawn": str(labelled)}}
    return load_settings(TrainSettings, None, [*WORDS, *words], tree)


def prepare(settings, lease, before=lambda: None):
    def inspect(records):
        before()
        return [inspect_record(record, ExampleReader(settings.data)) for record in records]

    return prepare_training(settings, inspect, lease=lease)


def lease_of(output):
    return Lease(str(output), "jobs.train", interval_s=0.05, patience_s=0.3)


def test_a_new_run_has_the_lease_before_it_writes(labelled, tmp_path):
    settings = settings_of(labelled, tmp_path / "out")
    with lease_of(settings.output) as lease:
        prepare(settings, lease, lambda: (tmp_path / "out").exists() and pytest.fail("written before the inspection"))
        lease.token.check()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "examples.parquet"]


@pytest.mark.parametrize("words", [[], ["start_over=true"]])
def test_a_job_is_refused_before_it_inspects_while_another_has_the_lease(labelled, tmp_path, words):
    settings = settings_of(labelled, tmp_path / "out", *words)
    with lease_of(settings.output) as first, lease_of(settings.output) as second:
        first.take()
        with pytest.raises(LeaseError, match="is in use by jobs.train"):
            prepare(settings, second, lambda: pytest.fail("inspected"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["lease"]


def test_a_run_that_another_job_planned_meanwhile_is_continued(labelled, tmp_path):
    settings = settings_of(labelled, tmp_path / "out")

    def plan_elsewhere():
        with lease_of(settings.output) as other:
            prepare(settings, other)
        (tmp_path / "out" / "config.yaml").write_text((tmp_path / "out" / "config.yaml").read_text() + "mine: 1\n")

    with lease_of(settings.output) as lease:
        assert len(prepare(settings, lease, plan_elsewhere)) == 6
        lease.token.check()
    assert (tmp_path / "out" / "config.yaml").read_text().endswith("mine: 1\n")


def test_a_finished_run_needs_no_lease(labelled, tmp_path):
    settings = settings_of(labelled, tmp_path / "out")
    with lease_of(settings.output) as lease:
        prepare(settings, lease)
    (tmp_path / "out" / "summary.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    with lease_of(settings.output) as lease:
        prepare(settings, lease)
        assert lease.token is None
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}


def test_the_command_says_who_has_output_and_ends_with_1(without_ray, labelled, tmp_path):
    words = [str(tmp_path / "out"), "--dataset", f"drawn={labelled}", "--set", "model=unet_d"]
    with lease_of(tmp_path / "out") as first:
        first.take()
        done = without_ray(train.main, *words)
    assert done.returncode == 1
    assert "is in use by jobs.train, process " in done.stderr and done.stderr.count("\n") == 1


def test_what_a_killed_process_left_neither_hides_a_checkpoint_nor_stays(labelled, tiny_checkpoint, tmp_path):
    settings = settings_of(labelled, tmp_path / "out")
    with lease_of(settings.output) as lease:
        prepare(settings, lease)
    folder = tmp_path / "out" / "checkpoint"
    vlsm.save_checkpoint(vlsm.load_checkpoint(tiny_checkpoint).model, folder)
    (folder / "clipseg").mkdir()
    leftovers = [folder / LEFTOVER, folder / "clipseg" / LEFTOVER, tmp_path / "out" / LEFTOVER]
    name = vlsm.load_checkpoint(folder).name
    for path in leftovers:
        path.write_bytes(b"half of the weights")
    assert vlsm.load_checkpoint(folder).name == name
    with lease_of(settings.output) as lease:
        prepare(settings, lease)
    assert not [path for path in leftovers if path.exists()]


def test_a_run_that_lost_its_lease_writes_no_state(tmp_path):
    with lease_of(tmp_path) as lease:
        lease.take()
        put_progress(str(tmp_path), b"first", None, lease.token.check)
        storage.write_bytes(f"{tmp_path}/lease/00000002.json", b"{}")
        with pytest.raises(LeaseError, match="another job has taken over"):
            put_progress(str(tmp_path), b"second", None, lease.token.check)
    assert (tmp_path / "last.safetensors").read_bytes() == b"first"


def test_a_full_disk_names_the_path_and_says_how_to_continue(tmp_path):
    """The limit on the size of a file stands for a full disk: the system refuses the bytes in the same way."""
    code = f"""
import resource
from vlsm.training.state import put_progress
from vlsm.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    put_progress({str(tmp_path)!r}, bytes(5000), None)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LONG_S)
    assert done.stdout.startswith(f"{tmp_path}/last.safetensors could not be written: ")
    assert "make room there, and the same command goes on from here" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_temporary_files_names_its_path_too(tiny_checkpoint, tmp_path, monkeypatch):
    model = vlsm.load_checkpoint(tiny_checkpoint).model
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            StorageError, match=f"{tmp_path}/.* could not be written: .*; make room there or set TMPDIR"
        ):
            copy_best(model, "polyp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
