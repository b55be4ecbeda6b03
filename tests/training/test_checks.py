"""What is found before a training begins: data and settings that can only fail, or teach something wrong."""

import logging

import numpy as np
import pytest
from PIL import Image

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import inspect_record
from vlsm.errors import ConfigError, ManifestError
from vlsm.models import build_model
from vlsm.training.checks import check_batch_norms, check_sampling, warn_of_places
from vlsm.training.run import prepare_training, read_negatives
from vlsm.training.sampling import ExampleOrder, draw_order, weigh_datasets
from vlsm.training.settings import TrainSettings

from .test_sampling import make_records, make_settings

SHAPE = (16, 24)


@pytest.fixture
def dataset(tmp_path):
    """A function that writes a list of tiny images: a mask value for each record of a split."""

    def write(**values):
        rows = ["image_uri,mask_uri,split,prompt"]
        for split, levels in values.items():
            for number, level in enumerate(levels):
                name = f"{split}{number}.png"
                image = np.random.default_rng(len(rows)).integers(0, 255, (*SHAPE, 3), np.uint8)
                mask = np.zeros(SHAPE, np.uint8)
                mask[4:12, 4:12] = level or 0
                (tmp_path / "masks").mkdir(exist_ok=True)
                Image.fromarray(image).save(tmp_path / name)
                if level is not None:
                    Image.fromarray(mask).save(tmp_path / "masks" / name)
                rows.append(f"{name},masks/{name},{split},polyp")
        (tmp_path / "list.csv").write_text("\n".join(rows))
        return tmp_path / "list.csv"

    return write


def prepare(uri, **changes):
    tree = {"datasets": {"kvasir": str(uri)}, "model": "pixel", "options": {"image_size": 16}} | changes
    settings = TrainSettings.model_validate({"output": str(uri.parent / "out")} | tree)
    reader = ExampleReader(settings.data)
    return prepare_training(settings, lambda records: [inspect_record(one, reader) for one in records])


def test_masks_of_0_and_1_are_refused_with_the_setting_that_reads_them(dataset, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    uri = dataset(train=[1, 1, 1], val=[1, 1])
    with pytest.raises(ConfigError) as caught:
        prepare(uri)
    assert "3 of 3 train masks and 2 of 2 val masks are empty: the mask files hold 0 and 1" in str(caught.value)
    assert "--set data.mask_threshold=0" in str(caught.value)
    assert not (uri.parent / "out").exists()
    assert len(prepare(uri, data={"mask_threshold": 0})) == 5
    line = "dataset kvasir: masks hold 0 and 1; values above data.mask_threshold=0 are foreground: 1"
    assert line in caplog.messages


def test_empty_masks_are_accepted_when_they_are_meant(dataset, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    uri = dataset(train=[255, 255], val=[0])
    with pytest.raises(ConfigError, match="1 of 1 val masks are empty: the mask files hold only 0"):
        prepare(uri)
    assert len(prepare(uri, data={"allow_empty_masks": True})) == 3
    assert any("1 of 1 val masks are empty" in message for message in caplog.messages)


def test_a_share_of_negative_examples_needs_both_kinds(dataset, caplog):
    caplog.set_level(logging.INFO, logger="vlsm")
    with pytest.raises(ConfigError, match=r"data.negatives is 0.5, but none of the 3 train examples are negative"):
        prepare(dataset(train=[255, 255, 255], val=[255]), data={"negatives": 0.5})
    assert len(prepare(dataset(train=[255, 255, 0], val=[255]), data={"negatives": 0.5})) == 4
    line = "1 of 3 train examples are negative: their mask is empty; data.negatives makes them 50% of an epoch"
    assert line in caplog.messages


def test_a_training_without_any_finding_is_refused(dataset):
    uri = dataset(train=[255, 255], val=[255])
    uri.write_text(uri.read_text().replace("masks/train0.png", "none").replace("masks/train1.png", "none"))
    with pytest.raises(ConfigError, match="all 2 train records say that their image does not show the finding"):
        prepare(uri)


def test_negative_records_are_known_to_the_sampler(dataset):
    uri = dataset(train=[255, 255, 0, 255], val=[255])
    uri.write_text(uri.read_text().replace("masks/train0.png", "none"))
    records = prepare(uri)
    assert read_negatives(str(uri.parent / "out")) == [True, False, True, False, False]
    assert [record.is_negative for record in records] == [True, False, False, False, False]


def test_normal_images_in_a_split_are_no_fault(dataset):
    assert len(prepare(dataset(train=[255, 0, 0], val=[255, 0]))) == 5


@pytest.mark.parametrize(("split", "purpose"), [("train", "train"), ("val", "choose the best epoch")])
def test_no_records_left_after_the_broken_ones_are_skipped(dataset, split, purpose):
    values = {"train": [255, 255], "val": [255]} | {split: [None, None]}
    uri = dataset(**values)
    with pytest.raises(ManifestError, match=r"2 of \d records are broken"):
        prepare(uri)
    with pytest.raises(ConfigError, match=f"no {split} records in kvasir .*, 2 broken.* needed to {purpose}"):
        prepare(uri, data={"skip_broken": True})
    assert not (uri.parent / "out").exists()


def test_weights_for_datasets_without_train_records_are_an_error_and_no_endless_loop():
    records = make_records(train_a=3, val_b=2)
    settings = make_settings(data={"sampling": {"b": 1}})
    with pytest.raises(ConfigError, match="gives no weight to a dataset with train records; these are a;"):
        check_sampling(settings, records)
    with pytest.raises(ConfigError, match="gives no weight"):
        draw_order(records, np.arange(3), settings, epoch=0)
    with pytest.raises(ConfigError):
        weigh_datasets([], {"b": 1})


@pytest.mark.parametrize("weights", [{"a": float("inf")}, {"a": float("nan")}, {"a": 1e308, "b": 1e308}])
def test_weights_must_be_finite(weights):
    with pytest.raises(ValueError, match="finite weights"):
        make_settings(data={"sampling": weights})


def test_datasets_that_sampling_leaves_unused_are_told():
    records = make_records(train_a=3, train_b=3)
    assert check_sampling(make_settings(data={"sampling": {"a": 1, "b": 2}}), records) == []
    assert check_sampling(make_settings(data={"sampling": {"a": 1}}), records) == [
        "dataset b has train records but no weight in data.sampling: it is not learned"
    ]
    assert check_sampling(make_settings(data={"sampling": {"a": 1, "b": 1}}), records[:3]) == [
        "dataset b has a weight in data.sampling but no train records"
    ]


@pytest.mark.parametrize(
    ("augment", "is_told"),
    [
        ({"flip": True}, True),
        ({"rotate_degrees": 90}, True),
        ({"rotate_degrees": 45, "scale": 0.1}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize(
    ("text", "has_place"),
    [
        ("polyp in the upper left corner", True),
        ("Top-right nodule", True),
        ("inferior wall", True),
        ("bright lesion", False),
        ("a stop sign", False),
    ],
)
def test_changes_of_images_beside_prompts_that_name_places_are_told(augment, is_told, text, has_place):
    settings = make_settings(data={"augment": augment, "prompt": f"text:{text}"})
    warnings = warn_of_places(settings, make_records(train_a=2))
    assert len(warnings) == (is_told and has_place)
    assert all(repr(text) in warning for warning in warnings)


def test_only_the_prompts_that_are_used_count():
    (record,) = make_records(train_a=1)
    record.prompts["p5"] = ("polyp at the top",)
    tree = {"augment": {"flip": True}}
    assert warn_of_places(make_settings(data=tree | {"prompt": "p1"}), [record]) == []
    assert len(warn_of_places(make_settings(data=tree | {"prompt": "random"}), [record])) == 1


@pytest.mark.parametrize(
    ("num_train", "batch_size", "micro_batch_size", "num_workers", "fewest"),
    [
        (8, 8, 8, 1, 8),
        (9, 8, 8, 1, 4),
        (1, 8, 8, 1, 1),
        (8, 4, 8, 4, 1),
        (8, 4, 8, 3, 2),
        (8, 8, 1, 1, 1),
        (6, 3, 2, 1, 1),  # micro-batches of 2 and 1
    ],
)
def test_the_smallest_micro_batch_is_known_before(num_train, batch_size, micro_batch_size, num_workers, fewest):
    run = {"micro_batch_size": micro_batch_size}
    settings = make_settings(optim={"batch_size": batch_size}, run=run)
    order = ExampleOrder(make_records(train_a=num_train), settings, 0, num_workers)
    assert order.fewest_examples == fewest == min(len(batch.examples) for batch in order.train(0))


def order_of_one(num_workers=1, **optim):
    settings = make_settings(optim={"batch_size": 1 * num_workers} | optim)
    return ExampleOrder(make_records(train_a=8), settings, 0, num_workers)


def test_a_batch_norm_that_gets_one_value_is_an_error_and_one_image_a_warning():
    """The deepest feature map of this U-Net has 1 x 1 pixels, that of the UNet-D 2 x 2."""
    import torch

    small = build_model("unet", encoder="resnet18", encoder_weights=None, image_size=32)
    large = build_model("unet_d", width=4, image_size=16)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        small(torch.zeros(1, 3, 32, 32), [""])
    with pytest.raises(ConfigError, match=r"batch norms; \S+ then has one value per channel"):
        check_batch_norms(small, order_of_one())
    before = {name: value.clone() for name, value in large.state_dict().items()}
    (warning,) = check_batch_norms(large, order_of_one(4))
    assert "optim.batch_size=4" in warning and "4 workers" in warning
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())
    assert large.training
    assert check_batch_norms(small, order_of_one(batch_size=2)) == []
    assert check_batch_norms(small, order_of_one(2, sync_batch_norm=True)) == []


def test_models_without_batch_norms_learn_from_one_example():
    assert check_batch_norms(build_model("pixel", image_size=16), order_of_one()) == []
