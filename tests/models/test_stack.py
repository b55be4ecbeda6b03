"""Stacks: trained checkpoints that stay as they are, and a convolution over their logits."""

import json
import shutil

import pytest
import torch
import yaml
from torch.nn.functional import interpolate

import vlsm
from tests.tiny import save_tiny_clipseg
from vlsm.checkpoints import check_files, read_checkpoint, read_settings
from vlsm.errors import CheckpointError
from vlsm.models.sharing import share_towers

PROMPTS = ["polyp", "a flat lesion"]
CALIBRATION = {
    "temperature": 4.0, "threshold": 0.4, "num_images": 1, "error_before": 0.0, "error_after": 0.0,
    "dice_at_half": 1.0, "dice": 1.0, "min_confidence": None, "area_fraction": [0.0, 1.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with other sides, other means and stds: a CLIPSeg, two CNNs, and a CNN that letterboxes."""
    folder = tmp_path_factory.mktemp("members")
    source = str(save_tiny_clipseg(folder / "source"))
    torch.manual_seed(2)
    members = {
        "clipseg": vlsm.build_model("clipseg", source=source, image_size=64),
        "unet_d": vlsm.build_model("unet_d", image_size=32, width=4, normalize=False),
        "pixel": vlsm.build_model("pixel", image_size=96),
        "letterbox": vlsm.build_model("pixel", image_size=96, resize="letterbox"),
    }
    for norm in members["unet_d"].modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # statistics as if learned
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    for name, model in members.items():
        vlsm.save_checkpoint(model, folder / name, prompt="polyp")
    shutil.rmtree(folder / "source")  # a checkpoint needs nothing but itself
    return folder


@pytest.fixture(scope="module")
def stack(folder):
    def stack(*names, **options):
        return vlsm.build_model("stack", members=[str(folder / name) for name in names], **options).eval()

    return stack


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 255, (2, 96, 96, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def own_logits(checkpoint, images, size):
    """The logits of a member by itself, for images that are resized to its side, at the side `size`."""
    model = vlsm.load_checkpoint(checkpoint).model
    spec, values = model.image_spec, images.permute(0, 3, 1, 2) / 255
    if spec.size != images.shape[1]:
        values = interpolate(values, (spec.size, spec.size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(column)[:, None, None] for column in (spec.mean, spec.std))
    logits = model((values - mean) / std, PROMPTS)
    return logits if spec.size == size else interpolate(logits, (size, size), mode="bilinear")


@pytest.mark.parametrize("kernel", [1, 5])
@torch.no_grad()
def test_an_untrained_stack_is_the_mean_of_its_members_logits(folder, stack, images, kernel):
    names = ["clipseg", "unet_d", "pixel"]
    model = stack(*names, kernel=kernel)
    assert model.image_spec.size == 96 and model.head.weight.numel() == 3 * kernel**2
    logits = model(model.image_spec.normalize(images), PROMPTS)
    expected = torch.stack([own_logits(folder / name, images, 96) for name in names])
    assert expected.std(dim=0).min() > 0  # the members differ everywhere
    torch.testing.assert_close(logits, expected.mean(dim=0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_calibrated_member_counts_with_its_temperature(folder, stack, images, tmp_path):
    shutil.copytree(folder / "pixel", tmp_path / "calibrated")
    path = tmp_path / "calibrated" / "checkpoint.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"calibration": CALIBRATION}))
    members = [str(folder / "clipseg"), str(tmp_path / "calibrated")]
    model = vlsm.build_model("stack", members=members, image_size=64).eval()
    assert model.head.weight.flatten().tolist() == [1 / 2, 1 / 8]
    assert model.image_spec.size == 64


@torch.no_grad()
def test_a_stack_joins_logits_by_its_weights(stack, images):
    model = stack("unet_d", "pixel")
    pixels = model.image_spec.normalize(images)
    features, texts = model.encode_images(pixels), model.encode_prompts(PROMPTS)
    large = interpolate(features[0], (96, 96), mode="bilinear")
    model.head.weight.copy_(torch.tensor([2.0, -3.0])[None, :, None, None])
    model.head.bias.fill_(0.5)
    torch.testing.assert_close(model.decode(features, texts), 2 * large - 3 * features[1] + 0.5)


@torch.no_grad()
def test_a_checkpoint_holds_its_members_and_names_no_place(folder, stack, images, tmp_path):
    model = stack("clipseg", "unet_d")
    model.head.weight.normal_()
    vlsm.save_checkpoint(model, tmp_path / "ck", prompt="polyp")
    text = (tmp_path / "ck" / "checkpoint.yaml").read_text()
    assert str(folder / "clipseg") not in text and str(folder / "unet_d") not in text
    settings = read_settings(str(tmp_path / "ck"))
    assert [name.partition("@")[0] for name in settings.options["members"]] == ["clipseg", "unet_d"]
    assert (tmp_path / "ck" / "members" / "0" / "clipseg" / "config.json").exists()
    values = torch.randn(2, 3, 64, 64)
    expected = model(values, PROMPTS)
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        restored = vlsm.load_checkpoint(tmp_path / "ck").model
    finally:
        hidden.rename(folder)
    torch.testing.assert_close(restored(values, PROMPTS), expected, atol=1e-6, rtol=1e-6)
    assert [member.image_spec for member in restored.models] == [member.image_spec for member in model.models]
    vlsm.save_checkpoint(vlsm.build_model("pixel"), tmp_path / "ck")  # another model takes its place
    assert {name.rpartition("/")[0] for name in read_checkpoint(str(tmp_path / "ck"))} == {""}


def test_only_the_convolution_learns(stack):
    model = stack("clipseg", "unet_d").train()
    before = {name: value.clone() for name, value in model.members.state_dict().items()}
    model(torch.randn(2, 3, 64, 64), PROMPTS).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "head.weight",
        "head.bias",
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    assert model.training and not any(part.training for part in model.members.modules())
    after = model.members.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # batch statistics, too


@torch.no_grad()
def test_members_with_equal_inputs_share_equal_towers(folder, stack, tmp_path):
    other = vlsm.load_checkpoint(folder / "clipseg").model
    other.decoder.reduces[0].weight.mul_(2)
    vlsm.save_checkpoint(other, tmp_path / "other")
    model = vlsm.build_model("stack", members=[str(folder / "clipseg"), str(tmp_path / "other")]).eval()
    values = torch.randn(2, 3, 64, 64)
    expected = model(values, PROMPTS)
    assert share_towers([model]) == 1
    calls = []
    model.models[0].towers.image_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    layers = model.models[0].towers.clip.vision_model.encoder.layers
    layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(values, PROMPTS), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["pixel"], {}, "members is .*at least 2 items"),
        (["pixel"] * 9, {}, "members is .*at most 8 items"),
        (["pixel", "nowhere"], {}, "there is no checkpoint at '.*/nowhere'"),
        (["pixel", "pixel"], {}, "two members of the stack are the same checkpoint: .*/pixel and .*/pixel"),
        (["pixel", "letterbox"], {}, r"must resize images in the same way; these differ \(pixel: squeeze, pixel: lett"),
        (["pixel", "unet_d"], {"kernel": 2}, "kernel is 2"),
        (["pixel", "unet_d"], {"trainable": "lora"}, "trainable is lora; the members of a stack do not learn"),
        (["pixel", "unet_d"], {"trainable": "all"}, "trainable is all; the members of a stack do not learn"),
        (["pixel", "unet_d"], {"trainable": "some"}, "it must be decoder, lora, dora, adapters or all"),
        (["pixel", "unet_d"], {"parts": [{"model": "pixel"}]}, "parts.0.options is missing"),
    ],
)
def test_what_cannot_be_stacked_is_said(stack, names, options, message):
    with pytest.raises(CheckpointError, match=message):
        stack(*names, **options)


def test_a_stack_is_no_member(folder, stack, tmp_path):
    vlsm.save_checkpoint(stack("pixel", "unet_d"), tmp_path / "stack")
    with pytest.raises(CheckpointError, match="a member of the stack is a stack itself; name the members of that one"):
        vlsm.build_model("stack", members=[str(folder / "pixel"), str(tmp_path / "stack")])
    options = read_settings(str(tmp_path / "stack")).options
    with pytest.raises(CheckpointError, match="parts is for its checkpoint; give members alone"):
        vlsm.build_model("stack", **options | {"members": [str(folder / "pixel"), str(folder / "unet_d")]})


def test_letterboxing_members_make_a_letterboxing_stack(folder, tmp_path):
    other = vlsm.build_model("unet_d", image_size=32, width=4, resize="letterbox")
    vlsm.save_checkpoint(other, tmp_path / "other")
    model = vlsm.build_model("stack", members=[str(folder / "letterbox"), str(tmp_path / "other")])
    assert model.image_spec.square == (96, "letterbox")
    vlsm.save_checkpoint(model, tmp_path / "stack")
    assert vlsm.load_checkpoint(tmp_path / "stack").model.image_spec.square == (96, "letterbox")


def test_a_stack_of_models_that_ignore_text_ignores_it(folder, stack, tmp_path):
    for names, is_blind in ((("pixel", "unet_d"), True), (("clipseg", "unet_d"), False)):
        vlsm.save_checkpoint(stack(*names), tmp_path / names[0], prompt="polyp")
        checkpoint = vlsm.load_checkpoint(tmp_path / names[0])
        assert checkpoint.settings.is_blind == is_blind
        segmenter, image = vlsm.Segmenter(checkpoint, device="cpu"), torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()
        assert segmenter.segment(image, "polyp").shape == (40, 50)
        if is_blind:
            with pytest.raises(ValueError, match="stack ignores the text: all 2 prompts would have the same mask"):
                segmenter.segment(image, PROMPTS)
        else:
            assert segmenter.segment(image, PROMPTS).shape == (2, 40, 50)


def attack(stack, tmp_path, change):
    """Load the checkpoint of a stack after a change of its files, which are a dict."""
    vlsm.save_checkpoint(stack("clipseg", "unet_d"), tmp_path / "ck", prompt="polyp")
    files = read_checkpoint(str(tmp_path / "ck"))
    tree = yaml.safe_load(files["checkpoint.yaml"])
    change(files, tree)
    for name, data in (files | {"checkpoint.yaml": yaml.safe_dump(tree).encode()}).items():
        (tmp_path / "ck" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ck" / name).write_bytes(data)
    check_files(read_checkpoint(str(tmp_path / "ck")), "x")
    return vlsm.load_checkpoint(tmp_path / "ck").model


def change_part(number, **changes):
    return lambda files, tree: tree["options"]["parts"][number].update(changes)


CONFIG = "members/0/clipseg/config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files, tree: tree["options"].pop("parts"), "do not describe its members"),
        (lambda files, tree: tree["options"].update(image_size=32), "image.size is 64; its stack takes 32 pixels"),
        (lambda files, tree: tree["options"]["parts"].pop(), "there are 2 members, but parts describes 1"),
        (lambda files, tree: tree["options"]["members"].extend("abcdefg"), "at most 8 items"),
        (change_part(0, model="stack"), "a member is a stack itself"),
        (change_part(0, model="evil"), "unknown model 'evil'"),
        (change_part(1, options={"width": 10**9}), "far larger than its weights"),
        (change_part(1, options={"widht": 4}), "unknown key 'widht'"),
        (change_part(1, options={"width": 8, "image_size": 32}), "ck, member 2.* do not fit its model"),
        (change_part(1, image={"size": 64, "mean": [0] * 3, "std": [1] * 3}), "member 2 .* size 64; .* takes 32"),
        (change_part(1, image={"size": 32, "mean": [0] * 3, "std": [0] * 3}), "std.0 is 0"),
        (lambda files, tree: tree["image"].update(size=32), "image.size is 32; its stack takes 64 pixels"),
        (
            lambda files, tree: files.update({CONFIG: b'{"auto_map": {"AutoModel": "x--y"}, ' + files[CONFIG][1:]}),
            "has the key auto_map, which asks to run code",
        ),
        (lambda files, tree: files.update({CONFIG: b'{"model_type": "evil"}'}), "model_type is 'evil'"),
        (lambda files, tree: files.update({"members/0/clipseg/x.bin": b""}), "a pickle could run code"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of torch, about tensors without values
def test_hostile_checkpoints_of_stacks_are_one_sentence(stack, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        attack(stack, tmp_path, change)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@torch.no_grad()
def test_names_of_places_are_not_followed(stack, tmp_path):
    def change(files, tree):
        tree["options"]["members"] = ["/etc", "s3://evil/checkpoint"]
        tree["options"]["parts"][0]["options"]["source"] = "evil/x"
        config = json.loads(files[CONFIG])
        for place in ("members/8/clipseg", "members/0/../clipseg", "members/0/evil", "members/00/clipseg"):
            files[f"{place}/config.json".replace("/../", "/up/")] = json.dumps(config).encode()

    values = torch.randn(1, 3, 64, 64)
    model = attack(stack, tmp_path, change)
    torch.testing.assert_close(model(values, ["polyp"]), stack("clipseg", "unet_d")(values, ["polyp"]))


def test_the_command_makes_the_mean_of_checkpoints(folder, tmp_path, capsys):
    from vlsm.checkpoints import main

    words = f"members=[{folder / 'pixel'}, {folder / 'unet_d'}]"
    assert main([str(tmp_path / "ck"), "--model", "stack", "--set", words, "--prompt", "polyp"]) == 0
    assert (
        read_settings(str(tmp_path / "ck")).summary == "96 x 96 pixels, threshold 0.5, prompt 'polyp', not calibrated"
    )
    assert main([str(tmp_path / "no"), "--model", "stack", "--set", f"members=[{folder / 'pixel'}]"]) == 2
    assert "options of stack: members is" in capsys.readouterr().err
