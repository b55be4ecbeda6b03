import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

import vlsm
from jobs import segment, train
from jobs.phantoms import write_labelled
from tests.conftest import LONG_S, nightly

ROOT = Path(__file__).parents[2]
EPOCHS = 16  # of some tenths of a second: whatever ends a run comes in the middle of it
# momentum and dropout carry over from step to step: whatever is lost of a run's state shows in its metrics
SETTINGS = ["model=unet_d", "options.image_size=32", "options.width=4", f"optim.epochs={EPOCHS}", "optim.batch_size=8"]
SETTINGS += ["run.workers=2", "run.micro_batch_size=3", "run.checkpoint_steps=2", "data.prompt=random", "optim.lr=1e-2"]
SETTINGS += ["optim.ema_decay=0.9"]  # the average of the weights is in a checkpoint, and survives whatever ends a run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """27 drawn images, two records each: 40, 7 and 7 records."""
    folder = tmp_path_factory.mktemp("labelled") / "drawn"
    write_labelled(folder, {"train": 20, "val": 4, "test": 3}, seed=2)
    return folder


def words(output, dataset, *settings):
    return [str(output), "--dataset", f"drawn={dataset}", *(w for s in (*SETTINGS, *settings) for w in ("--set", s))]


@pytest.fixture(autouse=True)
def _log_to_stderr(caplog, capfd):
    """The job's own lines, which pytest's handlers would keep from it."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("vlsm")
    logger.addHandler(handler)
    caplog.set_level(logging.INFO, logger="vlsm")
    yield
    logger.removeHandler(handler)


def run(capfd, *arguments):
    """The job in this process: exit code, the JSON line, what it logged."""
    capfd.readouterr()
    code = train.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if code == 0 and captured.out.startswith("{") else captured.out, captured.err


def start(log, *arguments, **environment):
    """The job as a user starts it; what it says on stderr is added to the log."""
    command = [sys.executable, "-m", "jobs.train", *arguments]
    with log.open("a") as stderr:
        pipes = {"stdout": subprocess.PIPE, "stderr": stderr}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, **pipes)


def wait_for(job, condition, timeout_s=LONG_S):
    deadline = time.monotonic() + timeout_s
    while job.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.poll() is None
    assert condition()


def training_workers():
    """Of the cluster of this process: another test process has one too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::RayTrainWorker" in "".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def held(processes):
    """Stop processes while the test looks, so that the run cannot end meanwhile; then kill them."""
    for act in ("suspend", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, act)()
        if act == "suspend":
            yield


def replace_worker(job):
    """Kill a worker of a running job, and wait for another."""
    first = set(training_workers())
    training_workers()[-1].kill()
    wait_for(job, lambda: set(training_workers()) - first)


def end_job(job, is_interrupted, log, num_restarts):
    """Interrupt or kill a job and its workers, after they have gone on as often as they had to."""
    with held(training_workers()):
        wait_for(job, lambda: len(re.findall(r"goes on at epoch \d+, step \d", log.read_text())) >= num_restarts)
        job.send_signal(signal.SIGINT if is_interrupted else signal.SIGKILL)
    out, _ = job.communicate(timeout=LONG_S)
    if is_interrupted:
        assert (job.returncode, out) == (130, "")  # whatever Ray had to say of the death
        assert "interrupted; the same command goes on from here" in log.read_text()


def read_metrics(output):
    frame = pd.read_parquet(f"{output}/metrics.parquet")
    return frame.drop(columns=["seconds", "finished_at"])


def assert_same_run(output, expected):
    found, wanted = read_metrics(output), read_metrics(expected)
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, labelled, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    tracking = f"run.mlflow=file://{output.parent}/mlruns"
    assert train.main(words(output, labelled, tracking)) == 0
    return output


def test_a_run_leaves_what_the_readme_says(undisturbed, labelled):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "config.yaml", "examples.parquet", "last.safetensors", "checkpoint", "metrics.parquet", "curves.png",
        "tensorboard", "summary.json",
    }  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (EPOCHS, EPOCHS * 5)
    frame = read_metrics(undisturbed)
    counts = frame[frame.dataset == "drawn"].groupby("split")["num_examples"].agg(["count", "max"])
    assert counts.to_dict("index") == {
        "train": {"count": EPOCHS, "max": 40}, "val": {"count": EPOCHS, "max": 8}, "test": {"count": 1, "max": 6},
    }  # fmt: skip
    best = frame[(frame.split == "val") & (frame.dataset == "mean")].set_index("epoch")["dice"].idxmax()
    assert summary["best_epoch"] == best
    with Image.open(undisturbed / "curves.png") as picture:
        assert np.asarray(picture).std() > 10


def test_a_checkpoint_is_what_was_judged(undisturbed, labelled):
    """The val Dice of the best epoch, scored anew with the checkpoint that segment takes."""
    from vlsm.datasets.read import read_dataset
    from vlsm.images.decode import decode_image, decode_mask_file
    from vlsm.segmentation.metrics import dice_score
    from vlsm.training.sampling import choose_prompt
    from vlsm.training.settings import DataSettings

    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(undisturbed / "checkpoint"), device="cpu")
    agreement = segmenter.check_probe()  # of the averaged weights, in memory when the epoch ended
    assert agreement.difference < 0.05 * agreement.tolerance
    square = segmenter.model.image_spec.square
    scores = []
    for record in (record for record in read_dataset("drawn", str(labelled)) if record.split == "val"):
        image = square.resize_image(decode_image(Path(record.image_uri).read_bytes(), ""))
        target = square.resize_mask(decode_mask_file(Path(record.mask_uri).read_bytes(), "", 127))
        (mask,) = segmenter.segment([image], choose_prompt(record, DataSettings(), None), allow_equal_masks=True)
        scores.append(dice_score(mask, target))
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert np.mean(scores) == pytest.approx(summary["dice"]["val drawn"], abs=2e-3)


def test_metrics_reach_the_trackers(undisturbed, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient
    from tensorboardX.proto.event_pb2 import Event

    data = (undisturbed / "tensorboard" / "events.out.tfevents.0.vlsm").read_bytes()
    scalars = {}
    while data:  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    client = MlflowClient(f"file://{undisturbed.parent}/mlruns")
    (found,) = client.search_runs([client.get_experiment_by_name("vlsm").experiment_id])
    assert found.data.params["optim.lr"] == "0.01"
    for row in read_metrics(undisturbed).itertuples():
        assert scalars[f"dice/{row.split}/{row.dataset}", row.epoch] == pytest.approx(row.dice)
    last = read_metrics(undisturbed).query("split == 'val' and dataset == 'drawn'")["dice"].iloc[-1]
    assert found.data.metrics["dice/val/drawn"] == pytest.approx(last)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(undisturbed, labelled, capfd):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    code, summary, err = run(capfd, *words(undisturbed, labelled, "run.micro_batch_size=8"))
    assert (code, summary) == (0, json.loads((undisturbed / "summary.json").read_text()))
    assert "is finished: there is nothing to do" in err
    code, _, err = run(capfd, *words(undisturbed, labelled, "optim.lr=0.5", "seed=3"))
    assert code == 2
    assert "optim.lr (there 0.01, now 0.5); seed (there 0, now 3)" in err and "start_over=true" in err
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


@pytest.fixture
def lossy_cluster(ray_cluster):
    """A cluster of two nodes for training, and a function that replaces one of them."""
    from ray.cluster_utils import Cluster

    from jobs.command import start_patiently

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 0}))
    try:
        nodes = [start_patiently(lambda: cluster.add_node(**node)) for _ in range(2)]

        def replace():
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(start_patiently(lambda: cluster.add_node(**node)))

        yield cluster.address, replace
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("ends", ["worker, driver", *nightly("worker, interrupt, driver", "node, driver")])
def test_whatever_ends_it_a_run_goes_on_to_the_same_end_from_s3_to_s3(
    labelled, undisturbed, s3_folder, tmp_path, ends, request
):
    """A worker that dies, a driver that dies, an interrupt, a node that is lost; each costs nothing but time.

    It takes a minute and a half beside other tests: a training starts three times, in some ten processes each time.
    """
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.put(f"{labelled}/", f"{s3_folder}/drawn/", recursive=True)
    output, log = f"{s3_folder}/out", tmp_path / "log"
    address, replace_node = os.environ["RAY_ADDRESS"], None
    if "node" in ends:
        address, replace_node = request.getfixturevalue("lossy_cluster")

    def written():
        name = f"{output}/last.safetensors"
        return fs.info(name)["LastModified"] if fs.exists(name) else None

    def wait_for_steps():
        before = written()
        wait_for(job, lambda: written() != before)

    job = None
    for num_restarts, end in enumerate(ends.split(", ")):
        if job is None or job.poll() is not None:
            job = start(log, *words(output, f"{s3_folder}/drawn"), RAY_ADDRESS=address)
        wait_for_steps()
        if end == "node":
            replace_node()
        elif end == "worker":
            replace_worker(job)
        else:
            end_job(job, end == "interrupt", log, num_restarts)
        assert not fs.exists(f"{output}/summary.json")

    job = start(log, *words(output, f"{s3_folder}/drawn"), RAY_ADDRESS=address)
    out, _ = job.communicate(timeout=LONG_S)
    assert job.returncode == 0, log.read_text()
    assert json.loads(out)["steps"] == EPOCHS * 5
    assert_same_run(output, undisturbed)
    assert b"secret" not in b"".join(fs.cat_file(name) for name in fs.find(output))


@pytest.mark.nightly
def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_dataset(ray_cluster, labelled, tmp_path, capfd):
    settings = ["optim.lr=1e30", "optim.clip_norm=null", "run.workers=1", "data.augment.rotate_degrees=10"]
    code, _, err = run(capfd, *words(tmp_path / "out", labelled, *settings))
    assert code == 1
    assert re.search(r"error: dataset drawn, .*train.json, record \d+: the loss .* at epoch 1, step \d", err)
    assert "try a lower optim.lr" in err


@pytest.mark.nightly
def test_a_stack_of_trained_models_is_trained_and_segments(ray_cluster, labelled, tmp_path, capfd):
    """By two workers, from the val records: its members have learned from the others."""
    for seed, side in enumerate((64, 32)):
        torch.manual_seed(seed)
        vlsm.save_checkpoint(
            vlsm.build_model("unet_d", image_size=side, width=4), tmp_path / str(side), prompt="lesion"
        )
    settings = ["model=stack", f"options.members={[str(tmp_path / '64'), str(tmp_path / '32')]}", "run.workers=2"]
    settings += ["data.learn_from=val", "optim.epochs=2", "optim.batch_size=4", "run.micro_batch_size=2"]
    arguments = [tmp_path / "out", "--dataset", f"drawn={labelled}"]
    code, summary, _ = run(capfd, *arguments, *(word for setting in settings for word in ("--set", setting)))
    assert code == 0 and read_metrics(tmp_path / "out")["epoch"].max() == 2
    checkpoint = tmp_path / "out" / "checkpoint"
    stack = vlsm.load_checkpoint(checkpoint).model
    for number, side in enumerate((64, 32)):
        alone = vlsm.load_checkpoint(tmp_path / str(side)).model.state_dict()
        assert all(torch.equal(stack.members[number].state_dict()[key], value) for key, value in alone.items())
    arguments = [str(labelled / "images"), str(tmp_path / "masks"), "--checkpoint", str(checkpoint)]
    assert segment.main([*arguments, "--set", "prompts=[lesion]"]) == 0
    assert len(list(vlsm.read_masks(str(tmp_path / "masks")))) == 27


def test_broken_records_are_listed_before_anything_is_trained(ray_cluster, labelled, tmp_path, capfd):
    write_labelled(tmp_path / "drawn", {"train": 3, "val": 2}, seed=0)
    (tmp_path / "drawn" / "masks" / "stone" / "train_0001.png").unlink()
    (tmp_path / "drawn" / "images" / "val_0000.png").write_bytes(b"no image")
    arguments = words(tmp_path / "out", tmp_path / "drawn")
    code, _, err = run(capfd, *arguments)
    assert code == 2
    assert "broken: dataset drawn, " in err and "masks/stone/train_0001.png" in err
    assert err.count("val_0000.png") >= 2  # two records have it
    assert "3 of 10 records are broken, as listed above" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capfd, *arguments, "--dry-run")
    assert code == 1
    assert re.search(r"# drawn +train +6 records, 1 broken", out)
    assert re.search(r"# drawn +val +4 records, 2 broken", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--set", "model=unet"], "give --dataset NAME=URI once at least"),
        (["out", "--dataset", "a"], "--dataset 'a' is not of the form NAME=URI"),
        (["out", "--dataset", "a=nowhere", "--set", "model=unet"], "dataset a: .*nowhere' does not exist"),
        (["out", "--dataset", "a=val.csv", "--set", "model=unet"], r"no train records in a \(there are 1 val\)"),
        (["out", "--dataset", "a=x", "--set", "model=unte"], "unknown model 'unte'; did you mean 'unet'"),
        (["out", "--dataset", "a=x", "--set", "optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_without_ray(tmp_path, arguments, message, without_ray, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.csv").write_text("image_uri,mask_uri,prompt,split\na.png,b.png,polyp,val\n")
    done = without_ray(train.main, *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_understood(path):
    from vlsm.config import load_settings
    from vlsm.models import parse_options
    from vlsm.training.settings import TrainSettings

    settings = load_settings(TrainSettings, str(path), [], {"output": "out", "datasets": {"a": "a"}})
    assert settings.model == path.stem
    parse_options(settings.model, settings.options)


def test_every_model_of_the_papers_has_a_recipe():
    from vlsm.models import MODELS

    others = {"openclip_seg", "transformers_seg", "sam3", "pixel"}
    assert {path.stem for path in (ROOT / "jobs" / "configs").glob("*.yaml")} == set(MODELS) - others
