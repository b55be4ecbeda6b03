"""Checkpoints of attackers: no foreign code, no network, no question, no large allocation; one sentence."""

import builtins
import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

import vlsm
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.checkpoints import check_files, read_checkpoint
from vlsm.errors import CheckpointError
from vlsm.models.restoring import read_shapes
from vlsm.models.tower_files import SAMS, clean_config

TOWER, OPENCLIP = "openclip/config.json", "openclip/open_clip_config.json"
CLIPSEG, TOKENIZER = "clipseg/config.json", "clipseg/tokenizer_config.json"
PAIR, PAIR_TOKENIZER = "transformers/config.json", "transformers/tokenizer_config.json"
TRUNK = ("vision_config", "backbone_config")
WEIGHTS = "model.safetensors"
TEXT, VISION = ("model_cfg", "text_cfg"), ("model_cfg", "vision_cfg")
GROW = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
BPE = {"type": "BPE", "vocab": {}, "merges": ["a b"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    options = tiny_options(save_tiny_sources(folder / "sources"))
    for name in ("clipseg", "biomedclipseg", "openclip_seg", "transformers_seg", "sam3", "unet", "unet_d"):
        vlsm.save_checkpoint(vlsm.build_model(name, **options[name]), folder / name)
    return folder


@pytest.fixture
def attacked(checkpoints, tmp_path, monkeypatch):
    """A function that changes one file of a copy and loads it, where nothing may connect or ask."""
    calls = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (builtins, "input")):
        monkeypatch.setattr(owner, name, lambda *args, name=name: calls.append(name))

    def load(kind, file, keys, value):
        folder = tmp_path / "ck"
        shutil.copytree(checkpoints / kind, folder)
        path = folder / file
        if keys is None:
            path.write_text(value)
        else:
            parse, dump = (yaml.safe_load, yaml.safe_dump) if file.endswith(".yaml") else (json.loads, json.dumps)
            tree = part = parse(path.read_text())
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value
            path.write_text(dump(tree))
        try:
            model = vlsm.load_checkpoint(folder).model
            model.encode_prompts(["a polyp"])
            return model
        finally:
            assert not calls

    return load


@pytest.mark.parametrize("base", ["config.json", "preprocessor_config.json", "deep/er/x.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [
        '{"\\u0061uto_map": {"AutoConfig": "evil/x--m.C"}, "model_type": "evil"}',
        '{"a": [{"b": {"auto_map": ["evil/x--m.C"]}}]}',
        '[{"custom_pipelines": {"x": {}}}]',
        '{"tokenizer_kwargs": {"trust_remote_code": true}}',
    ],
    ids=["escape", "deep", "pipeline", "trust"],
)
def test_what_asks_to_run_code_is_refused_in_every_file(attacked, checkpoints, tmp_path, base, content):
    shutil.copytree(checkpoints / "biomedclipseg", tmp_path / "ck")
    (tmp_path / "ck" / "openclip" / base).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "ck" / "openclip" / base).write_text(content)
    with pytest.raises(CheckpointError, match="has the key (auto_map|custom_pipelines|trust_remote_code), which asks"):
        vlsm.load_checkpoint(tmp_path / "ck")


@pytest.mark.parametrize(
    ("kind", "file", "keys", "value", "message"),
    [
        ("biomedclipseg", TOWER, ["model_type"], "evil", "model_type is 'evil'; it must be one of bert, clipseg"),
        ("biomedclipseg", TOWER, ["model_type"], "llama", "model_type is 'llama'"),
        ("biomedclipseg", OPENCLIP, [*VISION, "timm_model_name"], "hf-hub:evil/x", "it must be a name of timm"),
        ("biomedclipseg", OPENCLIP, [*VISION, "timm_model_name"], "local-dir:/etc", "it must be a name of timm"),
        ("biomedclipseg", OPENCLIP, [*VISION, "timm_model_name"], ["x"], "it must be a name of timm"),
        ("openclip_seg", OPENCLIP, [*TEXT, "hf_model_name"], "evil/x", "openclip/config.json, which describes"),
        ("openclip_seg", OPENCLIP, [*TEXT, "hf_tokenizer_name"], "evil/x", "do not describe OpenCLIPSeg"),
        ("openclip_seg", OPENCLIP, [*TEXT, "tokenizer_kwargs"], {"bpe_path": "/dev/zero"}, "has 'bpe_path'; known are"),
        ("openclip_seg", OPENCLIP, [*TEXT, "tokenizer_kwargs"], {"reduction_mask": "syntax"}, "has 'reduction_mask'"),
        ("unet", "checkpoint.yaml", ["options", "encoder"], "tu-hf-hub:timm/resnet18.a1_in1k", "encoder is 'tu-hf-hub"),
        ("unet", "checkpoint.yaml", ["options", "encoder"], "tu-local-dir:/etc", "encoder is 'tu-local-dir:/etc'"),
        ("clipseg", TOKENIZER, ["tokenizer_class"], "BertJapaneseTokenizer", "tokenizer_class is 'BertJapanese"),
        ("clipseg", TOKENIZER, ["extra_ids"], 10**9, "extra_ids is 1000000000; it must be 10,000 at most"),
        ("clipseg", TOKENIZER, None, "[" * 3000, "nested more than 100 times"),
        ("clipseg", "clipseg/tokenizer.json", ["normalizer"], {"type": "Sequence", "normalizers": GROW}, "longer"),
        ("clipseg", "clipseg/tokenizer.json", ["pre_tokenizer"], SLOW, "it may take hours"),
        ("clipseg", "clipseg/tokenizer.json", ["normalizer"], CHARSMAP, "do not describe CLIPSeg: PanicException"),
        ("clipseg", "clipseg/tokenizer.json", ["model"], BPE, "do not describe CLIPSeg: Exception"),
        ("clipseg", CLIPSEG, ["vision_config", "num_hidden_layers"], 100_000, "far larger than its weights"),
        ("clipseg", CLIPSEG, ["text_config", "num_hidden_layers"], 100_000, "far larger than its weights"),
        ("clipseg", CLIPSEG, ["vision_config", "hidden_size"], 10**6, "far larger than its weights"),
        ("clipseg", CLIPSEG, ["vision_config", "image_size"], 10**6, "far larger than its weights"),
        ("clipseg", CLIPSEG, ["text_config", "vocab_size"], 2**31, "far larger than its weights"),
        ("clipseg", CLIPSEG, ["text_config", "vocab_size"], 10**30, "do not describe CLIPSeg: TypeError"),
        ("clipseg", CLIPSEG, ["text_config", "vocab_size"], 600, r"do not fit its model in 1 places"),
        ("clipseg", CLIPSEG, ["extract_layers"], list(range(100_000)), "far larger than its weights"),
        ("clipseg", CLIPSEG, ["vision_config", "patch_size"], 0, "do not describe CLIPSeg: ZeroDivisionError"),
        ("openclip_seg", OPENCLIP, [*VISION, "layers"], 100_000, "far larger than its weights"),
        ("openclip_seg", OPENCLIP, [*VISION, "width"], 10**7, "far larger than its weights"),
        ("openclip_seg", OPENCLIP, [*TEXT, "context_length"], 10**6, "far larger than its weights"),
        ("openclip_seg", "checkpoint.yaml", ["options", "taps"], list(range(50_000)), "they must increase"),
        ("transformers_seg", PAIR, ["model_type"], "clipseg", "model_type is 'clipseg'; it must be one of aimv2, clip"),
        ("transformers_seg", PAIR, ["model_type"], "sam3", "model_type is 'sam3'; it must be one of aimv2, clip"),
        ("transformers_seg", PAIR, ["model_type"], ["siglip"], r"model_type is \['siglip'\]"),
        ("transformers_seg", PAIR, ["vision_config", "num_hidden_layers"], 100_000, "far larger than its weights"),
        ("transformers_seg", PAIR, ["vision_config", "image_size"], [64, 32], "only squares are supported"),
        ("transformers_seg", PAIR, ["vision_config", "patch_size"], 0, "do not describe TransformersSeg: ZeroDivision"),
        ("transformers_seg", PAIR, ["text_config", "vocab_size"], 2**31, "far larger than its weights"),
        ("transformers_seg", PAIR, ["text_config", "hidden_size"], "many", "config.json of .* describes no model"),
        ("transformers_seg", PAIR, ["text_config"], {}, "far larger than its weights|do not fit its model"),
        ("transformers_seg", PAIR_TOKENIZER, ["tokenizer_class"], "LlamaTokenizer", "tokenizer_class is 'LlamaT"),
        ("sam3", PAIR, ["model_type"], "siglip", "model_type is 'siglip'; it must be one of sam3, sam3_lite_text"),
        ("sam3", PAIR, [*TRUNK, "num_hidden_layers"], 100_000, "far larger than its weights"),
        ("sam3", PAIR, [*TRUNK, "window_size"], 10**6, "far larger than its weights"),
        ("sam3", PAIR, [*TRUNK, "patch_size"], 1, "far larger than its weights|do not fit its model"),
        ("sam3", PAIR, ["detr_encoder_config", "num_layers"], 100_000, "far larger than its weights"),
        ("sam3", PAIR, ["vision_config", "scale_factors"], [4.0] * 100_000, "far larger than its weights"),
        ("sam3", "checkpoint.yaml", ["options", "image_size"], 10**6, "less than or equal to 4096"),
        ("unet", "checkpoint.yaml", ["options", "encoder"], "tu-vit_7b_patch16_dinov3", "far larger than its weights"),
        ("unet_d", "checkpoint.yaml", ["options", "width"], 10**9, "far larger than its weights"),
        ("unet_d", "checkpoint.yaml", ["options", "image_size"], 10**6, "less than or equal to 4096"),
        ("unet_d", "checkpoint.yaml", ["image", "std"], [0, 0, 0], "image.std.0 is 0"),
        ("unet_d", "checkpoint.yaml", ["image", "mean"], [float("nan")] * 3, "image.mean.0 is nan"),
        ("unet_d", "checkpoint.yaml", None, "model: a\nmodel: b", "a key stands twice in an object: 'model'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of torch, about tensors without values
def test_hostile_files_are_one_sentence(attacked, kind, file, keys, value, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        attacked(kind, file, keys, value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("kind", "file", "keys", "value"),
    [
        ("clipseg", "checkpoint.yaml", ["options", "source"], "/etc"),
        ("clipseg", "checkpoint.yaml", ["options", "source"], "evil/x"),
        ("biomedclipseg", "checkpoint.yaml", ["options", "decoder_source"], "evil/x"),
        ("biomedclipseg", OPENCLIP, [*TEXT, "hf_model_name"], "evil/x"),
        ("biomedclipseg", OPENCLIP, [*TEXT, "hf_tokenizer_name"], "../../etc"),
        ("biomedclipseg", OPENCLIP, [*TEXT, "hf_model_pretrained"], True),
        ("biomedclipseg", OPENCLIP, [*VISION, "timm_model_pretrained"], True),
        ("biomedclipseg", TOWER, ["_attn_implementation"], "kernels-community/x"),
        ("biomedclipseg", TOWER, ["attn_implementation"], "kernels-community/x"),
        ("biomedclipseg", TOWER, ["configuration_files"], ["config.0.json"]),
        ("transformers_seg", "checkpoint.yaml", ["options", "source"], "evil/x"),
        ("transformers_seg", PAIR, ["_attn_implementation"], "kernels-community/x"),
        ("transformers_seg", PAIR, ["vision_config", "model_type"], "evil"),
        ("transformers_seg", PAIR, ["vision_config", "_attn_implementation"], "kernels-community/x"),
        ("transformers_seg", PAIR, ["text_config", "_name_or_path"], "evil/x"),
        ("sam3", "checkpoint.yaml", ["options", "weights"], "/etc/passwd"),
        ("sam3", PAIR, [*TRUNK, "model_type"], "timm_wrapper"),
        ("sam3", PAIR, ["text_config", "model_type"], "llama"),
        ("sam3", PAIR, ["detector_config"], "evil/x"),
        ("unet", "checkpoint.yaml", ["options", "encoder_weights"], "imagenet"),
        ("clipseg", TOKENIZER, ["vocab_file"], "/etc/passwd"),
        ("clipseg", TOKENIZER, ["init_inputs"], ["/etc/passwd"]),
        ("clipseg", TOKENIZER, ["fast_tokenizer_files"], ["tokenizer.9.json"]),
        ("clipseg", TOKENIZER, ["chat_template"], "{{ x }}"),
        ("clipseg", TOKENIZER, ["model_max_length"], 10**30),
        ("clipseg", TOKENIZER, ["tokenizer_class"], "CLIPTokenizerFast"),
    ],
)
def test_names_of_places_are_not_followed_and_public_values_load(attacked, checkpoints, kind, file, keys, value):
    expected = vlsm.load_checkpoint(checkpoints / kind).model.encode_prompts(["a polyp"])
    assert all(map(torch.equal, attacked(kind, file, keys, value).encode_prompts(["a polyp"]), expected))


def test_code_that_a_users_own_source_comes_with_is_not_run_and_not_asked_for(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked"))
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "sources" / "biomedclip", source)
    marker = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import BertConfig as C")
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((source / name).read_text())
        auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoTokenizer": ["evil.C", None]}
        (source / name).write_text(json.dumps(tree | {"auto_map": auto_map}))
    try:
        vlsm.build_model("biomedclipseg", source=str(source), taps=[1, 2, 4])
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


def test_keys_of_public_configurations_that_are_no_sizes_are_left_out():
    published = {"model_type": "bert", "hidden_size": 768, "architectures": ["BertModel"], "torch_dtype": "float16"}
    assert clean_config(published | {"_name_or_path": "x/y"}, "x") == {"model_type": "bert", "hidden_size": 768}
    nested = {"model_type": "clipseg", "text_config": {"hidden_size": 8, "bad": "x"}, "extract_layers": [1, 2]}
    assert clean_config(nested, "x") == nested | {"text_config": {"hidden_size": 8}}
    trunk = {
        "model_type": "sam3_vit_model",
        "hidden_size": 8,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    }
    deep = {"model_type": "sam3", "vision_config": {"backbone_config": trunk, "scale_factors": [1.0]}}
    assert clean_config(deep, "x", SAMS) == deep
    trunk["rope_parameters"]["code"] = "x.py"
    assert clean_config(deep, "x", SAMS)["vision_config"]["backbone_config"]["rope_parameters"].keys() == {
        "rope_theta",
        "rope_type",
    }


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, r"a tensor has the name 'a\\x1b\[2J'"),
        ({"a" * 1000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "a tensor has the name 'aaa"),
        ({"a": {"dtype": "F32", "shape": [-1]}}, r"a has the shape \[-1\]"),
        ({"a": {"dtype": "F32", "shape": [2**60]}}, "a has the shape"),
        ({"a": {"dtype": "F4", "shape": [1]}}, "a has the type 'F4'"),
        ({"a": {"dtype": ["x"], "shape": [1]}}, "a has the type"),
        ({"a": 1}, "a has the shape None"),
        ([1], "its header is a list"),
        ('{"a": {}, "\\u0061": {}}', "its header is not JSON: a key stands twice"),
        ("[" * 5000, "nested more than 100 times"),
    ],
)
def test_a_hostile_header_of_weights_is_one_sentence(header, message):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    with pytest.raises(CheckpointError, match=f"x is damaged: .*{message}") as caught:
        read_shapes(len(text).to_bytes(8, "little") + text + bytes(8), "x")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, b"\x05\0\0\0\0\0\0\0{}"])
def test_a_header_that_is_longer_than_its_file_is_one_sentence(data):
    with pytest.raises(CheckpointError, match="x is damaged: its header has"):
        read_shapes(data, "x")


def test_overlapping_tensors_are_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "unet_d", tmp_path / "ck")
    path = tmp_path / "ck" / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["network.head.weight"]["data_offsets"] = header["network.head.bias"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="is damaged: .*offset"):
        vlsm.load_checkpoint(tmp_path / "ck")
    assert set(read_shapes(data, "x")) == header.keys() - {"__metadata__"}


def test_a_folder_with_very_many_or_very_long_files_is_not_read(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "unet_d", tmp_path / "ck")
    with (tmp_path / "ck" / "long.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"long.json of checkpoint .* has 1,099,511,627,776 bytes"):
        vlsm.load_checkpoint(tmp_path / "ck")
    (tmp_path / "ck" / "long.json").unlink()
    for number in range(100):
        (tmp_path / "ck" / f"{number}.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has 103 files; a checkpoint has 100 at most"):
        vlsm.load_checkpoint(tmp_path / "ck")


def test_a_job_refuses_code_and_places_before_it_loads_torch(checkpoints):
    files = read_checkpoint(str(checkpoints / "clipseg"))
    check_files(files, "x")
    name = "clipseg/config.json"
    text = files[name].decode()
    with pytest.raises(CheckpointError, match="has the key auto_map, which asks to run code"):
        check_files(files | {name: text.replace("{", '{"\\u0061uto_map": {"AutoModel": "x--y"}, ', 1).encode()}, "x")


@pytest.mark.parametrize("kind", ["clipseg", "biomedclipseg", "openclip_seg", "transformers_seg", "sam3"])
def test_a_driver_checks_the_files_without_the_libraries_of_the_models(checkpoints, kind):
    """Their import takes seconds, in which Ray starts on the same cores."""
    code = (
        "import sys; from vlsm.checkpoints import check_files, read_checkpoint; "
        "check_files(read_checkpoint(sys.argv[1]), 'x'); print({'torch', 'transformers', 'open_clip'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(checkpoints / kind)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


class _Draws(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    def __init__(self):
        super().__init__()
        self.num_drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in {"normal_", "uniform_", "randn", "rand"} and not result.is_meta:
            self.num_drawn += result.numel()
        return result


@pytest.mark.parametrize("kind", ["clipseg", "sam3", "unet_d"])
def test_no_random_weights_are_drawn_where_those_of_a_checkpoint_come(checkpoints, kind):
    """Drawing them took more than half of the seconds in which a full-size CLIPSeg is loaded."""
    with _Draws() as draws:
        model = vlsm.load_checkpoint(checkpoints / kind).model
    assert draws.num_drawn < sum(weight.numel() for weight in model.parameters()) / 50
