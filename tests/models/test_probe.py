"""The probe of a checkpoint: it passes on honest machines, and not with another model, library or tokenizer."""

import json
import logging
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import vlsm
from tests.conftest import each_model
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.checkpoints import check_files, read_checkpoint
from vlsm.config import SegmentSettings
from vlsm.errors import CheckpointError, ProbeError
from vlsm.images import preprocess
from vlsm.limits import MAX_PROBE_BYTES, MAX_PROBE_PROMPTS
from vlsm.models.probe import PRECISIONS, PROBE_NAME, parse_probe
from vlsm.models.probe_making import draw_image, make_probe
from vlsm.segmentation.predictor import Predictor

KINDS = ["clipseg", "biomedclipseg", "sam3", "unet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models whose batch norms have learned something."""
    options = tiny_options(save_tiny_sources(tmp_path_factory.mktemp("sources")))
    torch.manual_seed(5)
    models = {name: vlsm.build_model(name, **options[name]) for name in KINDS}
    for module in models["unet"].modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return models


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        vlsm.save_checkpoint(model, folder / name, prompt="polyp")
    return folder


@pytest.fixture
def copy(checkpoints, tmp_path):
    return lambda name: shutil.copytree(checkpoints / name, tmp_path / name)


def edit(folder, **changes):
    path = folder / "checkpoint.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | changes | {"image": tree["image"] | changes.get("image", {})}))


def check(folder, precision="fp32"):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(folder), "cpu")
    segmenter.precision = precision
    return segmenter.check_probe()


@pytest.mark.parametrize("name", each_model(KINDS))
def test_an_honest_machine_passes_in_every_precision(checkpoints, name):
    exact, rounded = check(checkpoints / name), check(checkpoints / name, "bf16")
    assert exact.difference < 0.05 * exact.tolerance  # batch norms are folded, and the image is alone in its batch
    assert exact.difference < rounded.difference < rounded.tolerance
    assert rounded.tolerance == pytest.approx(4 * exact.tolerance)


def test_a_probe_in_float16_has_a_tolerance_between_the_others(checkpoints):
    probe = vlsm.load_checkpoint(checkpoints / "clipseg").probe
    arrays = {"pixels": probe.pixels, "texts": probe.texts, "logits": probe.logits}
    tolerances = [probe.compare(arrays, precision, "a machine").tolerance for precision in PRECISIONS]
    assert list(PRECISIONS) == ["fp32", "fp16", "bf16"] and tolerances == sorted(tolerances)
    shifted = arrays | {"logits": probe.logits + 1.5 * tolerances[0]}
    assert probe.compare(shifted, "fp16", "a machine").difference == pytest.approx(1.5 * tolerances[0], rel=1e-3)
    with pytest.raises(ProbeError, match="on a machine as where .* the logits of its probe differ by .* most for fp32"):
        probe.compare(shifted, "fp32", "a machine")


def test_a_probe_has_the_prompt_of_the_checkpoint_and_a_hard_one(checkpoints):
    probe = vlsm.load_checkpoint(checkpoints / "clipseg").probe
    assert probe.prompts[0] == "polyp" and len(probe.prompts) == 2
    np.testing.assert_array_equal(probe.decode(), draw_image(64))
    assert (probe.pixels.shape, probe.texts.shape, probe.logits.shape) == ((3, 32, 32), (2, 24), (2, 32, 32))
    assert np.abs(probe.logits[0] - probe.logits[1]).max() > 10 * probe.rounding  # the model reads them


def break_colours(folder, monkeypatch):
    normalize = preprocess.ImageSpec.normalize
    monkeypatch.setattr(preprocess.ImageSpec, "normalize", lambda spec, images: normalize(spec, images).flip(1))


def break_layout(folder, monkeypatch):
    resize = preprocess.Square.resize_image
    monkeypatch.setattr(preprocess.Square, "resize_image", lambda square, image: resize(square, image).swapaxes(0, 1))


def break_antialiasing(folder, monkeypatch):
    def resize(pixels, size):
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST))

    monkeypatch.setattr(preprocess, "resize_bilinear", resize)


def swap_statistics(folder, monkeypatch):
    image = yaml.safe_load((folder / "checkpoint.yaml").read_text())["image"]
    edit(folder, image={"mean": image["std"], "std": image["mean"]})


def use_letterbox(folder, monkeypatch):
    edit(folder, image={"resize": "letterbox"})


def change_tokens(folder, monkeypatch):
    """Two words exchange their numbers."""
    path = folder / "clipseg" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["polyp</w>"], vocabulary["lesion</w>"] = vocabulary["lesion</w>"], vocabulary["polyp</w>"]
    path.write_text(json.dumps(tree))


def change_weights(part, change):
    def break_it(folder, monkeypatch):
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if part in name:
                weights[name] = change(weights[name])
        save_file(weights, folder / "model.safetensors")

    return break_it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (break_colours, "the resized and normalised pixels of its probe differ by"),
        (break_layout, "the resized and normalised pixels of its probe differ by"),
        (break_antialiasing, "the resized and normalised pixels of its probe differ by"),
        (swap_statistics, "the resized and normalised pixels .* or mean and std were changed"),
        (use_letterbox, "the resized and normalised pixels of its probe differ by"),
        (change_tokens, "the text features of its probe differ by .* a tokenizer or a text tower is another one"),
        (change_weights("text_projection", lambda weight: weight.flip(0)), "the text features of its probe differ by"),
        (change_weights("layers.0.self_attn.q_proj.bias", lambda bias: bias + 1), "the (text features|logits) of its"),
        (change_weights("decoder.layers.1.mlp.fc1.weight", lambda weight: weight.flip(0)), "the logits of its probe"),
        (change_weights("decoder.reduces.0.bias", lambda bias: bias * float("nan")), "logits .* differ by nan, and"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(copy, monkeypatch, break_it, message, precision):
    folder = copy("clipseg")
    break_it(folder, monkeypatch)
    with pytest.raises(ProbeError, match=message) as caught:
        check(folder, precision)
    assert "on this machine (cpu, torch" in str(caught.value) and f"the most for {precision}; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_computes_otherwise_is_refused(checkpoints, monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, key, value, **rest: attention(
            query, key.roll(1, 2), value, **rest
        )
    )  # fmt: skip
    with pytest.raises(ProbeError):
        check(checkpoints / "clipseg", "bf16")


def test_calibration_prompt_threshold_and_place_do_not_matter(copy):
    folder = copy("clipseg")
    calibration = {"temperature": 2.5, "threshold": 0.4, "num_images": 1, "error_before": 0.1, "error_after": 0.1}
    calibration |= {"dice_at_half": 0.5, "dice": 0.5, "min_confidence": None, "area_fraction": [0, 1]}
    before = check(folder)
    edit(folder, prompt="a stone", threshold=0.4, calibration=calibration)
    after = check(folder.rename(folder.with_name("another")))
    assert after.tolerance == before.tolerance and after.difference == pytest.approx(before.difference, abs=1e-5)


def test_a_model_is_probed_as_it_is_saved_and_stays_as_it_was(models, tmp_path):
    model = models["clipseg"].set_trainable("lora").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    vlsm.save_checkpoint(model, tmp_path / "lora")
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert check(tmp_path / "lora").difference < 0.05 * check(tmp_path / "lora").tolerance
    model.set_trainable("decoder")


def test_a_sharded_model_is_probed_from_its_files(models, checkpoints, tmp_path):
    weights = models["unet"].state_dict()
    vlsm.save_checkpoint(models["unet"], tmp_path / "whole", prompt="polyp", weights=weights)
    whole, usual = (parse_probe((folder / PROBE_NAME).read_bytes(), "x", 64) for folder in (
        tmp_path / "whole", checkpoints / "unet"
    ))  # fmt: skip
    np.testing.assert_allclose(whole.logits, usual.logits, atol=1e-5)


def test_logits_that_are_no_numbers_are_no_checkpoint(models, tmp_path):
    model = vlsm.build_model("pixel", image_size=8)
    torch.nn.init.constant_(model.network.bias, float("inf"))
    with pytest.raises(CheckpointError, match="the model gives logits that are no numbers"):
        vlsm.save_checkpoint(model, tmp_path / "ck")
    assert not (tmp_path / "ck" / "checkpoint.yaml").exists()


@pytest.mark.parametrize("size", [1, 16, 33, 2048])
def test_every_size_of_input_has_a_probe(size):
    probe = parse_probe(make_probe(vlsm.build_model("pixel", image_size=size)), "x", size)
    side = min(32, size)
    assert probe.logits.shape == (1, side, side) and probe.texts.shape == (1, 0)


def test_each_member_of_a_run_is_checked_and_named(checkpoints, copy, caplog):
    caplog.set_level(logging.INFO, "vlsm")
    broken, old = copy("clipseg"), copy("unet")
    (old / PROBE_NAME).unlink()

    def predictor(*members, probe=True):
        words = [{"checkpoint": str(path)} for path in members]
        settings = SegmentSettings(input="", output="", members=words, threshold=0.5, run={"probe": probe})
        return Predictor(settings, {number: read_checkpoint(str(path)) for number, path in enumerate(members)}, "cpu")

    predictor(checkpoints / "clipseg", broken, old).check_probes()
    assert caplog.text.count("computes as it should: the logits of its probe differ by ") == 2
    assert f"checkpoint {str(old)!r} has no probe, as an earlier version wrote it" in caplog.text
    swap_statistics(broken, None)
    with pytest.raises(ProbeError) as caught:
        predictor(checkpoints / "clipseg", broken).check_probes()
    assert str(caught.value).startswith(f"checkpoint {str(broken)!r}: the model does not compute on this machine")
    assert str(caught.value).endswith("; to segment all the same: --set run.probe=false")
    predictor(checkpoints / "clipseg", broken, probe=False).check_probes()


def png(size):
    import io

    sink = io.BytesIO()
    Image.new("RGB", size).save(sink, "PNG")
    return np.frombuffer(sink.getvalue(), np.uint8)


def words(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": png((1025, 1024))}, "no probe: too_large: "),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "its image is uint8 and no PNG"),
        ({"image": np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(99), np.uint8)}, "no probe: corrupt: "),
        ({"image": png((8, 8)).astype(np.float32)}, "its image is float32 and no PNG"),
        ({"pixels": np.zeros((3, 64, 64), np.float32)}, r"pixels is float32 of shape \(3, 64, 64\); it must be"),
        ({"logits": np.zeros((2, 32, 32))}, "logits is float64 of shape"),
        ({"logits": np.zeros((3, 32, 32), np.float32)}, "logits is float32 of shape"),
        ({"logits": np.full((2, 32, 32), np.nan, np.float32)}, "logits has values that are no numbers"),
        ({"texts": np.full((2, 24), np.inf, np.float32)}, "texts has values that are no numbers"),
        ({"texts": np.zeros((2, 300), np.float32)}, r"it must be float32 of shape \(2, 256\)"),
        ({"texts": np.zeros(2, np.float32)}, "texts is float32 of shape"),
        ({"rounding": np.array([-1], np.float32)}, r"rounding is -1\.0; it must be 0 or more"),
        ({"rounding": np.zeros((), np.float32)}, r"rounding is float32 of shape \(\)"),
        ({"prompts": words(["a"] * (MAX_PROBE_PROMPTS + 1))}, "its prompts must be a list of 1 to 12 texts"),
        ({"prompts": words(["a", "a" * 9000])}, "a prompt must be a text of 8,192 letters at most"),
        ({"prompts": words(["a", 5])}, "a prompt must be a text"),
        ({"prompts": words({"a": 1})}, "its prompts must be a list"),
        ({"prompts": words([[]] * 2)}, "a prompt must be a text"),
        ({"prompts": np.zeros(9, np.uint8)}, "its prompts must be a list"),
        ({"more": np.zeros(9, np.uint8)}, "no probe: it has image, logits, more, pixels"),
        (b"", "is damaged"),
        (b"\xff" * 100, "is damaged"),
        pytest.param(bytes(MAX_PROBE_BYTES + 1), "has 4,194,305 bytes; a probe has 4,194,304 at most", id="long"),
    ],
)
def test_a_hostile_probe_is_one_sentence_before_and_while_the_model_is_built(copy, changes, message):
    folder = copy("clipseg")
    path = folder / PROBE_NAME
    if isinstance(changes, bytes):
        path.write_bytes(changes)
    else:
        path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()) | changes))
    for use in (lambda: check_files(read_checkpoint(str(folder)), str(folder)), lambda: vlsm.load_checkpoint(folder)):
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert f"{PROBE_NAME} of checkpoint {str(folder)!r}" in str(caught.value) and len(str(caught.value)) < 600
