from dataclasses import replace

import numpy as np
import pytest
import torch

import vlsm
from tests.conftest import save_square
from tests.tiny import save_tiny_clipseg
from vlsm.checkpoints import Calibration
from vlsm.config import SegmentSettings
from vlsm.segmentation.image_rows import describe_image
from vlsm.segmentation.masks import decode_probability, probabilities


@pytest.fixture(scope="module", params=["unet_d", "clipseg"])
def checkpoint(request, tiny_checkpoint, tmp_path_factory):
    if request.param == "unet_d":
        return vlsm.load_checkpoint(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    model = vlsm.build_model("clipseg", source=str(save_tiny_clipseg(folder / "hub")), image_size=64)
    vlsm.save_checkpoint(model, folder / "ck", prompt="polyp")
    return vlsm.load_checkpoint(folder / "ck")


@pytest.fixture(scope="module")
def images(checkpoint):
    size = checkpoint.model.image_spec.size
    return np.random.default_rng(0).integers(0, 255, (5, size, size, 3), dtype=np.uint8)


PROMPTS = [["polyp"], ["a lesion", "polyp"], ["flat polyp"], ["polyp"], ["small", "round", "bright polyp of the left"]]


def assert_same(expected, actual):
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * max(1.0, np.abs(one).max())


def test_a_prediction_never_depends_on_its_batch_mates(checkpoint, images):
    together = vlsm.Segmenter(checkpoint, batch_size=5).predict_logits(images, PROMPTS)
    alone = [
        vlsm.Segmenter(checkpoint, batch_size=1).predict_logits(images[i : i + 1], PROMPTS[i : i + 1])[0]
        for i in range(5)
    ]
    assert_same(alone, together)
    order = [3, 0, 4, 2, 1]
    mixed = vlsm.Segmenter(checkpoint, batch_size=2).predict_logits(images[order], [PROMPTS[i] for i in order])
    assert_same([alone[i] for i in order], mixed)


def test_each_prompt_is_encoded_once_and_each_image_once(checkpoint, images, monkeypatch):
    segmenter = vlsm.Segmenter(checkpoint, batch_size=2)
    encoded, seen = [], []
    encode_prompts, encode_images = checkpoint.model.encode_prompts, checkpoint.model.encode_images
    monkeypatch.setattr(
        checkpoint.model, "encode_prompts", lambda texts: encoded.extend(texts) or encode_prompts(texts)
    )
    monkeypatch.setattr(
        checkpoint.model, "encode_images", lambda values: seen.append(len(values)) or encode_images(values)
    )
    segmenter.predict_logits(images, PROMPTS)
    segmenter.predict_logits(images, PROMPTS)
    assert sorted(encoded) == sorted({text for texts in PROMPTS for text in texts})
    assert sum(seen) == 2 * len(images)


def test_masks_have_the_size_of_their_images(checkpoint):
    images = [np.zeros((h, w, 3), np.uint8) for h, w in ((50, 70), (1, 1), (200, 33))]
    segmenter = vlsm.Segmenter(checkpoint)
    assert [mask.shape for mask in segmenter.segment(images, "polyp")] == [(50, 70), (1, 1), (200, 33)]
    assert [mask.shape for mask in segmenter.segment(images, ["polyp", "lesion"], allow_equal_masks=True)] == [
        (2, 50, 70),
        (2, 1, 1),
        (2, 200, 33),
    ]
    assert segmenter.segment([], "polyp") == []


@pytest.mark.parametrize("corner", ["top left", "top right", "bottom left", "bottom right"])
def test_the_mask_lies_where_the_object_is(bright_checkpoint, tmp_path, corner):
    image = save_square(tmp_path / "x.png", size=(60, 150), corner=corner)
    mask = vlsm.Segmenter(vlsm.load_checkpoint(bright_checkpoint)).segment([image])[0]
    is_bright = image[..., 0] > 128
    overlap = (mask == 1) & is_bright
    assert overlap.sum() / ((mask == 1) | is_bright).sum() > 0.6


def test_what_is_no_image_is_refused(tiny_checkpoint):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(tiny_checkpoint))
    with pytest.raises(ValueError, match=r"float64 of shape \(4, 4, 3\)"):
        segmenter.segment([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="one prompt or more"):
        segmenter.segment([np.zeros((4, 4, 3), np.uint8)], [])


def test_a_probability_map_is_calibrated_as_the_mask_is(checkpoint, images):
    raw = vlsm.Segmenter(checkpoint).predict_logits(images[:1], [["polyp"]])[0]
    calibration = Calibration.model_construct(temperature=0.05)
    calibrated = checkpoint.settings.model_copy(update={"calibration": calibration})
    segmenter = vlsm.Segmenter(replace(checkpoint, settings=calibrated))
    threshold = float(np.quantile(probabilities(raw / 0.05), 0.7))
    (mask,) = segmenter.segment(images[:1], "polyp", threshold)
    settings = SegmentSettings(
        input="", output="", members=[{"checkpoint": "x"}], threshold=threshold, probability_maps="all"
    )
    logits = segmenter.predict_logits(images[:1], [["polyp"]])[0][:, None]
    (row,) = describe_image([[logits]], mask.shape, settings, [checkpoint.model.image_spec.square])
    found = decode_probability(row.probability_map)
    np.testing.assert_allclose(found, probabilities(raw[0] / 0.05), atol=0.501 / 255)
    certain = np.abs(found - threshold) > 0.501 / 255
    assert 0 < mask.mean() < 1 and certain.mean() > 0.5
    np.testing.assert_array_equal((found > threshold)[certain], mask[certain] == 1)
