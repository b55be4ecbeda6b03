"""Models on one pretrained tower: it runs once, its weights are there once, and nothing else changes."""

import numpy as np
import pytest
import torch

import vlsm
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.models.clipseg import CLIPSegTowers
from vlsm.models.sharing import share_towers

PROMPTS = [["polyp", "a flat lesion"]] * 5


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_options(save_tiny_sources(tmp_path_factory.mktemp("towers")))


def build(options, name, seed=0):
    torch.manual_seed(seed)
    return vlsm.build_model(name, **options[name])


@pytest.fixture
def calls(monkeypatch):
    found, encode = [], CLIPSegTowers.encode_images

    def counted(self, pixel_values):
        found.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(CLIPSegTowers, "encode_images", counted)
    return found


def segmenters(tmp_path, models):
    for number, model in enumerate(models):
        vlsm.save_checkpoint(model, tmp_path / str(number), prompt="polyp")
        yield vlsm.Segmenter(vlsm.load_checkpoint(tmp_path / str(number)), device="cpu", batch_size=2)


def test_an_equal_tower_runs_once_and_is_there_once(options, calls, tmp_path):
    models = [build(options, "clipseg"), build(options, "vlsm_b", 1), build(options, "vlsm_b", 2)]
    images = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    loaded = list(segmenters(tmp_path, models))
    calls.clear()  # folding tries itself out
    alone = [[one.predict_logits(images[start : start + 2], PROMPTS[:2]) for start in (0, 2)] for one in loaded]
    assert calls == [2] * 6
    calls.clear()
    assert share_towers([one.model for one in loaded]) == 2
    for number, start in enumerate((0, 2)):
        for own, one in zip(alone, loaded, strict=True):
            np.testing.assert_array_equal(one.predict_logits(images[start : start + 2], PROMPTS[:2]), own[number])
    assert calls == [2, 2]
    tower, *others = [one.model.towers.image_tower for one in loaded]
    for other in others:
        assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in tower.parameters()}


def test_towers_that_have_learned_otherwise_are_not_shared(options, calls, tmp_path):
    models = [build(options, "clipseg"), build(options, "vlsm_b"), build(options, "vlsm_a")]
    with torch.no_grad():
        next(models[1].towers.image_tower.parameters()).add_(0.1)
    loaded = list(segmenters(tmp_path, models))
    calls.clear()  # folding tries itself out
    assert share_towers([one.model for one in loaded]) == 0
    images = np.zeros((1, 64, 64, 3), np.uint8)
    for one in loaded:
        one.predict_logits(images, PROMPTS[:1])
    assert calls == [1, 1]
