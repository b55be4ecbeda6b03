"""The commands of jobs/README.md on clusters of several nodes (`pytest -m nightly`), with the extra `cluster`."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest
import yaml

import vlsm
from jobs import benchmark
from jobs.benchmarks.stores import BUCKET
from jobs.phantoms import write_labelled
from tests.clusters import LAUNCHING, ROOT, SUBMISSIONS, autoscaled, find_program, launched, started
from tests.conftest import LONG_S
from vlsm import storage
from vlsm.runs.verify import verify_run

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(3600)]
SEGMENT, TRAIN = SUBMISSIONS
SMALL = ["model=unet_d", "options.image_size=32", "options.width=4", "optim.epochs=2", "optim.batch_size=8"]


@pytest.fixture(scope="module", autouse=True)
def _submits():
    pytest.importorskip("opencensus", reason="needs the package's cluster extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scans, a checkpoint and labelled polyps, as the commands of jobs/README.md name them."""
    folder = tmp_path_factory.mktemp("bucket")
    write_labelled(folder / "polyps", {"train": 12, "val": 4, "test": 2}, seed=2)
    shutil.copytree(folder / "polyps" / "images", folder / "scans")
    model = vlsm.build_model("unet_d", image_size=32, width=4)
    vlsm.save_checkpoint(model, folder / "checkpoint", prompt="polyp")
    return folder


@pytest.fixture
def bucket(s3_server, folder, request):
    """The same in a bucket."""
    import s3fs

    name = f"{BUCKET}/{request.node.originalname}"
    s3fs.S3FileSystem(use_listings_cache=False).put(f"{folder}/", f"{name}/", recursive=True)
    return f"s3://{name}"


def there(command, bucket, *settings):
    """The command of jobs/README.md, as it stands there but for the bucket."""
    return command.replace("s3://bucket", bucket) + "".join(f" --set {setting}" for setting in settings)


def prove(output):
    *_, proof = verify_run(output)
    assert not proof.differences


def segment_and_train(cluster, bucket):
    """Both jobs to their end, and what they leave; what they logged."""
    code, log = cluster.call(there(SEGMENT, bucket, "shard_rows=4"))
    assert code == 0, log
    assert re.search(r"^[\d:]+ [\d,]+ of 18 images \([\d.]+ %\), [\d.]+ images/s, 0 failed, ", log, re.M)
    summary = json.loads(re.search(r'^\{"planned": .*\}$', log, re.M)[0])
    assert {key: summary[key] for key in ("planned", "ok", "rows", "parts")} == {
        "planned": 18,
        "ok": 18,
        "rows": 18,
        "parts": 5,
    }
    prove(f"{bucket}/masks")
    train = TRAIN.replace("vlsm_b", "unet_d").replace("run.gpus_per_worker=1", "run.gpus_per_worker=0")
    code, train_log = cluster.call(there(train, bucket, *SMALL))
    assert code == 0, train_log
    assert "2 workers with" in train_log and storage.exists(f"{bucket}/trained/checkpoint/checkpoint.yaml")
    describe = "git describe --always --dirty --abbrev=40".split()
    revision = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for name in ("masks", "trained"):
        record = yaml.safe_load(storage.read_bytes(f"{bucket}/{name}/config.yaml"))
        assert record["git_revision"] == revision
    return log + train_log


def assert_no_credentials(bucket, log):
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    assert b"secret" not in log.encode() + b"".join(fs.cat_file(path) for path in fs.find(bucket))


def test_a_cluster_that_was_started_by_hand_runs_stops_goes_on_and_says_what_is_wrong(bucket, s3_server):
    with started(s3_server.environment(), "--num-cpus=1", "--num-cpus=1 --num-gpus=1") as cluster:
        cluster.wait_for_nodes({"CPU": 2, "GPU": 1})
        assert_no_credentials(bucket, segment_and_train(cluster, bucket))
        output = f"{bucket}/stopped"
        submit = there(SEGMENT.replace("bucket/masks", "bucket/stopped"), bucket, "shard_rows=1", "run.batch_size=1")
        code, log = cluster.call(submit.replace(" -- ", " --no-wait --submission-id first -- "))
        assert code == 0, log
        wait_for_part(output)
        code, log = cluster.call("ray job stop first; ray job logs first")
        assert re.search(r"^[\d:]+ [\d,]+ of 18 images", log, re.M) and "interrupted; the same command goes on" in log
        code, log = cluster.call(f"python -m jobs.status {output}")
        assert code == 0 and "state: not finished" in log
        code, log = cluster.call(submit)
        (line,) = (line for line in log.splitlines() if line.startswith('{"planned"'))
        assert code == 0 and 0 < json.loads(line)["done_before"] < json.loads(line)["rows"] == 18
        prove(output)
        code, log = cluster.call(submit.replace("/scans", "/scan").replace("/stopped", "/wrong"))
        assert code == 1 and "exit code 2" in log and "/scan' does not exist" in log


def wait_for_part(output):
    deadline = time.monotonic() + LONG_S
    while not any(name.startswith("part-") for name in storage.list_names(f"{output}/masks")):
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_cluster_yaml_starts_its_nodes_for_the_work_and_ends_them(bucket, s3_server):
    with started(s3_server.environment(), autoscaling=autoscaled(max_gpus=1)) as cluster:
        cluster.wait_for_nodes({"CPU": 1, "GPU": 0})  # min_workers of "cpu"
        log = segment_and_train(cluster, bucket)
        assert "up to 8 actors of 1 model with 1 CPU and 1 GPU each" in log
        cluster.wait_for_nodes({"CPU": 1, "GPU": 0})


@pytest.mark.skipif(os.geteuid() != 0, reason="makes hosts, which only root may")
@pytest.mark.skipif(not all(map(find_program, LAUNCHING)), reason="needs iproute2, rsync and an SSH server")
def test_cluster_yaml_is_launched_over_ssh(folder):
    with launched(num_workers=2) as cluster:
        cluster.wait_for_nodes({"CPU": 2, "GPU": 2})
        segment_and_train(cluster, str(folder))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_nodes_are_measured_against_one(tmp_path):
    words = ["nodes", "--repeats", "1", "--images", "24", "--image-size", "32", "--json", str(tmp_path / "nodes.json")]
    assert benchmark.main(words) == 0
    jobs = json.loads((tmp_path / "nodes.json").read_text())["runs"]
    assert [job["name"] for job in jobs] == ["segment", "train"]
    assert all(job["start_s"] > 0 and job["one_per_s"] > 0 and job["two_per_s"] > 0 for job in jobs)
