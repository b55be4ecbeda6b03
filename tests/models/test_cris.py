from pathlib import Path

import pytest
import torch
from torch.nn import functional

import vlsm
from tests.tiny import save_tiny_biomedclip, save_tiny_clip_resnet
from vlsm.errors import CheckpointError
from vlsm.models.cris_weights import rename_weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip_resnet(tmp_path_factory.mktemp("clip_resnet"))


@pytest.fixture(scope="module")
def model(folder):
    return vlsm.build_model("cris", source=str(folder), image_size=96, width=32).eval()


@torch.no_grad()
def test_padding_is_what_the_tokenizer_added(model):
    """Not every id 0: open_clip's tokenizer pads with it, and it is an exclamation mark too."""
    prompts = ["polyp", "polyp!(flat)", "a small polyp"]
    _, words, padding = model.encode_prompts(prompts)
    tokenizer = model.towers.tokenizer
    lengths = [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]
    assert (~padding).sum(1).tolist() == lengths
    assert 0 in tokenizer.encode(prompts[1])
    assert not words[padding].any()


@torch.no_grad()
def test_features_of_words_equal_those_of_padded_prompts(model, folder):
    import open_clip

    theirs = open_clip.create_model(f"local-dir:{folder}", force_custom_text=True).eval()
    theirs.text.output_tokens = True
    prompts = ["polyp", "a flat lesion!"]
    expected_sentences, expected_words = theirs.text(model.towers.tokenizer(prompts))
    sentences, words, padding = model.encode_prompts(prompts)
    torch.testing.assert_close(sentences, expected_sentences, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(words[~padding], expected_words[~padding], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_attention_pool_is_clips_own_asked_at_every_position(model):
    visual = model.towers.visual
    last = torch.randn(2, visual.attnpool.c_proj.in_features, 2, 2)  # the size that CLIP was trained at
    pool = visual.attnpool
    tokens = last.flatten(2).permute(2, 0, 1) + pool.positional_embedding[1:, None]
    expected, _ = functional.multi_head_attention_forward(
        *(tokens, tokens, tokens, tokens.shape[-1], pool.num_heads, None),
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        *(None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias),
        training=False,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    found = model.towers._attend(last)
    torch.testing.assert_close(found.flatten(2).permute(2, 0, 1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tapped_maps_equal_what_forward_hooks_record(model):
    recorded = {}
    visual = model.towers.visual
    for name in ("layer2", "layer3", "layer4"):
        getattr(visual, name).register_forward_hook(
            lambda module, args, output, name=name: recorded.update({name: output})
        )
    third, fourth, pooled, last = model.towers.encode_images(torch.randn(1, 3, 96, 96))
    for found, name in zip((third, fourth, last), ("layer2", "layer3", "layer4"), strict=True):
        assert torch.equal(found, recorded[name])
    assert [found.shape[2] for found in (third, fourth, pooled, last)] == [12, 6, 3, 3]


def test_towers_of_another_kind_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="CRIS needs CLIP's ResNet as image tower, not a TimmModel"):
        vlsm.build_model("cris", source=str(save_tiny_biomedclip(tmp_path)))


# the public code's names of the parts, each with the part here that has the same tensors
PUBLIC = {
    "backbone.visual.conv1": "towers.visual.conv1",
    "backbone.visual.layer2.0.downsample.1": "towers.visual.layer2.0.downsample.1",
    "backbone.visual.attnpool.k_proj": "towers.visual.attnpool.k_proj",
    "backbone.visual.attnpool.connect.1": "neck.residual.1",
    "backbone.transformer.resblocks.1.mlp.c_fc": "towers.text.transformer.resblocks.1.mlp.c_fc",
    "backbone.ln_final": "towers.text.ln_final",
    "neck.txt_proj.0": "neck.text.0",
    "neck.norm_layer.0": "neck.norm5.0",
    "neck.f1_v_proj.0": "neck.project5.0",
    "neck.f2_v_proj.1": "neck.project4.1",
    "neck.f2_cat.0": "neck.merge4.0",
    "neck.f3_cat.0": "neck.merge3.0",
    "neck.f4_proj3.1": "neck.query3.1",
    "neck.aggr.0": "neck.gather.0",
    "neck.coordconv.0.conv1.1": "neck.locate.0.1",
    "neck.coordconv.1.0": "neck.locate.1.0",
    "decoder.layers.2.self_attn_norm": "layers.2.after.0",
    "decoder.layers.0.cross_attn_norm": "layers.0.after.1",
    "decoder.layers.1.self_attn": "layers.1.self_attention",
    "decoder.layers.1.multihead_attn.out_proj": "layers.1.cross_attention.out_proj",
    "decoder.layers.1.ffn.3": "layers.1.feed_forward.3",
    "decoder.layers.2.norm3": "layers.2.norms.2",
    "decoder.norm": "norm",
    "proj.vis.1.0": "projector.grow.0.0",
    "proj.vis.3.1": "projector.grow.1.1",
    "proj.vis.4": "projector.last",
    "proj.txt": "projector.text",
}


@pytest.mark.parametrize(("theirs", "ours"), PUBLIC.items())
def test_names_of_the_public_code(model, theirs, ours):
    assert rename_weight(f"module.{theirs}.weight") == f"{ours}.weight"
    assert f"{ours}." in "\n".join(model.state_dict())


def publish(model):
    """The state of a model under the public names, which a table of the starts of names gives."""
    prefixes = {
        "neck.residual.": "backbone.visual.attnpool.connect.", "towers.visual.": "backbone.visual.",
        "towers.text.": "backbone.", "neck.text.": "neck.txt_proj.", "neck.norm5.": "neck.norm_layer.",
        "neck.project5.": "neck.f1_v_proj.", "neck.project4.": "neck.f2_v_proj.", "neck.project3.": "neck.f3_v_proj.",
        "neck.merge4.": "neck.f2_cat.", "neck.merge3.": "neck.f3_cat.", "neck.query5.": "neck.f4_proj5.",
        "neck.query4.": "neck.f4_proj4.", "neck.query3.": "neck.f4_proj3.", "neck.gather.": "neck.aggr.",
        "neck.locate.0.": "neck.coordconv.0.conv1.", "neck.locate.1.": "neck.coordconv.1.", "norm.": "decoder.norm.",
        "projector.grow.0.": "proj.vis.1.", "projector.grow.1.": "proj.vis.3.", "projector.last.": "proj.vis.4.",
        "projector.text.": "proj.txt.",
    }  # fmt: skip
    parts = {
        "after.0.": "self_attn_norm.", "after.1.": "cross_attn_norm.", "self_attention.": "self_attn.",
        "cross_attention.": "multihead_attn.", "feed_forward.": "ffn.", "norms.0.": "norm1.", "norms.1.": "norm2.",
        "norms.2.": "norm3.",
    }  # fmt: skip
    for layer in range(3):
        prefixes |= {f"layers.{layer}.{ours}": f"decoder.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    state = {}
    for name, value in model.state_dict().items():
        (start,) = (start for start in prefixes if name.startswith(start))
        state[f"module.{prefixes[start]}{name.removeprefix(start)}"] = value.clone()
    return state | {"module.backbone.logit_scale": torch.zeros(())}


@torch.no_grad()
def test_a_checkpoint_of_the_public_code_is_loaded_with_its_towers(model, folder, tmp_path):
    torch.save({"state_dict": publish(model), "epoch": 3}, tmp_path / "cris.pt")
    for path in folder.iterdir():  # its architecture is enough
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    options = {"source": str(tmp_path), "image_size": 96, "width": 32, "weights": str(tmp_path / "cris.pt")}
    loaded = vlsm.build_model("cris", **options).eval()
    pixel_values = torch.randn(1, 3, 96, 96)
    assert torch.equal(loaded(pixel_values, ["polyp"]), model(pixel_values, ["polyp"]))
    assert loaded.image_spec == model.image_spec
    vlsm.save_checkpoint(loaded, tmp_path / "checkpoint")
    again = vlsm.load_checkpoint(tmp_path / "checkpoint").model
    assert torch.equal(again(pixel_values, ["polyp"]), model(pixel_values, ["polyp"]))
    with_cnn = vlsm.build_model("cris", **options | {"unet": True, "unet_width": 4}).state_dict()
    assert all(torch.equal(with_cnn[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"cris.pt' do not fit the model in \d+ places: layers.0.after.0.bias"):
        vlsm.build_model("cris", **options | {"width": 64})


def test_other_files_are_no_cris(folder, tmp_path):
    options = {"source": str(folder), "image_size": 96, "width": 32, "weights": str(tmp_path / "cris.pt")}
    for content, message in (
        (torch.zeros(2), "are no dict of tensors"),
        ({"a": torch.zeros(2)}, "do not fit the model"),
        (Path(), "a pickle with objects other than tensors, which could run code"),
    ):
        torch.save(content, tmp_path / "cris.pt")
        with pytest.raises(CheckpointError, match=message):
            vlsm.build_model("cris", **options)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        vlsm.build_model("cris", **options | {"weights": str(tmp_path / "none.pt")})


@torch.no_grad()
def test_the_published_enlargement(folder):
    torch.manual_seed(0)
    plain = vlsm.build_model("cris", source=str(folder), image_size=96, width=32).eval()
    published = vlsm.build_model("cris", source=str(folder), image_size=96, width=32, enlarge="published").eval()
    published.load_state_dict(plain.state_dict())
    pixel_values = torch.randn(1, 3, 96, 96)
    recorded = []
    plain.projector.register_forward_hook(lambda module, args, output: recorded.append(output))
    bilinear = plain(pixel_values, ["polyp"])
    (small,) = recorded
    found = published(pixel_values, ["polyp"])
    assert small.shape == (1, 1, 24, 24) and (found - bilinear).abs().max() > 1e-3
    torch.testing.assert_close(found, functional.interpolate(small, (96, 96), mode="bicubic", align_corners=True))
    torch.testing.assert_close(found[..., 0, 0], small[..., 0, 0])  # aligned corners
