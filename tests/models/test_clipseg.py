import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

import vlsm
from tests.tiny import save_tiny_clipseg
from vlsm.errors import CheckpointError

PROMPTS = ["polyp", "a round lesion of the left", "small flat bright polyp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def model(folder):
    return vlsm.build_model("clipseg", source=str(folder), image_size=64).eval()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_logits_equal_transformers_own_forward(folder, model, pixel_values):
    theirs = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(pixel_values=pixel_values, **tokens).logits
        logits = model(pixel_values, model.encode_prompts(PROMPTS))
    assert logits.shape == (3, 1, 64, 64)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-5, rtol=0)


def test_another_input_size_equals_transformers_too(folder, pixel_values):
    model = vlsm.build_model("clipseg", source=str(folder), image_size=96).eval()
    larger = torch.nn.functional.interpolate(pixel_values, size=96)
    theirs = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(pixel_values=larger, **tokens).logits
        torch.testing.assert_close(model(larger, model.encode_prompts(PROMPTS))[:, 0], expected, atol=1e-5, rtol=0)


def test_the_prompt_decides(model, pixel_values):
    with torch.no_grad():
        one, two, _ = model(pixel_values[:1].expand(3, -1, -1, -1), model.encode_prompts(PROMPTS))
    assert (one - two).abs().max() > 1e-3


def test_a_prompt_is_embedded_the_same_alone_and_among_longer_ones(model):
    alone = torch.cat([model.encode_prompts([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(model.encode_prompts(PROMPTS), alone, atol=1e-5, rtol=1e-4)


def test_a_prompt_longer_than_the_text_tower_is_cut(model):
    assert model.encode_prompts(["polyp " * 200]).shape == (1, 24)


def test_gradients_reach_the_decoder_and_nothing_else(model, pixel_values):
    model.zero_grad()
    model(pixel_values, model.encode_prompts(PROMPTS)).sum().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("network.decoder.")}
    model.zero_grad()


def test_a_checkpoint_needs_nothing_but_itself(folder, model, pixel_values, tmp_path):
    vlsm.save_checkpoint(model, tmp_path / "ck", prompt="polyp", threshold=0.4)
    (tmp_path / "ck").rename(tmp_path / "moved")
    restored = vlsm.load_checkpoint(tmp_path / "moved")
    assert (restored.settings.prompt, restored.settings.threshold) == ("polyp", 0.4)
    with torch.no_grad():
        expected = model(pixel_values, model.encode_prompts(PROMPTS)).numpy()
        again = restored.model(pixel_values, restored.model.encode_prompts(PROMPTS)).numpy()
    np.testing.assert_array_equal(expected, again)


def test_weights_that_are_nowhere_are_one_sentence():
    with pytest.raises(CheckpointError, match="'CIDAS/no-such-model' cannot be loaded") as caught:
        vlsm.build_model("clipseg", source="CIDAS/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_size_that_patches_do_not_divide_is_refused(folder):
    with pytest.raises(CheckpointError, match="image_size is 50; it must be a multiple of the patch size 16"):
        vlsm.build_model("clipseg", source=str(folder), image_size=50)
