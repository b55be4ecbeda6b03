"""Compiled models give the same logits; a model or machine that cannot compile goes on without."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlsm
from tests.conftest import LONG_S
from vlsm.models import compiling

ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
PROMPTS = [["a"], ["b", "a", "c"], ["a"], ["a"], ["b"]]


def eager_compiler(monkeypatch, **changes):
    """torch's tracing without its C++ compiler, which takes a minute."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: real(step, backend="eager", **options | changes))
    monkeypatch.setattr(compiling, "lasting_folder", lambda name: pytest.fail("the environment states a folder"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")


def logits_of(folder, **options):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(folder), "cpu", **options)
    return segmenter, segmenter.predict_logits(IMAGES, PROMPTS)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_a_compiled_model_sees_batches_of_one_size_and_gives_the_same_logits(tiny_checkpoint, monkeypatch):
    eager_compiler(monkeypatch)
    torch.compiler.reset()
    _, wanted = logits_of(tiny_checkpoint, batch_size=2)
    sizes = []
    real = torch.compile

    def compile_and_count(step, **options):
        compiled = real(step, **options)
        return lambda *args: sizes.append(len(torch.utils._pytree.tree_leaves(args)[0])) or compiled(*args)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    segmenter, found = logits_of(tiny_checkpoint, batch_size=2, compile=True)
    assert_same(found, wanted)
    assert segmenter.network.is_compiled and set(sizes) == {2}
    assert len(sizes) == 3 + 1 + 2 + 1  # three batches of images; pairs: 4, 2 and 1


def test_a_shared_tower_gives_the_same_logits_compiled(tmp_path, monkeypatch):
    from tests.tiny import save_tiny_clipseg
    from vlsm.models.sharing import share_towers

    eager_compiler(monkeypatch)
    model = vlsm.build_model("clipseg", source=str(save_tiny_clipseg(tmp_path / "hub")), image_size=64)
    vlsm.save_checkpoint(model, tmp_path / "ck", prompt="a")
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    wanted = vlsm.Segmenter(vlsm.load_checkpoint(tmp_path / "ck"), "cpu", 2).predict_logits(images, PROMPTS[:2])
    both = [vlsm.Segmenter(vlsm.load_checkpoint(tmp_path / "ck"), "cpu", 2, compile=True) for _ in range(2)]
    assert share_towers([segmenter.model for segmenter in both]) == 1
    for segmenter in both:
        assert_same(segmenter.predict_logits(images, PROMPTS[:2]), wanted)
        assert segmenter.network.is_compiled


def test_what_cannot_be_compiled_runs_without_and_says_so_once(tiny_checkpoint, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no kernel for this\nand many more lines")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: real(step, backend=broken, **options))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    compiling._warn.cache_clear()
    torch.compiler.reset()
    _, wanted = logits_of(tiny_checkpoint, batch_size=2)
    with caplog.at_level(logging.WARNING, "vlsm"):
        for _ in range(2):
            segmenter, found = logits_of(tiny_checkpoint, batch_size=2, compile=True)
            assert_same(found, wanted)
            assert not segmenter.network.is_compiled
    (record,) = caplog.records
    assert "cannot be compiled" in record.message and "no kernel for this" in record.message
    assert "many more lines" not in record.message and "run.compile=off" in record.message


def test_an_error_of_the_model_is_not_hidden(tiny_checkpoint, monkeypatch):
    eager_compiler(monkeypatch)
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint(tiny_checkpoint), "cpu", 2, compile=True)
    with pytest.raises(Exception, match="channels|size|shape"):
        segmenter.network.encode(torch.zeros(2, 5, 32, 32))


@pytest.mark.nightly  # a minute
@pytest.mark.parametrize("compiler", ["g++", "/nonexistent"])
def test_the_compiler_of_this_machine_and_a_missing_one(compiler, tiny_checkpoint, tmp_path):
    """In a process of its own, whose results stay in the user's private cache folder."""
    code = f"""
import logging, sys
import numpy as np, vlsm
logging.basicConfig(level="WARNING", format="LOG %(message)s", stream=sys.stdout)
images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
logits = []
for compile in (False, True):
    segmenter = vlsm.Segmenter(vlsm.load_checkpoint({str(tiny_checkpoint)!r}), "cpu", 2, compile=compile)
    logits.append(segmenter.predict_logits(images, [["x"]] * 3))
np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
print("COMPILED", segmenter.network.is_compiled)
"""
    path = "/usr/bin:/bin" if compiler == "g++" else "/nonexistent"  # torch looks for other compilers there
    environment = {"PATH": path, "HOME": str(tmp_path), "CXX": compiler, "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG_S
    )
    assert done.returncode == 0, done.stderr
    is_missing = compiler == "/nonexistent"
    assert f"COMPILED {not is_missing}" in done.stdout
    assert done.stdout.count("cannot be compiled") == is_missing
    folder = tmp_path / ".cache" / "vlsm" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert is_missing or any(folder.iterdir())
