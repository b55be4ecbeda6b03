"""SAM 3 against transformers' own, on tiny checkpoints that transformers writes."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import vlsm
from tests.tiny import TINY_SAM3, save_tiny_sam3, stir
from vlsm.errors import CheckpointError
from vlsm.models.folding import fold_batch_norms

PROMPTS = ["Polyp", "a round lesion of the left", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def lite(folder, tmp_path_factory):
    lite = tmp_path_factory.mktemp("lite")
    text = TINY_SAM3["text_config"] | {"num_hidden_layers": 3, "repmixer_kernel_size": 3}
    config = transformers.Sam3LiteTextConfig(**TINY_SAM3 | {"text_config": text})
    transformers.AutoModel.from_config(config).save_pretrained(lite)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(lite)
    return stir(lite)


@pytest.fixture(params=["folder", "lite"])
def source(request):
    return request.getfixturevalue(request.param)


def build(source, size=64, trainable="decoder", **options):
    return vlsm.build_model("sam3", trainable, source=str(source), image_size=size, **options).eval()


def images(size):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def theirs(source, size):
    config = transformers.AutoConfig.from_pretrained(source)
    config.image_size = size
    network = transformers.AutoModel.from_pretrained(source, config=config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding="max_length", max_length=32)  # as the processor does
    return network(images(size), input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def predict(model, pixel_values, prompts=PROMPTS):
    return model.decode_with_presence(model.encode_images(pixel_values), model.encode_prompts(prompts))


@pytest.mark.parametrize("size", [64, 72])  # 8 x 8 patches, and 9 x 9, which windows of 4 x 4 do not divide
@torch.no_grad()
def test_logits_equal_transformers_own(source, size):
    masks = theirs(source, size).semantic_seg
    assert masks.shape == (3, 1, size // 2, size // 2) and masks.std() > 0
    expected = functional.interpolate(masks, (size, size), mode="bilinear")
    torch.testing.assert_close(build(source, size)(images(size), PROMPTS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 72])
@torch.no_grad()
def test_presence_equals_transformers_own(source, size):
    expected = theirs(source, size).presence_logits
    assert expected.shape == (3, 1) and expected.std() > 1e-3 and expected.abs().max() < 10  # their bound
    model = build(source, size, presence=True)
    logits, presence = predict(model, images(size))
    torch.testing.assert_close(presence, expected[:, 0], atol=1e-4, rtol=1e-4)
    plain, none = predict(build(source, size), images(size))
    assert none is None and torch.equal(logits, plain) and torch.equal(model(images(size), PROMPTS), plain)
    for number, prompt in enumerate(PROMPTS):  # whatever is in the batch
        alone = predict(model, images(size)[number : number + 1], [prompt])[1]
        torch.testing.assert_close(alone, presence[number : number + 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_checkpoint_has_the_decoder_of_the_presence(source, tmp_path):
    expected = predict(build(source, presence=True), images(64))
    for trainable in ("decoder", "all"):
        model = build(source, trainable=trainable, presence=True)
        assert not any(parameter.requires_grad for parameter in model.detr_decoder.parameters())
    vlsm.save_checkpoint(model, tmp_path)
    for one, other in zip(predict(vlsm.load_checkpoint(tmp_path).model.eval(), images(64)), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_checkpoint_gives_the_same_logits(source, tmp_path):
    model = build(source)
    expected = model(images(64), PROMPTS)
    vlsm.save_checkpoint(model, tmp_path)
    checkpoint = vlsm.load_checkpoint(tmp_path)
    torch.testing.assert_close(checkpoint.model(images(64), PROMPTS), expected, atol=1e-5, rtol=1e-5)
    fold_batch_norms(checkpoint.model)  # the light text tower has some
    torch.testing.assert_close(checkpoint.model(images(64), PROMPTS), expected, atol=1e-4, rtol=1e-4)
    assert (checkpoint.settings.image.mean, checkpoint.settings.image.std) == ((0.5,) * 3, (0.5,) * 3)


def test_parts_that_no_mask_depends_on_are_not_built(source):
    names = [name for name, _ in build(source, trainable="all").named_parameters()]
    assert {name.partition(".")[0] for name in names} == {"towers", "detr_encoder", "mask_decoder"}
    assert not [name for name in names if re.search("mask_embedder|instance|fpn_layers.3|conv_layers.2", name)]


def test_what_learns(source):
    model = build(source).train()
    model(images(64), PROMPTS).mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.partition(".")[0] for name in learning} == {"detr_encoder", "mask_decoder"}
    model.set_trainable("all").train()
    model(images(64), PROMPTS).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.set_trainable("lora")
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 4 * 4 * 2 and all(".vision.backbone.layers." in name for name in adapters)


@torch.no_grad()
def test_a_long_prompt_is_cut_with_a_warning(source):
    model = build(source)
    with pytest.warns(UserWarning, match=r"prompt 'flat flat .*' has 42 tokens; SAM 3's text tower reads 32"):
        words, is_token = model.encode_prompts(["flat " * 40])
    assert words.shape == (1, 32, 16) and is_token.all()


def test_the_published_file_with_the_tracker_of_videos(folder, tmp_path):
    """facebook/sam3 is one file for images and videos: its names have another start, its configuration is a part."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = {"model_type": "sam3_video", "detector_config": json.loads((folder / "config.json").read_text())}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tracker_config": {"model_type": "sam3_tracker_video"}}))
    weights = {f"detector_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(
        weights | {"tracker_model.memory": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    expected, found = build(folder).state_dict(), build(tmp_path).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("size", "near"), [(60, "56 or 64"), (100, "96 or 104")])
def test_a_size_that_patches_do_not_divide_is_refused(folder, size, near):
    with pytest.raises(CheckpointError, match=f"image_size is {size}; it must be a multiple .* such as {near}"):
        build(folder, size)


def test_other_sources_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(CheckpointError, match="model_type is 'siglip'; it must be one of sam3, sam3_lite_text"):
        build(tmp_path)
    with pytest.raises(CheckpointError, match="'facebook/sam3' cannot be loaded: .*the hub cannot be reached"):
        vlsm.build_model("sam3")


# this project's names, and Meta's
META = {
    "towers.vision.backbone.embeddings.position_embeddings": "backbone.vision_backbone.trunk.pos_embed",
    "towers.vision.backbone.embeddings.patch_embeddings.projection": "backbone.vision_backbone.trunk.patch_embed.proj",
    "towers.vision.backbone.layer_norm": "backbone.vision_backbone.trunk.ln_pre",
    "towers.vision.backbone.layers": "backbone.vision_backbone.trunk.blocks",
    "towers.vision.neck.fpn_layers": "backbone.vision_backbone.convs",
    "towers.text_projection": "backbone.language_backbone.resizer",
    "towers.text.text_model.embeddings.token_embedding": "backbone.language_backbone.encoder.token_embedding",
    "towers.text.text_model.embeddings.position_embedding.weight": (
        "backbone.language_backbone.encoder.positional_embedding"
    ),
    "towers.text.text_model.final_layer_norm": "backbone.language_backbone.encoder.ln_final",
    "towers.text.text_model.encoder.layers": "backbone.language_backbone.encoder.transformer.resblocks",
    "detr_encoder": "transformer.encoder",
    "detr_decoder.presence_head": "transformer.decoder.presence_token_head",
    "detr_decoder.presence_layer_norm": "transformer.decoder.presence_token_out_norm",
    "detr_decoder.output_layer_norm": "transformer.decoder.norm",
    "detr_decoder.box_head": "transformer.decoder.bbox_embed",
    "detr_decoder.box_rpb_embed": "transformer.decoder.boxRPB_embed",
    "detr_decoder": "transformer.decoder",
    "mask_decoder.semantic_projection": "segmentation_head.semantic_seg_head",
    "mask_decoder.prompt_cross_attn_norm": "segmentation_head.cross_attn_norm",
    "mask_decoder.prompt_cross_attn.": "segmentation_head.cross_attend_prompt.",
    "mask_decoder.pixel_decoder": "segmentation_head.pixel_decoder",
}
META_PARTS = {
    "vision_backbone": {
        ".attention.o_proj.": ".attn.proj.", ".layer_norm": ".norm", ".scale_layers.2.": ".dconv_2x2_1.",
        ".0.scale_layers.0.": ".0.dconv_2x2_0.", ".1.scale_layers.0.": ".1.dconv_2x2.",
        ".proj1.": ".conv_1x1.", ".proj2.": ".conv_3x3.",
    },
    "language_backbone": {
        ".self_attn.out_proj.": ".attn.out_proj.", ".layer_norm": ".ln_", ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    },
    "transformer.encoder": {
        ".cross_attn.": ".cross_attn_image.", ".o_proj.": ".out_proj.", ".layer_norm": ".norm",
        ".mlp.fc": ".linear",
    },
    "transformer.decoder": {
        ".vision_cross_attn_layer_norm.": ".norm1.", ".text_cross_attn_layer_norm.": ".catext_norm.",
        ".self_attn_layer_norm.": ".norm2.", ".mlp_layer_norm.": ".norm3.", ".vision_cross_attn.": ".cross_attn.",
        ".text_cross_attn.": ".ca_text.", ".o_proj.": ".out_proj.", ".mlp.fc": ".linear", ".layer1.": ".layers.0.",
        ".layer2.": ".layers.1.", ".layer3.": ".layers.2.",
    },
    "segmentation_head": {".o_proj.": ".out_proj."},
}  # fmt: skip


def publish(model):
    """Return the weights of a model as Meta's code saves them."""
    published = {}
    for name, value in model.state_dict().items():
        start = next(start for start in META if name.startswith(start))
        renamed = META[start] + name.removeprefix(start)
        parts = next(parts for owner, parts in META_PARTS.items() if owner in renamed)
        for ours, theirs in parts.items():
            renamed = renamed.replace(ours, theirs)
        if renamed.endswith("pos_embed"):
            value = torch.cat([torch.full_like(value[:, :1], 9), value], dim=1)
        if letter := re.search(r"\.([qkv])_proj\.(weight|bias)$", renamed):
            kind = letter[2]
            joined = f".attn.qkv.{kind}" if "vision_backbone" in renamed else f".in_proj_{kind}"
            owner = renamed[: letter.start()].removesuffix(".attention")
            if "language_backbone" in renamed:
                owner = owner.removesuffix(".self_attn") + ".attn"
            published.setdefault(owner + joined, {})[letter[1]] = value
        else:
            published[renamed] = value
    return {
        name: torch.cat([value[letter] for letter in "qkv"]) if isinstance(value, dict) else value
        for name, value in published.items()
    }


@pytest.mark.parametrize(("start", "presence"), [("", False), ("detector.", False), ("", True)])
@torch.no_grad()
def test_weights_in_metas_names(folder, tmp_path, start, presence):
    model = build(folder, presence=presence)
    state = {start + name: value for name, value in publish(model).items()}
    names = " ".join(state)
    for part in (
        "trunk.blocks.0.attn.qkv.weight",
        "resblocks.1.attn.in_proj_bias",
        "layers.1.cross_attn_image.in_proj_",
    ):
        assert part in names
    unused = {f"{start}transformer.decoder.instance_query_embed.weight": torch.zeros(2), "tracker.x": torch.zeros(1)}
    if not presence:
        unused |= {f"{start}transformer.decoder.query_embed.weight": torch.zeros(2, 2)}
    unused |= {f"{start}backbone.vision_backbone.convs.3.conv_1x1.bias": torch.zeros(16)}
    torch.save({"model": state | unused, "epoch": 1}, tmp_path / "sam3.pt")
    for path in folder.iterdir():  # architecture and tokenizer are enough
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    options = {"weights": str(tmp_path / "sam3.pt"), "presence": presence}
    loaded, again = predict(build(tmp_path, **options), images(64)), build(tmp_path, unet=True, width=4, **options)
    for one, other in zip(loaded, predict(model, images(64)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5) if other is not None else one is None
    state_of_all = again.state_dict()  # with a CNN, which no such file has
    assert all(torch.equal(value, state_of_all[name]) for name, value in model.state_dict().items())
    for name, ours in (
        ("backbone.language_backbone.resizer.bias", "towers.text_projection.bias"),
        ("transformer.decoder.presence_token.weight", "detr_decoder.presence_token.weight"),
    )[: 1 + presence]:
        torch.save({key: value for key, value in state.items() if key != start + name}, tmp_path / "sam3.pt")
        with pytest.raises(CheckpointError, match=f"do not fit the model in 1 places: {ours}: none"):
            build(tmp_path, **options)
