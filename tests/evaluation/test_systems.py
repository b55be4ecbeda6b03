"""The records that an evaluation scores."""

import pytest

from vlsm.errors import ConfigError
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import read_test_records


def read(folder, rows, **options):
    (folder / "list.csv").write_text("image_uri,mask_uri,split\n" + "".join(f"{row}\n" for row in rows))
    tree = {"output": str(folder / "out"), "datasets": {"a": str(folder / "list.csv")}, "checkpoints": ["x"]}
    records = read_test_records(EvaluateSettings.model_validate(tree | options))
    return [record.image_uri.rsplit("/", 1)[-1] for record in records]


def test_the_split_chooses_the_records_and_all_are_all(tmp_path):
    rows = ["a.png,a_mask.png,train", "b.png,b_mask.png,test", "c.png,c_mask.png,test"]
    assert read(tmp_path, rows) == ["b.png", "c.png"]
    assert read(tmp_path, rows, split="train") == ["a.png"]
    assert read(tmp_path, [*rows, "d.png,d_mask.png,"], split="all") == ["a.png", "b.png", "c.png", "d.png"]
    with pytest.raises(ConfigError, match="dataset a has no records of split val; it has test, train"):
        read(tmp_path, rows, split="val")


def test_records_without_a_split_are_refused_since_training_may_have_learned_from_them(tmp_path):
    with pytest.raises(
        ConfigError, match=r"1 of 2 records of a have no split .*NAME=OUTPUT/examples.parquet .*; --set split=all"
    ):
        read(tmp_path, ["a.png,a_mask.png,test", "b.png,b_mask.png,"])
