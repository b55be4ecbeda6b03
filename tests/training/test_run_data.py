"""The data of a run: its splits are made once and stored, and a run goes on with the data with which it began only."""

import csv
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import inspect_record
from vlsm.datasets.read import read_dataset
from vlsm.errors import ConfigError, ManifestError
from vlsm.runs.record import read_record, write_record
from vlsm.training.run import check_finished, prepare_training, read_examples
from vlsm.training.settings import TrainSettings

SPLIT = {"val": 0.2, "test": 0.2}


@pytest.fixture
def folder(tmp_path):
    """Twenty small images with masks, and a list of them without splits."""
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(np.eye(12, dtype=np.uint8) * 255).save(tmp_path / f"{number}_mask.png")
    write_list(tmp_path)
    return tmp_path


def write_list(folder, numbers=range(20), split="", prompt="polyp"):
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_uri", "mask_uri", "prompt", "split"])
        writer.writerows([f"{number}.png", f"{number}_mask.png", prompt, split] for number in numbers)


def make_settings(folder, **options):
    data = {"split": SPLIT} | options.pop("data", {})
    tree = {"output": str(folder / "out"), "datasets": {"a": str(folder / "list.csv")}, "data": data}
    model = {} if "start_from" in options else {"model": "pixel", "options": {"image_size": 16}}
    return TrainSettings.model_validate(tree | model | options)


def prepare(settings, read=None):
    """Prepare a training; `read` collects the images that are read."""

    def inspect(records):
        if read is not None:
            read.extend(record.image_uri.rsplit("/", 1)[-1] for record in records)
        reader = ExampleReader(settings.data)
        return [inspect_record(record, reader) for record in records]

    return prepare_training(settings, inspect)


def count(records):
    return [sum(record.split == split for record in records) for split in ("train", "val", "test")]


def test_splits_are_made_once_and_are_a_list_for_other_jobs(folder):
    settings = make_settings(folder)
    records = prepare(settings)
    assert count(records) == [12, 4, 4]
    read = []
    assert prepare(settings, read) == read_examples(settings.output) == records and read == []
    listed = f"{settings.output}/examples.parquet"
    assert read_dataset("a", listed) == records
    again = make_settings(folder, output=str(folder / "again"), datasets={"a": listed}, data={"split": {}})
    assert prepare(again) == records


def test_a_list_without_splits_needs_the_setting_and_an_external_one_is_for_testing(folder):
    with pytest.raises(
        ConfigError,
        match="20 of 20 records of a have no split .*add --set data.split.val=0.1 --set data.split.test=0.1",
    ):
        prepare(make_settings(folder, data={"split": {}}))
    shutil.copytree(folder, folder / "other")
    write_list(folder / "other", range(5))
    records = prepare(make_settings(folder, external={"b": str(folder / "other" / "list.csv")}))
    assert [record.split for record in records[20:]] == ["test"] * 5
    assert [record.split for record in records[:5]] == ["test"] * 5  # the same images as those of the external test


def test_broken_records_are_named_before_splits_are_made_and_left_out_when_asked(folder):
    for number in range(18):
        (folder / f"{number}.png").write_bytes(b"text")
    with pytest.raises(ManifestError, match="18 of 20 records are broken"):
        prepare(make_settings(folder))
    with pytest.raises(ConfigError, match="2 records in 2 clusters"):
        prepare(make_settings(folder, data={"skip_broken": True}))
    for number in range(10):
        image = np.random.default_rng(number + 50).integers(0, 255, (12, 12), np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
    settings = make_settings(folder, data={"skip_broken": True})
    records = prepare(settings)
    assert count(records) == [8, 2, 2] == count(prepare(settings)) and len(records) == 12
    assert read_dataset("a", f"{settings.output}/examples.parquet") == records


def test_no_validation_record_may_be_the_last_broken_one(folder):
    write_list(folder, split="train")
    with (folder / "list.csv").open("a") as file:
        file.write("lost.png,0_mask.png,polyp,val\n")
    with pytest.raises(ConfigError, match=r"no val records in a \(there are 20 train, 1 broken\)"):
        prepare(make_settings(folder, data={"split": {}, "skip_broken": True}))


def change_nothing(folder):
    write_list(folder, reversed(range(20)))
    shutil.copy(folder / "3.png", folder / "copy.png")
    os.replace(folder / "copy.png", folder / "3.png")  # the same content at a new time


def add(folder):
    for name in ("", "_mask"):
        shutil.copy(folder / f"3{name}.png", folder / f"20{name}.png")
    write_list(folder, range(21))


def change_mask(folder):
    Image.new("L", (12, 12), 255).save(folder / "5_mask.png")


def lose(folder):
    (folder / "7.png").unlink()


@pytest.mark.parametrize(
    ("change", "message", "expected_read"),
    [
        (change_nothing, None, ["3.png"]),
        (add, r"1 record added \(.*/20.png in a\); choose another OUTPUT", []),
        (lambda folder: write_list(folder, range(5, 20)), r"5 records removed \(.*/0.png in a, .*, \.\.\.\)", []),
        (lambda folder: write_list(folder, prompt="x"), "20 records with another prompt, split, group or label", []),
        (lambda folder: write_list(folder, split="train"), None, []),  # val is taken from train, as before
        (lambda folder: write_list(folder, split="test"), "no train records in a", []),
        (change_mask, r"1 file with another content \(.*/5.png or its mask in a\)", ["5.png"]),
        (lose, "1 file with another content .missing: there is no file .*/7.png", ["7.png"]),
    ],
)
def test_a_run_goes_on_with_the_data_with_which_it_began_only(folder, change, message, expected_read):
    settings = make_settings(folder)
    records, read = prepare(settings), []
    change(folder)
    if message is None:
        assert prepare(settings, read) == records
    else:
        with pytest.raises(ConfigError, match=message):
            prepare(settings, read)
    assert read == expected_read


def test_another_split_than_the_stored_one_is_a_change(folder):
    write_list(folder, split="train")
    lines = (folder / "list.csv").read_text().splitlines()
    lines[1] = lines[1].replace("train", "val")
    (folder / "list.csv").write_text("\n".join(lines))
    settings = make_settings(folder, data={"split": {}})
    prepare(settings)
    lines[2] = lines[2].replace("train", "val")
    (folder / "list.csv").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"other data: 1 record with another prompt, split.*/1.png in a\)"):
        prepare(settings)


def test_a_finished_run_does_not_need_its_data_but_refuses_other_records(folder):
    settings = make_settings(folder)
    records, read = prepare(settings), []
    (folder / "out" / "summary.json").write_text("{}")
    change_mask(folder)
    assert prepare(settings, read) == records and read == []
    write_list(folder, range(19))
    with pytest.raises(ConfigError, match="1 record removed"):
        prepare(settings)
    with pytest.raises(ConfigError, match="1 record removed"):
        check_finished(settings)
    (folder / "list.csv").unlink()
    assert prepare(settings) == records
    check_finished(settings)
    with pytest.raises(ConfigError, match=r"other settings: optim.epochs \(there 50, now 3\)"):
        check_finished(make_settings(folder, optim={"epochs": 3}))


def test_a_run_of_an_earlier_version_goes_on_without_a_comparison(folder):
    settings = make_settings(folder)
    records = prepare(settings)
    table = pq.read_table(folder / "out" / "examples.parquet")
    pq.write_table(table.drop(["image_version", "mask_version"]), folder / "out" / "examples.parquet")
    write_list(folder, range(10))
    assert prepare(settings) == records


def test_another_checkpoint_in_start_from_is_refused(folder, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, folder / "start")
    settings = make_settings(folder, start_from=str(folder / "start"), trainable="all")
    records = prepare(settings)
    assert prepare(settings) == records
    weights = folder / "start" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(ConfigError, match=r"other settings: the checkpoint in start_from '.*/start' has changed"):
        prepare(settings)
    record = read_record(settings.output)
    del record["start_from_digest"]  # as earlier versions wrote it
    write_record(settings.output, record)
    assert prepare(settings) == records
