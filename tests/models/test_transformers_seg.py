"""Pairs of towers of transformers: each kind of checkpoint, written by transformers itself."""

import json
import string

import pytest
import torch
import transformers
from tokenizers import normalizers

import vlsm
from tests.tiny import save_tiny_siglip, stir
from vlsm.errors import CheckpointError
from vlsm.models.tower_files import PAIRS
from vlsm.models.transformers_towers import TransformersTowers
from vlsm.models.untrained import byte_pair_tokenizer, lower_case_tokenizer

PROMPTS = ["Polyp", "a round lesion of the left", "", "small, flat: bright!"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = SIZES | {"image_size": 56, "patch_size": 14}


def unigram(special, tokenizer_class):
    pieces = [(letter, -8.0) for letter in "\u2581" + string.ascii_letters + string.punctuation]
    return tokenizer_class([(token, 0.0) for token in special] + [("\u2581lesion", -1.0), *pieces])


def tips_tokenizer():
    letters = "\u2581" + string.ascii_lowercase + string.punctuation
    tokens = ["<pad>", "<unk>", *(f"<0x{code:02X}>" for code in range(256)), *letters, "le"]
    return transformers.Tipsv2Tokenizer({token: n for n, token in enumerate(tokens)}, [("l", "e")])


def text_of(tokenizer, **sizes):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SIZES | special | {"vocab_size": 500, "max_position_embeddings": 32} | sizes


def make(kind):
    """Return the configuration, tokenizer and image processor of a kind."""
    clip = transformers.CLIPImageProcessor()
    if kind in ("siglip", "siglip2"):
        tokenizer = lower_case_tokenizer()
        text = text_of(tokenizer, projection_size=24)
        if kind == "siglip":
            return (
                transformers.SiglipConfig(text_config=text, vision_config=IMAGE),
                tokenizer,
                transformers.SiglipImageProcessor(),
            )
        image = SIZES | {"num_patches": 16, "patch_size": 14}
        return (
            transformers.Siglip2Config(text_config=text, vision_config=image),
            tokenizer,
            transformers.Siglip2ImageProcessor(),
        )
    if kind == "metaclip_2":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = unigram(special, transformers.XLMRobertaTokenizer)
        return (
            transformers.MetaClip2Config(text_config=text_of(tokenizer), vision_config=IMAGE, projection_dim=24),
            tokenizer,
            clip,
        )
    if kind == "tipsv2":
        tokenizer = tips_tokenizer()
        image = {key: value for key, value in IMAGE.items() if key != "intermediate_size"} | {"num_register_tokens": 2}
        return (
            transformers.Tipsv2Config(text_config=text_of(tokenizer), vision_config=image),
            tokenizer,
            transformers.Tipsv2ImageProcessor(),
        )
    config = {"clip": transformers.CLIPConfig, "aimv2": transformers.Aimv2Config}[kind]
    tokenizer = byte_pair_tokenizer()
    return config(text_config=text_of(tokenizer), vision_config=IMAGE, projection_dim=24), tokenizer, clip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folders = {}

    def write(kind):
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp(kind)
            config, tokenizer, processor = make(kind)
            transformers.AutoModel.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            processor.save_pretrained(folder)
            stir(folder)
        return folders[kind]

    return write


def theirs(folder):
    return transformers.AutoModel.from_pretrained(folder).eval()


def hidden_states(model, kind, pixel_values):
    """All hidden states of transformers' own image tower, its input first."""
    inputs = {"pixel_values": pixel_values}
    if kind == "siglip2":
        images = [image.permute(1, 2, 0).numpy() for image in pixel_values]
        process = transformers.Siglip2ImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
        num_patches = (pixel_values.shape[-1] // 14) ** 2
        inputs = dict(process(images, return_tensors="pt", patch_size=14, max_num_patches=num_patches))
    elif kind in ("siglip", "clip", "metaclip_2"):
        inputs["interpolate_pos_encoding"] = True
    return model.vision_model(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("size", [56, 84])
@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_tapped_layers_equal_transformers_own(source, kind, size):
    if kind == "aimv2" and size != 56:
        pytest.skip("it has no other size")
    towers = TransformersTowers.build(str(source(kind)), size, (0, 2)).eval()
    pixel_values = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = hidden_states(theirs(source(kind)), kind, pixel_values)
    activations = towers.encode_images(pixel_values)
    assert towers.grid == size // 14
    for tap, activation in zip((0, 2), activations, strict=True):
        assert activation.shape == (2, towers.grid**2 + towers.num_prefix_tokens, 32)
        torch.testing.assert_close(activation, expected[tap + 1], atol=1e-5, rtol=1e-4)
    assert len(towers._layers) == 3  # the fourth gives nothing to any output


def padded_inputs(kind, tokenizer, prompts):
    """What each kind's processor makes of prompts; SigLIP 2's older tokenizers leave lower case to the user."""
    inputs = tokenizer(prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    if kind in ("siglip", "siglip2"):  # published tokenizers give no mask
        inputs.pop("attention_mask", None)
    return inputs


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_text_embeddings_equal_transformers_own(source, kind):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source(kind))
    expected = theirs(source(kind)).get_text_features(**padded_inputs(kind, tokenizer, PROMPTS)).pooler_output
    towers = TransformersTowers.build(str(source(kind)), None).eval()
    assert expected.shape == (4, towers.text_width)
    torch.testing.assert_close(towers.encode_prompts(PROMPTS), expected, atol=1e-5, rtol=1e-4)
    lengths = {len(ids) for ids in towers.tokenize(PROMPTS)}
    assert lengths == {32} if kind in ("siglip", "siglip2") else max(lengths) < 32


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_a_prompt_is_cut_as_the_processor_cuts_it(source, kind):
    long = "a flat lesion " * 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(source(kind))
    towers = TransformersTowers.build(str(source(kind)), None).eval()
    with pytest.warns(UserWarning, match=r"prompt 'a flat lesion .*' has \d+ tokens; the text tower reads 32"):
        (ids,) = towers.tokenize([long])
    assert ids.tolist() == padded_inputs(kind, tokenizer, [long])["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_reads_lower_case_whatever_its_tokenizer_does(source, kind):
    towers = TransformersTowers.build(str(source(kind)), None)
    expected = towers.tokenize(["a flat lesion"])[0]
    towers.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")  # as of Gemma
    assert towers.tokenizer("a flat LESION")["input_ids"] != towers.tokenizer("a flat lesion")["input_ids"]
    assert torch.equal(towers.tokenize(["A flat LESION"])[0], expected)


@torch.no_grad()
def test_a_full_prompt_of_aimv2_is_causal_as_all_others_are(source):
    """transformers drops the causal mask where no prompt of the batch has padding."""
    towers = TransformersTowers.build(str(source("aimv2")), None).eval()
    (ids,) = towers.tokenize(["l e s i o n " * 5])
    own = towers.model.text_model(ids[None], towers._mask(ids[None])).last_hidden_state
    first = towers.model.text_model(ids[None, :9], towers._mask(ids[None, :9])).last_hidden_state
    torch.testing.assert_close(own[:, :9], first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("unet", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_model_of_each_kind_learns_and_is_restored(source, tmp_path, kind, unet):
    size = 112 if unet and kind != "aimv2" else 56
    if unet and size % 16:
        with pytest.raises(CheckpointError, match="UNet-D needs a multiple of 16"):
            vlsm.build_model("transformers_seg", source=str(source(kind)), unet=True)
        return
    options = {"source": str(source(kind)), "unet": unet, "width": 4, "image_size": size}
    model = vlsm.build_model("transformers_seg", "lora", **options)
    pixel_values = torch.randn(2, 3, size, size)
    model(pixel_values, PROMPTS[:2]).mean().backward()
    adapters = [parameter for name, parameter in model.towers.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 4 * 4  # two matrices for four linear layers in four layers
    assert all(parameter.grad is not None for parameter in adapters)
    model.set_trainable("all").zero_grad()
    model(pixel_values, PROMPTS[:2]).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        expected = model.eval()(pixel_values, PROMPTS[:2])
        alone = model(pixel_values[:1], PROMPTS[:1])
        vlsm.save_checkpoint(model, tmp_path)
        restored = vlsm.load_checkpoint(tmp_path).model
        assert expected.shape == (2, 1, size, size) and expected.std() > 0
        torch.testing.assert_close(alone, expected[:1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(restored(pixel_values, PROMPTS[:2]), expected, atol=1e-5, rtol=1e-4)
    assert restored.image_spec == model.image_spec


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("siglip", 0.5, 0.5),
        ("siglip2", 0.5, 0.5),
        ("clip", 0.48145466, 0.26862954),
        ("tipsv2", 0, 1),
    ],
)
def test_mean_and_std_are_the_image_processors(source, kind, mean, std):
    spec = TransformersTowers.build(str(source(kind)), None).image_spec
    assert (spec.size, spec.mean[0], spec.std[0]) == (56, pytest.approx(mean), pytest.approx(std))


def change(folder, copy, name, **values):
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(copy)


def test_levels_that_are_not_rescaled_have_another_mean(source, tmp_path):
    copy = change(source("siglip"), tmp_path, "preprocessor_config.json", do_rescale=False, image_mean=[127.5] * 3)
    assert TransformersTowers.build(copy, None).image_spec.mean == (0.5, 0.5, 0.5)


def test_a_processor_of_one_file_is_read(tmp_path):
    spec = TransformersTowers.build(str(save_tiny_siglip(tmp_path)), None).image_spec
    assert (spec.size, spec.mean, spec.std) == (64, (0.5,) * 3, (0.5,) * 3)
    assert not (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", "cannot be loaded: the folder has no config.json"),
        ("model.safetensors", "siglip weights .* cannot be loaded"),
        ("preprocessor_config.json", "the mean and std of .* are unknown"),
        ("tokenizer.json", "the tokenizer of .* cannot be loaded"),
    ],
)
def test_a_folder_that_lacks_a_file_is_one_sentence(source, tmp_path, name, reason):
    copy = change(source("siglip"), tmp_path, "config.json")
    (tmp_path / name).unlink()
    if name == "tokenizer.json":
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=reason) as caught:
        vlsm.build_model("transformers_seg", source=copy)
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(CheckpointError, match="'google/medsiglip-448' cannot be loaded: .*the hub cannot be reached"):
        vlsm.build_model("transformers_seg", source="google/medsiglip-448")


def test_other_models_are_refused(source, tmp_path):
    copy = change(source("siglip"), tmp_path, "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type is 'llama'; it must be one of aimv2, clip, metaclip_2"):
        vlsm.build_model("transformers_seg", source=copy)


def test_half_a_pair_is_refused(source, tmp_path):
    copy = change(source("siglip"), tmp_path, "config.json")
    transformers.SiglipVisionModel.from_pretrained(source("siglip")).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lack \d+ tensors, such as .*; give a complete siglip model"):
        vlsm.build_model("transformers_seg", source=copy)


def test_aimv2_has_one_size(source):
    with pytest.raises(CheckpointError, match="image_size is 84; AIMv2 takes its own size only, 56"):
        vlsm.build_model("transformers_seg", source=str(source("aimv2")), image_size=84)


def test_a_size_that_patches_do_not_divide_is_refused(source):
    with pytest.raises(CheckpointError, match="image_size is 60; it must be a multiple .* such as 56 or 70"):
        vlsm.build_model("transformers_seg", source=str(source("siglip")), image_size=60)


def test_siglips_first_tokenizer(source, tmp_path):
    """SentencePiece, lower case without punctuation, and the end of text as padding: SigLIP's, and MedSigLIP's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([string.ascii_lowercase, *["a flat lesion of the left", "small polyp"] * 20]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "spiece"), vocab_size=60, add_dummy_prefix=False,
        pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, hard_vocab_limit=False, minloglevel=5,
    )  # fmt: skip
    tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_input_names=["input_ids"])
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source("siglip").iterdir():
        if "token" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(folder)
    prompts = ["A flat, small POLYP!", "", "lesion"]
    inputs = tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt")
    model = vlsm.build_model("transformers_seg", source=str(folder)).eval()
    vlsm.save_checkpoint(model, tmp_path / "checkpoint")
    restored = vlsm.load_checkpoint(tmp_path / "checkpoint").model
    with torch.no_grad():
        expected = theirs(folder).get_text_features(inputs["input_ids"]).pooler_output
        for towers in (model.towers, restored.towers):
            assert torch.equal(torch.stack(towers.tokenize(prompts)), inputs["input_ids"])
            torch.testing.assert_close(towers.encode_prompts(prompts), expected, atol=1e-5, rtol=1e-4)
