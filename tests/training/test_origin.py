"""A checkpoint that is judged on data that is read otherwise than in its training."""

import yaml

from tests.runs.test_earlier_versions import V0
from vlsm.datasets.settings import DatasetSettings
from vlsm.runs.record import make_record
from vlsm.training.origin import describe_differences_to_training
from vlsm.training.settings import TrainSettings


def write_training(folder, **data):
    settings = TrainSettings(output=str(folder), datasets={"d": "x"}, model="pixel", data=data)
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(make_record(settings, {}, {})))
    return str(folder / "checkpoint")


def test_settings_that_differ_from_the_training_are_named(tmp_path):
    checkpoint = write_training(tmp_path / "a", mask_threshold=0, window=(40, 400), prompt="p5")
    said = describe_differences_to_training(checkpoint, DatasetSettings(), ["record"])
    assert said == (
        f"checkpoint {checkpoint} was trained with data.mask_threshold=0 (here 127), "
        "data.window=[40.0, 400.0] (here None), data.prompt='p5' (here each record's p1)"
    )
    same = DatasetSettings(mask_threshold=0, window=(40, 400))
    assert describe_differences_to_training(checkpoint, same, ["p5"]) is None
    assert describe_differences_to_training(checkpoint, same, ["record", "p5"]) is None


def test_where_nothing_differs_or_nothing_is_known_nothing_is_said(tmp_path):
    for number, prompt in enumerate(("p1", "random")):
        checkpoint = write_training(tmp_path / str(number), prompt=prompt)
        assert describe_differences_to_training(checkpoint, DatasetSettings(), ["record"]) is None
    other = DatasetSettings(mask_threshold=0)
    assert describe_differences_to_training(checkpoint, other, ["record"]) is not None
    (tmp_path / "1" / "config.yaml").write_text("- no record")
    assert describe_differences_to_training(checkpoint, other, ["record"]) is None
    assert describe_differences_to_training(str(tmp_path / "nowhere" / "checkpoint"), other, ["record"]) is None
    assert describe_differences_to_training("s3://bucket", other, ["record"]) is None


def test_the_training_of_an_earlier_version_is_read():
    checkpoint = str(V0 / "training" / "checkpoint")
    assert describe_differences_to_training(checkpoint, DatasetSettings(), ["own"]) is None
    assert "data.mask_threshold=127 (here 3)" in describe_differences_to_training(
        checkpoint, DatasetSettings(mask_threshold=3), ["own"]
    )
