import json

import numpy as np
import pytest
import torch

import vlsm
from tests.conftest import SHARED
from vlsm.errors import CheckpointError

PARITY = SHARED / "reference" / "parity"
# the fixture's names, in its order, against ours
BLOCKS = {
    "down.0": ("conv11", "conv12", "bn1"),
    "down.1": ("conv22", "conv222", "bn2"),
    "down.2": ("conv33", "conv333", "bn3"),
    "down.3": ("conv44", "conv444", "bn4"),
    "up.0": ("upconv4", "convup4", "upbn4"),
    "up.1": ("upconv3", "convup3", "upbn3"),
    "up.2": ("upconv2", "convup2", "upbn2"),
    "up.3": ("upconv1", "convup1", "upbn1"),
}
NAMES = {"upconv41": "expand", "eca4.conv": "attention.conv", "outconv": "head"} | {
    theirs: f"{block}.{ours}"
    for block, names in BLOCKS.items()
    for theirs, ours in zip(
        names, ("conv1", "conv2", "norm") if block.startswith("down") else ("upconv", "conv", "norm"), strict=True
    )
}


def draw(entry):
    values = np.random.RandomState(entry["seed"]).standard_normal(entry["shape"]).astype(np.float32)
    rule = entry.get("rule", "n")
    return torch.from_numpy(np.asarray(eval(rule, {"n": values, "sqrt": np.sqrt, "abs": np.abs}), np.float32))


@pytest.mark.skipif(not PARITY.exists(), reason="the parity fixtures lie outside the repository")
def test_logits_equal_the_published_network():
    fixture = json.loads((PARITY / "unet_d.json").read_text())
    model = vlsm.build_model("unet_d").eval()
    state = {}
    for entry in fixture["parameters"]:
        name, _, kind = entry["name"].rpartition(".")
        state[f"{NAMES[name]}.{kind}"] = draw(entry)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    with torch.no_grad():
        logits = model(draw(fixture["inputs"]["pixel_values"]), model.encode_prompts(["", ""]))
    expected = np.load(PARITY / "unet_d.logits.npy")
    assert np.abs(logits.numpy() - expected.reshape(logits.shape)).max() < 1e-4


def test_the_published_size_is_11_8_million_parameters():
    assert sum(parameter.numel() for parameter in vlsm.build_model("unet_d").parameters()) == 11_833_593


def test_every_parameter_learns():
    model = vlsm.build_model("unet_d", image_size=32, width=4)
    model(torch.randn(2, 3, 32, 32), model.encode_prompts(["", ""])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet_e", {}, "unknown model 'unet_e'; did you mean 'unet_d'? known models: clipseg, unet_d"),
        ("unet_d", {"widht": 3}, "unknown key 'widht'; did you mean 'width'?"),
        ("unet_d", {"image_size": 100}, "image_size is 100"),
    ],
)
def test_an_unknown_model_or_option_names_the_nearest(name, options, message):
    with pytest.raises(CheckpointError) as caught:
        vlsm.build_model(name, **options)
    assert message in str(caught.value)
