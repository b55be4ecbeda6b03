import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlsm
from tests.tiny import save_tiny_biomedclip, save_tiny_clip_resnet, save_tiny_clipseg, save_tiny_open_clip
from vlsm.errors import CheckpointError
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.untrained import write_open_clip

PROMPTS = ["polyp", "a round lesion of the left", "small, flat: bright!"]


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory):
    return save_tiny_biomedclip(tmp_path_factory.mktemp("biomedclip"))


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    return save_tiny_open_clip(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def load_theirs(folder):
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}", force_custom_text=True).eval()


@torch.no_grad()
def test_tapped_blocks_equal_what_forward_hooks_record(biomedclip, pixel_values):
    recorded = {}
    theirs = load_theirs(biomedclip)
    for index, block in enumerate(theirs.visual.trunk.blocks):
        block.register_forward_hook(lambda module, args, output, index=index: recorded.update({index: output}))
    theirs.encode_image(pixel_values)
    towers = OpenCLIPTowers.build(str(biomedclip), None, (1, 2, 4)).eval()
    for index, activation in zip((1, 2, 4), towers.encode_images(pixel_values), strict=True):
        torch.testing.assert_close(activation, recorded[index], atol=1e-5, rtol=1e-5)
    assert len(towers.visual.trunk.blocks) == 5  # the sixth gives nothing to any output


def test_the_published_taps_of_biomedclipseg():
    for name in ("biomedclipseg", "biomedclipseg_d", "vlsm_a", "vlsm_c"):
        assert vlsm.models.parse_options(name, {}).taps == (4, 7, 10)
    assert vlsm.models.parse_options("biomedclipseg_d", {}).decoder_source == "CIDAS/clipseg-rd64-refined"


@pytest.mark.parametrize("kind", ["biomedclip", "open_clip"])
@torch.no_grad()
def test_text_embeddings_equal_those_of_padded_prompts(kind, request):
    import open_clip

    folder = request.getfixturevalue(kind)
    padded = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    expected = load_theirs(folder).encode_text(padded)
    towers = OpenCLIPTowers.build(str(folder), None).eval()
    tokens = towers.tokenize(PROMPTS)
    assert max(map(len, tokens)) < padded.shape[1]
    torch.testing.assert_close(towers.encode_tokens(tokens), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_tower_that_attends_padding_gets_it(tmp_path):
    """SigLIP and others attend their whole context both ways: without padding they say something else."""
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 64, "layers": 4, "width": 32, "patch_size": 16, "head_width": 8}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text | {"no_causal_mask": True, "pool_type": "last"}}
    write_open_clip(tmp_path, config)
    import open_clip

    expected = load_theirs(tmp_path).encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS))
    towers = OpenCLIPTowers.build(str(tmp_path), None).eval()
    assert {len(ids) for ids in towers.tokenize(PROMPTS)} == {24}
    torch.testing.assert_close(towers.encode_prompts(PROMPTS), expected, atol=1e-5, rtol=1e-4)


def test_old_weights_with_position_ids_load(biomedclip, tmp_path):
    for path in biomedclip.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")  # as BiomedCLIP's own are stored
    old, new = OpenCLIPTowers.build(str(tmp_path), None), OpenCLIPTowers.build(str(biomedclip), None)
    torch.testing.assert_close(old.encode_prompts(PROMPTS), new.encode_prompts(PROMPTS))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_that_would_run_code_are_refused(biomedclip, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in biomedclip.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    (source / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "executed"), protocol=2))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        OpenCLIPTowers.build(str(source), None)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_asks_to_run_code_is_refused(biomedclip, tmp_path):
    vlsm.save_checkpoint(vlsm.build_model("biomedclipseg", source=str(biomedclip), taps=[1, 2, 4]), tmp_path)
    path = tmp_path / "openclip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has the key trust_remote_code, which asks to run code"):
        vlsm.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "open_clip_config.json of checkpoint .* is not JSON"),
        ("{}", "do not describe OpenCLIPSeg: KeyError: 'model_cfg'"),
        (None, "do not describe OpenCLIPSeg: FileNotFoundError"),
    ],
)
def test_a_checkpoint_with_broken_files_is_one_sentence(open_clip, tmp_path, content, reason):
    vlsm.save_checkpoint(vlsm.build_model("openclip_seg", source=str(open_clip)), tmp_path)
    path = tmp_path / "openclip" / "open_clip_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        vlsm.load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_whose_text_tower_comes_from_elsewhere_is_refused(biomedclip, tmp_path):
    model = vlsm.build_model("biomedclipseg", source=str(biomedclip), taps=[1, 2, 4])
    vlsm.save_checkpoint(model, tmp_path / "auto")
    path = tmp_path / "auto" / "openclip" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil/repo--m.C"}}))
    with pytest.raises(CheckpointError, match="has the key auto_map, which asks to run code"):
        vlsm.load_checkpoint(tmp_path / "auto")
    vlsm.save_checkpoint(model, tmp_path / "gone")
    (tmp_path / "gone" / "openclip" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="openclip/config.json, which describes the text tower, is missing"):
        vlsm.load_checkpoint(tmp_path / "gone")


def test_a_captioner_is_refused():
    with pytest.raises(CheckpointError, match=r"it is a captioner \(CoCa\)"):
        vlsm.build_model("openclip_seg", source="coca_ViT-B-32/laion2b_s13b_b90k")


@torch.no_grad()
def test_the_d_variant_starts_from_the_decoder_of_clipseg(biomedclip, tmp_path):
    from transformers import CLIPSegForImageSegmentation

    from vlsm.models.untrained import write_clipseg

    layers = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = layers | {"vocab_size": 500, "max_position_embeddings": 16}
    write_clipseg(tmp_path / "fits", text_config=text, vision_config=layers, extract_layers=[0, 1, 2])
    options = {"source": str(biomedclip), "image_size": 64, "taps": [1, 2, 4]}
    model = vlsm.build_model("biomedclipseg_d", **options, decoder_source=str(tmp_path / "fits"))
    expected = CLIPSegForImageSegmentation.from_pretrained(tmp_path / "fits").decoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.decoder.state_dict().items())

    other = save_tiny_clipseg(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not fit these towers: film_mul.weight: \(16, 24\) instead of"):
        vlsm.build_model("biomedclipseg_d", **options, decoder_source=str(other))


@pytest.mark.parametrize(("unet", "patch"), [(False, 8), (True, 8), (True, 16)])
@torch.no_grad()
def test_any_patch_size_gives_logits_of_the_input_size(tmp_path, unet, patch):
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 64, "layers": 4, "width": 32, "patch_size": patch, "head_width": 8}
    write_open_clip(tmp_path, {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
    model = vlsm.build_model("openclip_seg", source=str(tmp_path), unet=unet, width=4, image_size=96).eval()
    assert model.towers.taps == (1, 2, 3)
    assert model(torch.randn(1, 3, 96, 96), ["polyp"]).shape == (1, 1, 96, 96)


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("ViT-B-16-SigLIP", (3, 6, 9)),  # no class token
        ("MobileCLIP-B", (3, 6, 9)),  # a convolutional stem
        ("EVA02-B-16", (3, 6, 9)),  # names of its own
        ("EVA01-g-14", (10, 20, 30)),  # a bias beside the layer
        ("ViT-B-32", (3, 6, 9)),  # open_clip's own transformer
        ("ViT-L-14", (6, 12, 18)),
    ],
)
def test_vision_transformers_of_open_clip_are_understood(name, taps):
    """Architectures on torch's meta device: shapes, and that lora reaches every adapter."""
    import open_clip

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CustomTextCLIP(
            **{key: value for key, value in config.items() if key not in ("custom_text", "text_cfg")},
            text_cfg={"context_length": 24, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
        )
        model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        towers = OpenCLIPTowers(model, {"model_cfg": config}, None)
        towers.set_trainable("lora")
        size = towers.image_spec.size
        activations = towers.encode_images(torch.empty(2, 3, size, size))
        sum(activation.sum() for activation in activations).backward()
        adapters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
        assert len(adapters) >= 4 * (taps[-1] + 1)
        assert all(parameter.grad is not None for parameter in adapters)
        towers.set_trainable("adapters")
        sum(activation.sum() for activation in towers.encode_images(torch.empty(2, 3, size, size))).backward()
    assert towers.taps == taps
    expected = (2, towers.grid**2 + towers.num_prefix_tokens, towers.image_width)
    assert [activation.shape for activation in activations] == [expected] * 3
    adapters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    assert len(adapters) == 8 * (taps[-1] + 1)  # two layers with biases after the attention, and after the MLP
    assert all(parameter.grad is not None for parameter in adapters)


def test_an_image_tower_without_tokens_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="ModifiedResNet is not a vision transformer"):
        vlsm.build_model("openclip_seg", source=str(save_tiny_clip_resnet(tmp_path)))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf-hub:microsoft/no-such-model", "'hf-hub:microsoft/no-such-model' cannot be loaded"),
        ("microsoft/no-such-model", "'microsoft/no-such-model' cannot be loaded"),
        ("ViT-B-99/openai", "unknown open_clip model 'ViT-B-99'; did you mean ViT-B-"),
        ("ViT-B-16-SigLIP", "need a tag, such as ViT-B-16-SigLIP/webli"),
        ("ViT-B-16-SigLIP/webli", "'ViT-B-16-SigLIP/webli' cannot be loaded"),
    ],
)
def test_weights_that_are_nowhere_are_one_sentence(source, reason):
    with pytest.raises(CheckpointError) as caught:
        vlsm.build_model("openclip_seg", source=source)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded: the folder has no open_clip_config.json"):
        vlsm.build_model("openclip_seg", source=str(tmp_path))


def test_a_folder_without_its_text_towers_configuration_says_where_that_is(biomedclip, tmp_path):
    for path in biomedclip.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "lab/its-bert"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"needs the config.json of lab/its-bert: put that file into the folder"):
        vlsm.build_model("openclip_seg", source=str(tmp_path))


def test_weights_that_do_not_fit_their_configuration_are_named(open_clip, tmp_path):
    for path in open_clip.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.conv1.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="visual.conv1.weight") as caught:
        vlsm.build_model("openclip_seg", source=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_taps_beyond_the_last_block_are_refused(open_clip):
    with pytest.raises(
        CheckpointError, match=r"taps are \[1, 9\]; they must increase, and the image tower has blocks 0 to 3"
    ):
        vlsm.build_model("openclip_seg", source=str(open_clip), taps=[1, 9])
    for taps in ([1, 1, 2], [2, 1]):
        with pytest.raises(CheckpointError, match="they must increase"):
            vlsm.build_model("openclip_seg", source=str(open_clip), taps=taps)


@pytest.mark.parametrize(("kind", "size", "near"), [("biomedclip", 78, "64 or 80"), ("open_clip", 100, "96 or 104")])
def test_a_size_that_patches_do_not_divide_is_refused(kind, size, near, request):
    with pytest.raises(CheckpointError, match=f"image_size is {size}; it must be a multiple .* such as {near}"):
        vlsm.build_model("openclip_seg", source=str(request.getfixturevalue(kind)), image_size=size)


@pytest.mark.parametrize("kind", ["biomedclip", "open_clip"])
def test_a_prompt_longer_than_the_text_tower_is_cut_with_a_warning_that_names_it(kind, request):
    towers = OpenCLIPTowers.build(str(request.getfixturevalue(kind)), None)
    with pytest.warns(UserWarning, match=r"prompt 'flat flat flat .*' has 302 tokens; the text tower reads"):
        (ids,) = towers.tokenize(["flat " * 300])
    assert len(ids) == towers.tokenizer.context_length


def test_mean_std_and_size_come_from_the_source(open_clip):
    config = json.loads((open_clip / "open_clip_config.json").read_text())
    spec = vlsm.build_model("openclip_seg", source=str(open_clip)).image_spec
    assert (spec.size, list(spec.mean)) == (64, config["preprocess_cfg"]["mean"])
