import pytest
import torch
from torch.nn import functional

import vlsm
from tests.tiny import save_tiny_biomedclip, save_tiny_clip_resnet
from vlsm.errors import CheckpointError


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
