import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import vlsm
from tests.conftest import LONG_S
from vlsm.checkpoints import digest_files, main, read_checkpoint
from vlsm.errors import CheckpointError


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "ck")


def edit(folder, **changes):
    path = folder / "checkpoint.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_another_process_gives_the_same_logits(tiny_checkpoint, tmp_path):
    code = f"""
import numpy, torch, vlsm
model = vlsm.load_checkpoint({str(tiny_checkpoint)!r}).model
with torch.inference_mode():
    logits = model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), model.encode_prompts(["x"]))
numpy.save({str(tmp_path / "logits.npy")!r}, logits.numpy())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)
    model = vlsm.load_checkpoint(tiny_checkpoint).model
    with torch.inference_mode():
        logits = model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), model.encode_prompts(["x"]))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits.numpy(), atol=1e-6)  # threads may differ


def test_the_spec_of_the_checkpoint_counts_not_the_default_of_the_model(copy):
    edit(copy, image={"size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]})
    assert vlsm.load_checkpoint(copy).model.image_spec.mean == (0.1, 0.2, 0.3)


def test_the_digest_follows_content_not_place(tiny_checkpoint, copy):
    assert digest_files(read_checkpoint(str(tiny_checkpoint))) == digest_files(read_checkpoint(str(copy)))
    edit(copy, threshold=0.7)
    assert digest_files(read_checkpoint(str(tiny_checkpoint))) != digest_files(read_checkpoint(str(copy)))


def test_a_pickle_in_the_folder_is_refused(copy):
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*a pickle could run code"):
        vlsm.load_checkpoint(copy)


def test_weights_that_do_not_fit_are_named_with_their_shapes(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["network.head.weight"] = torch.zeros(2, 3, 1, 1)
    del weights["network.expand.bias"]
    safetensors.torch.save_file(weights, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"in 2 places: network\.expand\.bias: none instead of \(78,\); network\.head\.weight: \(2, 3",
    ):
        vlsm.load_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "unet_x"}, "unknown model 'unet_x'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"threshold": 2}, "threshold is 2"),
        ({"options": {"widt": 4}}, "unknown key 'widt'"),
    ],
)
def test_wrong_settings_are_named(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(CheckpointError) as caught:
        vlsm.load_checkpoint(copy)
    assert message in str(caught.value)


def test_damaged_or_missing_weights_are_said(copy):
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        vlsm.load_checkpoint(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        vlsm.load_checkpoint(copy)


def test_a_folder_without_a_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        vlsm.load_checkpoint(tmp_path)


def test_a_checkpoint_in_an_object_store_loads(tiny_checkpoint, s3_folder):
    import s3fs

    s3fs.S3FileSystem().put(str(tiny_checkpoint), f"{s3_folder}/ck", recursive=True)
    assert vlsm.load_checkpoint(f"{s3_folder}/ck").name == vlsm.load_checkpoint(tiny_checkpoint).name


def test_pretrained_weights_become_a_checkpoint_by_one_command(tmp_path):
    from tests.tiny import save_tiny_clipseg

    source = save_tiny_clipseg(tmp_path / "hub")
    words = [str(tmp_path / "ck"), "--model", "clipseg", "--prompt", "polyp"]
    assert main([*words, "--set", f"source={source}", "--set", "image_size=64"]) == 0
    assert vlsm.load_checkpoint(tmp_path / "ck").settings.prompt == "polyp"


def test_what_a_replaced_checkpoint_had_besides_is_gone(tiny_checkpoint, tmp_path):
    (tmp_path / "clipseg").mkdir()
    (tmp_path / "clipseg" / "config.json").write_text("{}")
    model = vlsm.load_checkpoint(tiny_checkpoint).model
    vlsm.save_checkpoint(model, tmp_path, prompt="polyp")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.yaml",
        "model.safetensors",
        "probe.safetensors",
    ]
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "checkpoint.yaml").stat().st_mode


def test_an_image_size_that_is_not_the_models_is_refused(copy):
    path = copy / "checkpoint.yaml"
    path.write_text(path.read_text().replace("\n  size: 32", "\n  size: 48"))
    with pytest.raises(CheckpointError, match="image.size is 48; its unet_d takes 32 pixels"):
        vlsm.load_checkpoint(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DIR", "--model", "unet_d", "--threshold", "2"], "--threshold is 2.0; it must be a probability"),
        (["s3://bucket/x", "--model", "unet_d", "--set", "width=4"], "s3://bucket/x is not on the local disk"),
        (["DIR", "--model", "unet_d", "--set", "name=x"], "unknown key 'name'"),
        (["FILE/x", "--model", "unet_d", "--set", "width=4"], "Not a directory"),
        (["TINY", "--model", "unet_d"], "already; --overwrite replaces it"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tiny_checkpoint, tmp_path, capsys, words, message):
    (tmp_path / "file").write_text("")
    places = {"DIR": str(tmp_path / "dir"), "FILE/x": str(tmp_path / "file" / "x"), "TINY": str(tiny_checkpoint)}
    assert main([places.get(word, word) for word in words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def refusal(location):
    with pytest.raises(CheckpointError, match="there is no checkpoint at") as caught:
        vlsm.load_checkpoint(location)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition("checkpoint.yaml")[2]


def test_a_location_beside_a_checkpoint_gets_the_way_to_it(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "trained" / "checkpoint")
    assert refusal(tmp_path / "trained") == f"; its checkpoint is one folder below: {tmp_path}/trained/checkpoint"
    for name in ("model.safetensors", "checkpoint.yaml"):
        hint = refusal(tmp_path / "trained" / "checkpoint" / name)
        assert hint.endswith(f"; the checkpoint is the folder of this file: {tmp_path}/trained/checkpoint")
    assert refusal(tmp_path) == refusal(tmp_path / "nothing") == ""


def test_a_hub_id_or_a_published_model_gets_the_command_that_makes_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "open_clip_config.json").write_text("{}")
    assert f"--model biomedclipseg --set source={tmp_path}/published" in refusal(tmp_path / "published")
    (tmp_path / "published" / "config.json").write_text("{}")
    assert f"vlsm checkpoints DIR --model clipseg --set source={tmp_path}" in refusal(tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    assert "vlsm checkpoints DIR --model clipseg --set source=CIDAS/clipseg-rd64 " in refusal("CIDAS/clipseg-rd64")
    assert "--model NAME --set source=hf-hub:laion/CLIP " in refusal("hf-hub:laion/CLIP")
    assert "; unet_d is the name of a model, of which a training makes a checkpoint: vlsm train" in refusal("unet_d")
    assert "or vlsm checkpoints DIR --model clipseg makes one from pretrained weights" in refusal("clipseg")
    assert "vlsm checkpoints" not in refusal("unet_d")
    (tmp_path / "owner" / "empty").mkdir(parents=True)
    assert refusal("owner/empty") == refusal(tmp_path / "a" / "b" / "c") == refusal("nothing") == ""
