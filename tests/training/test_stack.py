"""The training of a stack: what it learns from, what it keeps, and what it knows of the images of its members."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vlsm
from tests.training.test_learner import CPU, RECORDS, draw
from tests.training.test_run_data import count, prepare, write_list
from vlsm import storage
from vlsm.calibration import CalibrationSettings, calibrate_checkpoint
from vlsm.datasets.records import Record
from vlsm.errors import CheckpointError, ConfigError
from vlsm.runs.record import read_record
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import History
from vlsm.training.learner import Learner
from vlsm.training.origin import count_known, read_known
from vlsm.training.run import build_learning_model, check_examples, check_model, default_prompt, input_square
from vlsm.training.sampling import ExampleOrder
from vlsm.training.settings import TrainSettings
from vlsm.training.state import copy_best, put_progress


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Checkpoints of two CNNs with 64 and 32 pixels."""
    room = tmp_path_factory.mktemp("members")
    for seed, side in enumerate((64, 32)):
        torch.manual_seed(seed)
        vlsm.save_checkpoint(vlsm.build_model("unet_d", image_size=side, width=4), room / str(side), prompt="polyp")
    return [str(room / "64"), str(room / "32")]


@pytest.fixture
def folder(tmp_path):
    """Twenty small images with masks."""
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(np.eye(12, dtype=np.uint8) * 255).save(tmp_path / f"{number}_mask.png")
    return tmp_path


def settings_of(members, datasets=None, **options):
    optim = {"epochs": 2, "batch_size": 5, "lr": 0.1, "weight_decay": 0}
    tree = {"output": "out", "datasets": datasets or {"a": "a"}, "model": "stack", "optim": optim}
    return TrainSettings.model_validate(tree | {"options": {"members": members}} | options)


def learn(settings, features=None):
    """Return the learner after all epochs, its training losses, and how often each member has seen images."""
    order = ExampleOrder(RECORDS, settings)
    learner = Learner(build_learning_model(settings), settings, order.num_steps, CPU, features)
    calls, losses = [0, 0], []

    def watch(number):
        def add(module, inputs):
            calls[number] += len(inputs[0])

        learner.model.models[number].network.register_forward_pre_hook(add)
        learner.model.models[number].network.down[0].register_forward_pre_hook(add)

    for number in range(2):
        watch(number)
    for epoch in range(settings.optim.epochs):
        for batch in order.train(epoch):
            losses += [score.loss for score in learner.train(batch, *draw(batch), History())]
    return learner, losses, calls


def test_a_stack_learns_weights_and_its_members_do_not(members):
    learner, losses, _ = learn(settings_of(members))
    start = build_learning_model(settings_of(members))
    assert start.head.weight.flatten().tolist() == [0.5, 0.5]
    assert (learner.model.head.weight - start.head.weight).abs().min() > 0.05
    learned, at_first = learner.model.members.state_dict(), start.members.state_dict()
    assert all(torch.equal(learned[name], value) for name, value in at_first.items())
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    weights, _ = learner.state()
    assert {name for name in weights if not name.startswith("members.")} == {"head.weight", "head.bias"}
    assert not any(name.endswith("weight") for name in weights if name.startswith("members."))


def test_kept_features_spare_the_members_and_change_nothing(members, tmp_path):
    plain, losses, calls = learn(settings_of(members))
    kept, losses_kept, calls_kept = learn(settings_of(members), FeatureCache(tmp_path, 10**9))
    torch.testing.assert_close(kept.model.head.weight, plain.model.head.weight)
    assert losses_kept == pytest.approx(losses)
    assert calls_kept == [each // 2 for each in calls] and min(calls_kept) > 0  # of two epochs, the first alone


def test_a_stack_resumes_from_its_state(members):
    settings = settings_of(members)
    first, _, _ = learn(settings)
    order = ExampleOrder(RECORDS, settings)
    again = Learner(build_learning_model(settings), settings, order.num_steps, CPU)
    again.restore(*first.state())
    assert torch.equal(again.model.head.weight, first.model.head.weight)


def test_the_side_of_a_stack_is_known_before_it_is_built(members):
    assert input_square(settings_of(members)) == (64, "squeeze")


def test_members_are_checked_before_anything_else(members, tmp_path):
    check_model(settings_of(members))
    missing = [members[0], str(tmp_path / "later")]
    with pytest.raises(CheckpointError, match="there is no checkpoint at '.*/later'"):
        check_model(settings_of(missing))
    check_model(settings_of(missing), planned=[missing[1]])


def test_members_are_named_from_everywhere(members, monkeypatch):
    monkeypatch.chdir(storage.join(members[0], ".."))
    assert settings_of(["64", "s3://bucket/x"]).options["members"] == [members[0], "s3://bucket/x"]


def train_member(folder, name, numbers, split="train"):
    """Plan a training on these images of the folder, with a val record besides, and write its checkpoint."""
    write_list(folder, numbers, split)
    with (folder / "list.csv").open("a") as file:
        file.write("19.png,19_mask.png,polyp,val\r\n")
    datasets = {"a": str(folder / "list.csv")}
    tree = {"output": str(folder / name), "datasets": datasets, "model": "pixel", "options": {"image_size": 16}}
    prepare(TrainSettings.model_validate(tree))
    torch.manual_seed(len(name))
    vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=16), folder / name / "checkpoint", prompt="polyp")
    return str(folder / name / "checkpoint")


def write_splits(folder, **splits):
    """Write a list in which the images have these splits, by the numbers of the images."""
    lines = [f"{number}.png,{number}_mask.png,polyp,{split}" for split, found in splits.items() for number in found]
    (folder / "list.csv").write_text("\n".join(["image_uri,mask_uri,prompt,split", *lines]))
    return {"a": str(folder / "list.csv")}


def test_a_stack_learns_from_half_of_val_and_its_test_stays(folder):
    sources = [train_member(folder, "one", range(4)), train_member(folder, "second", range(6))]
    datasets = write_splits(folder, train=range(6), val=range(6, 14), test=range(14, 18))
    shutil.copy(folder / "6.png", folder / "14.png")  # a val image that a test image looks like does not follow it
    settings = settings_of(sources, datasets, output=str(folder / "stack"), data={"learn_from": "val"})
    records = prepare(settings)
    assert count(records) == [4, 4, 4]
    assert {record.image_uri.rpartition("/")[2] for record in records if record.split == "test"} == {
        f"{number}.png" for number in range(14, 18)
    }
    assert prepare(settings) == records  # and goes on with equal data
    write_splits(folder, train=range(6), val=range(6, 13), test=range(14, 18))
    with pytest.raises(ConfigError, match=r"other data: 1 record removed \(.*13.png in a\)"):
        prepare(settings)


def test_learning_from_val_needs_val(folder):
    sources = [train_member(folder, "one", range(4)), train_member(folder, "second", range(6))]
    settings = settings_of(sources, write_splits(folder, train=range(6)), data={"learn_from": "val"})
    with pytest.raises(ConfigError, match="data.learn_from is val, but a has no val records; if training has made"):
        prepare(settings)
    write_list(folder)
    with pytest.raises(ConfigError, match="20 of 20 records of a have no split .*: training has made them"):
        prepare(settings)


def warnings_of(settings):
    from vlsm.datasets.examples import ExampleReader
    from vlsm.datasets.inspection import inspect_record

    reader = ExampleReader(settings.data)
    lines = check_examples(settings, lambda records: [inspect_record(record, reader) for record in records])[1]
    return [line.partition(":")[0] for line in lines if "learned from" in line]


def test_images_that_members_have_learned_from_are_told(folder):
    sources = [train_member(folder, "one", range(4)), train_member(folder, "second", range(2, 6))]
    datasets = write_splits(folder, train=range(6), val=range(5, 12), test=range(4, 6))
    said = "the members of the stack learned from"
    assert warnings_of(settings_of(sources, datasets)) == [
        f"{said} 1 of the 7 val images",
        f"{said} 2 of the 2 test images",
        f"{said} 6 of the 6 train images",
    ]
    shutil.copy(folder / "0.png", folder / "copy.png")  # with the same content
    datasets = write_splits(folder, train=range(6), val=[8, 9, 10], test=["copy", 12])
    (folder / "copy_mask.png").write_bytes((folder / "0_mask.png").read_bytes())
    settings = settings_of(sources, datasets, data={"learn_from": "val"})
    assert warnings_of(settings) == [f"{said} 1 of the 2 test images"]
    tuned = TrainSettings(output="out", datasets=datasets, start_from=sources[0], data={"learn_from": "train"})
    assert warnings_of(tuned) == ["the checkpoint in start_from learned from 1 of the 2 test images"]


def test_a_stack_inherits_the_images_of_its_members(folder):
    sources = [train_member(folder, "one", range(4)), train_member(folder, "second", range(2, 6))]
    datasets = write_splits(folder, val=range(6, 12), test=range(12, 14))
    settings = settings_of(sources, datasets, output=str(folder / "stack"), data={"learn_from": "val"})
    records = prepare(settings)
    shutil.copytree(folder / "one" / "checkpoint", folder / "stack" / "checkpoint")
    checkpoint = str(folder / "stack" / "checkpoint")
    shutil.rmtree(folder / "one")  # its record is not needed any more
    learned = {record.image_uri for record in records if record.split == "train"}
    learned |= {str(folder / f"{number}.png") for number in range(6)}
    assert {image for image, _ in read_known(checkpoint) if image.endswith(".png")} == learned

    def judged(*numbers):
        uris = [str(folder / f"{number}.png") for number in numbers]
        return [Record("a", "test", uri, uri, uri, {}) for uri in uris]

    assert count_known([checkpoint], judged(12, 13)) == 0
    assert count_known([checkpoint], judged(0, 5, 12)) == 2
    slices = [Record("a", "test", "x", judged(0)[0].image_uri, "m", {}, image_selector=f"slice={n}") for n in (1, 2)]
    assert count_known([checkpoint], slices) == 0  # another image of the file
    assert count_known([str(folder / "elsewhere")], judged(0)) == 0
    assert count_known([str(folder / "elsewhere"), checkpoint], judged(0)) == 1
    (folder / "stack" / "known.parquet").write_bytes(b"damage")
    assert {image for image, _ in read_known(checkpoint) if image.endswith(".png")} < learned


def test_passwords_are_not_in_the_record_of_known_images(folder):
    checkpoint = train_member(folder, "one", range(4))
    path = folder / "one" / "examples.parquet"
    table = pq.read_table(path)
    position = table.column_names.index("image_uri")
    signed = [f"https://user:secret@host/{number}.png" for number in range(table.num_rows)]
    pq.write_table(table.set_column(position, table.schema.field(position), [signed]), path)
    assert not any("secret" in image for image, _ in read_known(checkpoint))
    record = Record("a", "test", "x", "https://host/0.png", "m", {})
    assert count_known([checkpoint], [record]) == 1


def test_other_members_are_another_run(folder):
    sources = [train_member(folder, "one", range(4)), train_member(folder, "second", range(6))]
    datasets = write_splits(folder, train=range(6), val=range(6, 12))
    settings = settings_of(sources, datasets, output=str(folder / "stack"))
    prepare(settings)
    assert len(read_record(settings.output)["member_digests"]) == 2
    prepare(settings)
    vlsm.save_checkpoint(vlsm.build_model("pixel", image_size=16), sources[1], prompt="other")
    with pytest.raises(ConfigError, match="checkpoints in options.members have changed since the run began"):
        prepare(settings)


def test_a_stack_is_written_to_output_and_calibrated_as_any_model(folder, members, capsys):
    datasets = write_splits(folder, train=range(6), val=range(6, 12))
    settings = settings_of(members, datasets, output=str(folder / "stack"))
    records, model = prepare(settings), build_learning_model(settings)
    put_progress(settings.output, b"", copy_best(model, default_prompt(records, settings)))
    checkpoint = f"{settings.output}/checkpoint"
    values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(values, ["polyp"])
    torch.testing.assert_close(vlsm.load_checkpoint(checkpoint).model(values, ["polyp"]), expected)
    calibration = calibrate_checkpoint(checkpoint, str(folder / "calibrated"), CalibrationSettings(datasets=datasets))
    calibrated = vlsm.load_checkpoint(folder / "calibrated")
    assert calibrated.settings.calibration == calibration and calibration.num_images == 6
    torch.testing.assert_close(calibrated.model(values, ["polyp"]), expected)
    assert "learned from" not in capsys.readouterr().err
    write_splits(folder, train=range(6, 8), val=range(6))  # of which the stack has learned
    calibrate_checkpoint(checkpoint, str(folder / "again"), CalibrationSettings(datasets=datasets))
    assert "the checkpoint learned from 6 of these 6 val images" in capsys.readouterr().err
