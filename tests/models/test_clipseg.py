import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

import vlsm
from tests.tiny import TINY_CLIPSEG, save_tiny_clipseg
from vlsm.errors import CheckpointError
from vlsm.models.untrained import write_clipseg

PROMPTS = ["polyp", "a round lesion of the left", "small flat bright polyp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def model(folder):
    return vlsm.build_model("clipseg", source=str(folder), image_size=64).eval()


@pytest.fixture(scope="module")
def theirs(folder):
    return CLIPSegForImageSegmentation.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [64, 96])
@torch.no_grad()
def test_logits_equal_transformers_own_forward(folder, theirs, pixel_values, size):
    model = vlsm.build_model("clipseg", source=str(folder), image_size=size).eval()
    pixel_values = torch.nn.functional.interpolate(pixel_values, size=size)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    expected = theirs(pixel_values=pixel_values, **tokens).logits
    logits = model(pixel_values, PROMPTS)
    assert logits.shape == (3, 1, size, size)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tapped_layers_equal_what_forward_hooks_record(model, theirs, pixel_values):
    recorded = {}
    for index, layer in enumerate(theirs.clip.vision_model.encoder.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: recorded.update({index: output}))
    theirs.clip.vision_model(pixel_values)
    activations = model.towers.encode_images(pixel_values)
    assert model.towers.taps == [0, 1, 3]
    for index, activation in zip([0, 1, 3], activations, strict=True):
        torch.testing.assert_close(activation, recorded[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_equal_those_of_padded_prompts(model, theirs, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padded = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    expected = theirs.clip.get_text_features(**padded).pooler_output
    torch.testing.assert_close(model.encode_prompts(PROMPTS)[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_are_those_of_the_supported_transformers_releases(tmp_path):
    """Recorded with 5.20 and 5.23 alike, of weights that numpy draws: a release that computes otherwise fails here."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    write_clipseg(
        tmp_path,
        text_config=sizes | {"vocab_size": 500, "max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 48},
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    # another size than the stored one, so that the position embedding is interpolated
    model = vlsm.build_model("clipseg", source=str(tmp_path), image_size=64).eval()
    for seed, (name, value) in enumerate(sorted(model.named_parameters())):
        drawn = np.random.RandomState(seed).standard_normal(value.shape).astype(np.float32)
        value.copy_(torch.from_numpy(drawn * 0.2 + (1 if "norm" in name and name.endswith("weight") else 0)))
    image = np.random.RandomState(999).standard_normal((1, 3, 64, 64)).astype(np.float32)
    logits = model(torch.from_numpy(image), ["small round polyp"])[0, 0]
    found = [*logits[::21, ::21].flatten().tolist(), logits.mean().item(), logits.std().item()]
    assert found == pytest.approx(RECORDED, abs=1e-4)


# fmt: off
RECORDED = [
    -0.15951, -0.07662, -0.06994, 0.03836, 0.09397, -0.25448, -0.01987, -0.00247, -0.02953,
    -0.17197, -0.08894, 0.01, 0.05105, 0.13799, -0.00247, -0.2145, -0.00076, 0.13084,
]
# fmt: on


def test_a_prompt_longer_than_the_text_tower_is_cut_with_a_warning_that_names_it(model):
    with pytest.warns(UserWarning, match=r"prompt 'flat flat flat .*' has 32 tokens; .* CLIPSeg reads 16"):
        (features,) = model.encode_prompts(["flat " * 30])
    assert features.shape == (1, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (same,) = model.encode_prompts(["flat " * 14])
    torch.testing.assert_close(features, same)


def _copy(folder, target, change):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_weights_that_lack_tensors_are_refused(folder, tmp_path):
    def drop_decoder(weights):
        for key in [key for key in weights if key.startswith("decoder.")]:
            del weights[key]

    with pytest.raises(CheckpointError, match="lack .* tensors, such as decoder"):
        vlsm.build_model("clipseg", source=_copy(folder, tmp_path / "copy", drop_decoder), image_size=64)


def test_damaged_weights_are_one_sentence(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        vlsm.build_model("clipseg", source=str(tmp_path / "copy"), image_size=64)
    assert "\n" not in str(caught.value)


def test_weights_that_are_nowhere_are_one_sentence():
    with pytest.raises(CheckpointError, match="'CIDAS/no-such-model' cannot be loaded") as caught:
        vlsm.build_model("clipseg", source="CIDAS/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_size_that_patches_do_not_divide_is_refused(folder):
    with pytest.raises(CheckpointError, match="image_size is 50; it must be a multiple of the patch size 16"):
        vlsm.build_model("clipseg", source=str(folder), image_size=50)


def test_an_untrained_decoder_starts_as_the_published_one(tmp_path):
    """Measured in the public code of MedVLSM: q, k, v 0.025, out_proj 0.124, fc2 0.026; biases 0."""
    write_clipseg(tmp_path, **TINY_CLIPSEG | {"reduce_dim": 64, "decoder_intermediate_size": 2048})
    decoder = vlsm.build_model("clipseg", source=str(tmp_path)).decoder
    for layer in decoder.layers:
        weights = {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        weights |= {"fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2}
        stds = {name: module.weight.std().item() for name, module in weights.items()}
        expected = {
            "q_proj": 0.0255,
            "k_proj": 0.0255,
            "v_proj": 0.0255,
            "out_proj": 0.125,
            "fc1": 0.088,
            "fc2": 0.0255,
        }
        assert stds == pytest.approx(expected, rel=0.05)
        assert not any(module.bias.any() for module in weights.values())
    assert not decoder.film_mul.bias.any() and not decoder.reduces[0].bias.any()
