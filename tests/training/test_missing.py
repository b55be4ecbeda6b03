"""What records lack is said in one error, with all settings to add."""

import json

import pytest

from jobs.phantoms import write_labelled
from tests.conftest import save_square
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError, ManifestError
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import read_test_records
from vlsm.training.missing import require_complete
from vlsm.training.run import read_all_records
from vlsm.training.sampling import choose_prompt
from vlsm.training.settings import DataSettings, TrainSettings


def write_pairs(folder, number=3):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for name in range(number):
            save_square(folder / kind / f"{name}.png")
    return str(folder)


def train_settings(datasets, **data):
    return TrainSettings(output="/out", datasets=datasets, model="unet_d", data=data)


def test_a_training_says_all_that_two_folders_of_pairs_lack(tmp_path):
    datasets = {name: write_pairs(tmp_path / name) for name in ("kvasir", "busi")}
    with pytest.raises(ConfigError) as error:
        read_all_records(train_settings(datasets))
    message = str(error.value)
    assert "3 of 3 records of kvasir, 3 of 3 records of busi have no split" in message
    assert "datasets kvasir, busi have no prompt" in message
    settings = "--set data.split.val=0.1 --set data.split.test=0.1 --set data.prompts.kvasir=WORDS "
    assert f"add {settings}--set data.prompts.busi=WORDS" in message
    added = {"split": {"val": 0.1, "test": 0.1}, "prompts": {"kvasir": "polyp", "busi": "lesion"}}
    assert len(read_all_records(train_settings(datasets, **added))) == 6


def test_what_is_not_missing_is_not_said(tmp_path):
    datasets = {"kvasir": write_pairs(tmp_path / "kvasir")}
    with pytest.raises(ConfigError) as error:
        read_all_records(train_settings(datasets, prompts={"kvasir": "polyp"}))
    assert "no prompt" not in str(error.value) and "WORDS" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        read_all_records(train_settings(datasets, split={"val": 0.1}))
    assert "no split" not in str(error.value) and "data.prompts.kvasir=WORDS" in str(error.value)


def test_a_missing_val_and_a_missing_prompt_are_one_error():
    records = [Record("a", "train", "0", "/a.png", "/b.png", {})]

    def check():
        raise ConfigError("no val records in a")

    with pytest.raises(
        ConfigError, match=r"no val records in a; dataset a has no prompt; add --set data\.prompts\.a=W"
    ):
        require_complete(records, lambda record: choose_prompt(record, DataSettings(), None), more=check)


def test_a_record_with_other_prompts_is_its_own_error():
    records = [Record("a", "", "0", "/a.png", "/b.png", {"p1": ("x",)})]
    with pytest.raises(ManifestError, match="no prompt for data.prompt=p9"):
        require_complete(records, lambda record: choose_prompt(record, DataSettings(prompt="p9"), None))


def test_an_evaluation_says_all_too_but_only_of_the_records_that_it_scores(tmp_path):
    datasets = {"kvasir": write_pairs(tmp_path / "kvasir")}
    common = {"output": "/out", "checkpoints": ["/c"]}
    with pytest.raises(ConfigError) as error:
        read_test_records(EvaluateSettings(datasets=datasets, prompts=["p1"], **common))
    for part in ("3 of 3 records of kvasir have no split", "NAME=OUTPUT/examples.parquet", "data.prompts.kvasir=WORDS"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="have no split") as error:
        read_test_records(EvaluateSettings(datasets=datasets, **common))  # the checkpoint's prompt is used
    assert "WORDS" not in str(error.value)
    rows = [{"image_uri": f"kvasir/images/{n}.png", "mask_uri": f"kvasir/masks/{n}.png"} for n in range(2)]
    rows = [rows[0] | {"split": "train"}, rows[1] | {"split": "test", "prompt": "polyp"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(datasets={"own": str(tmp_path / "list.jsonl")}, prompts=["p1"], **common)
    assert len(read_test_records(settings)) == 1


def test_a_dataset_that_lacks_nothing_is_read(tmp_path):
    write_labelled(tmp_path / "drawn", {"train": 1, "val": 1}, seed=0)
    assert read_all_records(train_settings({"drawn": str(tmp_path / "drawn")}))


def test_a_model_and_datasets_are_missing_in_one_error():
    with pytest.raises(ValueError, match="give either a model.*there are no datasets either: give --dataset"):
        TrainSettings(output="/out")
