"""What trainings add to the towers: low-rank adapters that merge, and small layers that stay."""

import re

import pytest
import torch

import vlsm
from tests.conftest import each_model
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.errors import CheckpointError
from vlsm.models import BLIND, MODELS
from vlsm.models.adapters import Bottleneck
from vlsm.models.towers import Towers

PROMPTS = ["polyp", "a round lesion of the left", "polyp"]
TOWERS = [name for name in MODELS if name not in (*BLIND, "stack")]
ADAPTERS = ["lora", "dora", "adapters"]
# the attention of open_clip's own transformers is one module, which peft's DoRA does not know; a ResNet has no blocks
REFUSED = {
    ("openclip_seg", "dora", "image"),
    ("openclip_seg", "dora", "text"),
    ("cris", "dora", "text"),
    ("cris", "adapters", "image"),
}
CASES = [
    (name, trainable, adapt)
    for name in TOWERS
    for trainable in ADAPTERS
    for adapt in ("image", "text")
    if (name, trainable, adapt) not in REFUSED
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_options(save_tiny_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(options):
    def build(name, *trainable, **more):
        torch.manual_seed(5)
        model = vlsm.build_model(name, **options[name]).eval()
        return model.set_trainable(*trainable, **more) if trainable else model

    return build


def added(model):
    """The names of the weights that a training has added."""
    return {name for name, _ in model.named_parameters() if re.search(r"lora_|\.adapter\.", name)}


def of_towers(model, side):
    parts = [getattr(towers, side) for towers in model.modules() if isinstance(towers, Towers)]
    ids = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@torch.no_grad()
def change(model, scale=0.3):
    """Change all weights that a training has added, as it would."""
    names = added(model)
    for name, parameter in list(model.named_parameters()):
        if name in names and "magnitude" in name:
            parameter.mul_(1.1)
        elif name in names:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * scale)


@pytest.mark.parametrize(("name", "trainable", "adapt"), each_model(CASES))
def test_untrained_adapters_change_nothing_and_only_they_learn_in_the_towers(
    build, pixel_values, name, trainable, adapt
):
    model = build(name)
    with torch.no_grad():
        expected = model(pixel_values, PROMPTS)
    plain = {name for name, _ in model.named_parameters()}
    model.set_trainable(trainable, 4, adapt, 16).train()
    for towers in (part for part in model.modules() if isinstance(part, Towers)):
        assert not towers.training
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values, PROMPTS), expected)
    (model.train()(pixel_values, PROMPTS) * torch.randn(expected.shape)).sum().backward()
    names = added(model)
    assert names and names <= of_towers(model, f"{adapt}_tower")
    decoder = {name for name in plain if ".towers." not in f".{name}"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names | decoder
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names | decoder
    assert model.learns_text == (adapt == "text") and model.has_frozen_towers == (adapt == "text")


@pytest.mark.parametrize(("name", "trainable", "adapt"), sorted(REFUSED))
def test_towers_that_cannot_be_adapted_are_one_sentence(build, name, trainable, adapt):
    with pytest.raises(CheckpointError, match="choose another trainable") as caught:
        build(name, trainable, 4, adapt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", each_model(["clipseg", "biomedclipseg", "openclip_seg", "transformers_seg", "sam3", "vlsm_c"])
)
@torch.no_grad()
def test_small_layers_stay_in_a_checkpoint(build, pixel_values, tmp_path, name):
    model = build(name, "adapters", 8, "both", 16)
    before = model(pixel_values, PROMPTS)
    change(model)
    expected = model(pixel_values, PROMPTS)
    assert (expected - before).abs().max() > 1e-4
    vlsm.save_checkpoint(model, tmp_path)
    restored = vlsm.load_checkpoint(tmp_path).model
    assert restored.options.adapters == {"image": 16, "text": 16}
    assert added(restored) == added(model)
    frozen = [name for name, parameter in restored.named_parameters() if not parameter.requires_grad]
    assert added(restored) <= set(frozen)
    torch.testing.assert_close(restored(pixel_values, PROMPTS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trainable", ["lora", "dora"])
@pytest.mark.parametrize("name", each_model(["clipseg", "biomedclipseg", "transformers_seg", "sam3", "vlsm_b"]))
@torch.no_grad()
def test_low_rank_adapters_of_both_towers_merge_in_a_checkpoint(build, pixel_values, tmp_path, name, trainable):
    model = build(name, trainable, 4, "both")
    before = model(pixel_values, PROMPTS)
    change(model)
    expected = model(pixel_values, PROMPTS)
    assert (expected - before).abs().max() > 1e-4
    vlsm.save_checkpoint(model, tmp_path)
    restored = vlsm.load_checkpoint(tmp_path).model
    assert not added(restored) and restored.options.adapters == {}
    torch.testing.assert_close(restored(pixel_values, PROMPTS), expected, atol=1e-4, rtol=1e-4)
    assert added(model)  # the model itself goes on learning


@pytest.mark.parametrize("name", each_model(["openclip_seg", "cris"]))
@torch.no_grad()
def test_low_rank_adapters_of_open_clips_own_text_tower_merge(build, pixel_values, tmp_path, name):
    model = build(name, "lora", 4, "both")
    change(model)
    expected = model(pixel_values, PROMPTS)
    vlsm.save_checkpoint(model, tmp_path)
    restored = vlsm.load_checkpoint(tmp_path).model
    assert not added(restored)
    torch.testing.assert_close(restored(pixel_values, PROMPTS), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_trainings_go_on_from_small_layers(build, pixel_values, tmp_path):
    model = build("clipseg", "adapters", 8, "text", 16)
    change(model)
    vlsm.save_checkpoint(model, tmp_path / "first")
    model = vlsm.load_checkpoint(tmp_path / "first").model
    expected = model(pixel_values, PROMPTS)
    layers = added(model)
    for trainable, learning in (("decoder", set()), ("all", layers), ("adapters", layers)):
        model.set_trainable(trainable, 8, "text", 16)
        assert {name for name, p in model.named_parameters() if p.requires_grad} & layers == learning
        torch.testing.assert_close(model(pixel_values, PROMPTS), expected, atol=1e-5, rtol=1e-5)
    model.set_trainable("adapters", 8, "both", 16)
    assert len(added(model)) > len(layers) and model.options.adapters == {"image": 16, "text": 16}
    torch.testing.assert_close(model(pixel_values, PROMPTS), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="has adapters of width 16 already; adapter_width is 8: set it to 16"):
        model.set_trainable("adapters", 8, "image", 8)
    model.set_trainable("lora", 4, "both")
    change(model)
    expected = model(pixel_values, PROMPTS)
    vlsm.save_checkpoint(model, tmp_path / "second")
    restored = vlsm.load_checkpoint(tmp_path / "second").model
    assert any(isinstance(part, Bottleneck) for part in restored.modules())
    torch.testing.assert_close(restored(pixel_values, PROMPTS), expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_with_small_layers_is_no_larger_than_its_weights(build, tmp_path):
    vlsm.save_checkpoint(build("clipseg"), tmp_path)
    path = tmp_path / "checkpoint.yaml"
    path.write_text(path.read_text().replace("adapters: {}", "adapters: {image: 4096}"))
    with pytest.raises(CheckpointError, match="do not fit its model in 32 places|far larger than its weights"):
        vlsm.load_checkpoint(tmp_path)
    path.write_text(path.read_text().replace("adapters: {image: 4096}", "adapters: {image: 100000}"))
    with pytest.raises(CheckpointError, match="adapters.image is 100000"):
        vlsm.load_checkpoint(tmp_path)
