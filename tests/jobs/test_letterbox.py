"""A checkpoint that keeps the aspect ratio: masks lie at the right place in everything that uses it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlsm
from jobs.phantoms import write_labelled
from tests.conftest import read_mask_rows
from vlsm import calibration
from vlsm.config import MemberSettings, SegmentSettings
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.records import Record
from vlsm.images.preprocess import Square
from vlsm.report import forecast
from vlsm.runs.lifecycle import resolve_settings
from vlsm.segmentation.masks import decode_mask
from vlsm.training.settings import DataSettings

SQUARE = Square(32, "letterbox")
SIZES = {"wide.png": (40, 160), "tall.png": (160, 40), "square.png": (60, 60)}


@pytest.fixture(scope="module")
def letterboxed(tmp_path_factory):
    """A model that marks bright pixels."""
    model = vlsm.build_model("pixel", image_size=32, resize="letterbox")
    assert model.image_spec.square == SQUARE
    with torch.no_grad():
        model.network.weight.fill_(1)
        model.network.bias.zero_()
    folder = tmp_path_factory.mktemp("letterboxed")
    vlsm.save_checkpoint(model, folder, prompt="bright")
    assert vlsm.load_checkpoint(folder).model.image_spec.square == SQUARE
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark images with a bright corner, and their masks."""
    folder = tmp_path_factory.mktemp("pictures")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for name, (height, width) in SIZES.items():
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :, width // 2 :] = 255
        Image.fromarray(mask).save(folder / "masks" / name)
        Image.fromarray(np.dstack([np.maximum(mask, 20)] * 3)).save(folder / "images" / name)
    return folder


def right_mask(pictures, name):
    return np.asarray(Image.open(pictures / "masks" / name)) > 0


def assert_right(mask, pictures, name):
    wanted = right_mask(pictures, name)
    assert mask.shape == wanted.shape
    assert np.mean(mask.astype(bool) != wanted) < 0.06, name
    assert mask[-4:, -4:].all() and not mask[:4, :4].any()


def test_the_segmenter_and_the_squeezed_model_agree_where_the_image_is_square(letterboxed, bright_checkpoint, pictures):
    images = {name: np.asarray(Image.open(pictures / "images" / name)) for name in SIZES}
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(letterboxed), device="cpu")
    for name, mask in zip(SIZES, segmenter.segment(list(images.values())), strict=True):
        assert_right(mask, pictures, name)
    squeezed = vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint), device="cpu")
    for one, other in zip(*(s.segment([images["square.png"]]) for s in (segmenter, squeezed)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_forecast_segments_as_the_run_does(letterboxed, pictures, monkeypatch):
    settings = SegmentSettings(
        input=str(pictures / "images"), output="", members=(MemberSettings(checkpoint=str(letterboxed)),)
    )
    settings, members = resolve_settings(settings)
    rows = [{"image_uri": str(pictures / "images" / name), "selector": None, "prompts": ["bright"]} for name in SIZES]
    masks = {}

    def describe(batch, entry, *more):
        records = original(batch, entry, *more)
        size = entry.height, entry.width
        masks[size] = decode_mask(records[0].mask_rle, size)
        return records

    original = forecast.describe_entry
    monkeypatch.setattr(forecast, "describe_entry", describe)
    assert forecast.measure(settings, members, rows).num_measured == 3
    for name, size in SIZES.items():
        assert_right(masks[size], pictures, name)


def test_calibration_compares_logits_with_masks_at_the_images_own_size(letterboxed, pictures):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(letterboxed), device="cpu")
    records = [
        Record("drawn", "val", name, str(pictures / "images" / name), str(pictures / "masks" / name), {"p1": "bright"})
        for name in SIZES
    ]
    for name, (logits, mask, _) in zip(
        SIZES, calibration._predict(segmenter, records, ExampleReader(DataSettings()), "own"), strict=True
    ):
        np.testing.assert_array_equal(mask, right_mask(pictures, name))
        assert_right(logits >= 0, pictures, name)


def test_training_sees_image_and_mask_in_the_same_place(pictures):
    from jobs.train_feed import _decode

    reader = ExampleReader(DataSettings())
    for name in SIZES:
        record = Record("drawn", "train", name, str(pictures / "images" / name), str(pictures / "masks" / name), {})
        image, mask = _decode(record, reader, SQUARE)
        assert image.shape == (32, 32, 3) and mask.shape == (32, 32)
        assert np.mean((image[..., 0] > 128) != mask.astype(bool)) < 0.06
        is_wide = SIZES[name][0] < SIZES[name][1]
        if name != "square.png":
            padding = image[:12] if is_wide else image[:, :12]
            assert not padding.any()


def test_the_job_and_an_ensemble_with_a_squeezed_member(
    in_process, letterboxed, bright_checkpoint, pictures, tmp_path, capfd
):
    from jobs import segment

    words = ["--checkpoint", str(letterboxed), "--checkpoint", str(bright_checkpoint)]
    settings = ["member_rows=true", "tile.size=100"]  # the long images have two windows
    settings = [word for setting in settings for word in ("--set", setting)]
    assert segment.main([str(pictures / "images"), str(tmp_path / "out"), *words, *settings]) == 0
    assert json.loads(capfd.readouterr().out)["ok"] == 3
    from vlsm import read_masks

    rows = list(read_masks(str(tmp_path / "out")))
    assert len(rows) == 9
    for row in rows:
        assert_right(row["mask"], pictures, row["image_id"])


@pytest.mark.nightly
def test_a_letterboxed_model_is_trained_and_evaluated(ray_cluster, tmp_path, capfd):
    from jobs import evaluate, segment, train

    write_labelled(tmp_path / "drawn", {"train": 16, "val": 4, "test": 4}, seed=3, sides_px=(40, 120))
    settings = "model=pixel options.image_size=32 options.resize=letterbox optim.epochs=2 optim.batch_size=4".split()
    words = [word for setting in settings for word in ("--set", setting)]
    assert train.main([str(tmp_path / "run"), "--dataset", f"drawn={tmp_path / 'drawn'}", *words]) == 0
    checkpoint = tmp_path / "run" / "checkpoint"
    assert vlsm.load_checkpoint(checkpoint).model.image_spec.square == SQUARE
    dataset = ["--dataset", f"drawn={tmp_path / 'drawn'}"]
    assert evaluate.main([str(tmp_path / "scores"), "--checkpoint", str(checkpoint), *dataset]) == 0
    images = str(tmp_path / "drawn" / "images")
    assert segment.main([images, str(tmp_path / "masks"), "--checkpoint", str(checkpoint)]) == 0
    assert len(read_mask_rows(tmp_path / "masks")) == 24
