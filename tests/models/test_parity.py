"""Our networks against the published ones: the same parameters and inputs must give the stored outputs."""

import json

import numpy as np
import pytest
import torch

import vlsm
from tests.conftest import SHARED
from vlsm.images.preprocess import ImageSpec
from vlsm.models.ensemble_a import EnsembleA
from vlsm.models.options import EnsembleAOptions
from vlsm.models.towers import Towers

PARITY = SHARED / "reference" / "parity"
pytestmark = pytest.mark.skipif(not PARITY.exists(), reason="the parity fixtures lie outside the repository")

# the fixtures' names of UNet-D's layers, in their order, against ours
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
UNET_NAMES = {"upconv41": "expand", "eca4.conv": "attention.conv", "outconv": "head"} | {
    theirs: f"{block}.{ours}"
    for block, names in BLOCKS.items()
    for theirs, ours in zip(
        names, ("conv1", "conv2", "norm") if block.startswith("down") else ("upconv", "conv", "norm"), strict=True
    )
}
# of what ensemble A has around them
FUSION_NAMES = {
    "film_mul": "fusion.film_mul",
    "film_add": "fusion.film_add",
    "reduce": "fusion.reduce",
    "reduce2": "fusion.drop_prefix",
    "convlast": "fusion.join",
    "decoder2.outconv2": "fusion.join_side",
}


class FixtureTowers(Towers):
    """The fixture begins above BiomedCLIP's frozen towers: these give its activations for any image."""

    def __init__(self, activations):
        super().__init__()
        self.activations = activations
        self.image_spec = ImageSpec(224)
        self.text_width, self.image_width, self.taps = 512, 768, (4, 7, 10)
        self.grid, self.num_prefix_tokens = 14, 1

    def encode_images(self, pixel_values):
        return self.activations


def read_fixture(name):
    return json.loads((PARITY / name).read_text())


def draw(entry):
    values = np.random.RandomState(entry["seed"]).standard_normal(entry["shape"]).astype(np.float32)
    rule = entry.get("rule", "n")
    return torch.from_numpy(np.asarray(eval(rule, {"n": values, "sqrt": np.sqrt, "abs": np.abs}), np.float32))


def fill(model, fixture, rename):
    state = {rename(entry["name"]): draw(entry) for entry in fixture["parameters"]}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


def test_unet_d():
    fixture = read_fixture("unet_d.json")
    model = vlsm.build_model("unet_d").eval()

    def rename(name):
        layer, _, kind = name.rpartition(".")
        return f"network.{UNET_NAMES[layer]}.{kind}"

    fill(model, fixture, rename)
    with torch.no_grad():
        logits = model(draw(fixture["inputs"]["pixel_values"]), ["", ""])
    expected = np.load(PARITY / "unet_d.logits.npy")
    assert np.abs(logits.numpy() - expected.reshape(logits.shape)).max() < 1e-4


def test_ensemble_a_above_its_towers():
    fixture = read_fixture("biomedclipseg_a_head.json")
    inputs = {name: draw(entry) for name, entry in fixture["inputs"].items()}
    towers = FixtureTowers(tuple(inputs[f"activations[{index}]"] for index in range(3)))
    model = EnsembleA.assemble(EnsembleAOptions(), towers).eval()

    def rename(name):
        layer, _, kind = name.rpartition(".")
        if layer in FUSION_NAMES:
            return f"{FUSION_NAMES[layer]}.{kind}"
        if layer.startswith("decoder2."):
            return f"fusion.unet.{UNET_NAMES[layer.removeprefix('decoder2.')]}.{kind}"
        return name.replace("trans_conv1.", "fusion.side.")

    fill(model, fixture, rename)
    text_features = (inputs["conditional_embeddings"],)
    with torch.no_grad():
        features = model.encode_images(inputs["pixel_values"])
        alone = model.decoder.decode(features[:3], text_features[0], towers.num_prefix_tokens)
        logits = model.decode(features, text_features)
    with np.load(PARITY / "biomedclipseg_a_head.npz") as expected:
        assert np.abs(alone[:, 0].numpy() - expected["clipseg_decoder_logits"]).max() < 1e-4
        assert np.abs(logits.numpy() - expected["logits"]).max() < 1e-4


def test_numbers_of_parameters():
    assert sum(parameter.numel() for parameter in vlsm.build_model("unet_d").parameters()) == 11_833_593
    head = EnsembleA.assemble(EnsembleAOptions(), FixtureTowers(()))
    # the paper says 14.5 million: its code has 0.8 million that no output depends on
    assert sum(parameter.numel() for parameter in head.parameters()) == 13_667_641
