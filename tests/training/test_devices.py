"""What a learner does for GPUs, tried on the CPU: few waits, fused steps, low precision, compilers, shards."""

import logging
import sys

import numpy as np
import pytest
import torch
import torch._inductor.config
from safetensors.torch import load, save
from torch.overrides import TorchFunctionMode

import vlsm
from tests.training.test_learner import (
    CPU,
    RECORDS,
    build,
    draw,
    largest_difference,
    learn,
    make_settings,
    source,
    weights_of,
)
from vlsm.training import learner as learner_module
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import History
from vlsm.training.learner import Learner
from vlsm.training.memory import explain_out_of_memory
from vlsm.training.parallel import is_sharded
from vlsm.training.sampling import ExampleOrder
from vlsm.training.staging import stage
from vlsm.training.state import copy_best

__all__ = ["source"]  # the fixture

_READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Waits(TorchFunctionMode):
    """Notes all calls for which a process would wait for its GPU: numbers that it reads, copies that block."""

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _READS:
            self.reads.append(name)
        moves = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        is_ours = not sys._getframe(1).f_code.co_filename.endswith("clip_grad.py")  # whose tensors are there already
        if moves and is_ours and name in ("to", "tensor", "as_tensor") and not kwargs.get("non_blocking"):
            self.copies.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("clipseg", {}),
        ("clipseg", {"trainable": "all"}),
        ("vlsm_b", {}),
        ("unet_d", {"optim": {"precision": "fp16", "ema_decay": 0.9}}),
    ],
    ids=str,
)
def test_a_step_waits_once_for_its_device(source, monkeypatch, model, changes):
    monkeypatch.setattr(learner_module, "_FUSED", ("cpu",))
    settings = make_settings(source, model, run={"micro_batch_size": 2}, **changes)
    learner, _ = learn(settings, epochs=[0])  # prompts and the optimiser's state exist now
    batches = [batch for batch in ExampleOrder(RECORDS, settings).train(1) if batch.step == 0]
    arrays = [draw(batch) for batch in batches]
    with Waits() as waits:
        scores = [learner.train(batch, *pair, History()) for batch, pair in zip(batches, arrays, strict=True)]
    assert list(map(len, scores)) == [0, 0, 5]
    assert waits.reads == ["tolist"]
    if changes.get("trainable") != "all":  # transformers' text tower calls `to` for tensors that are there already
        assert waits.copies == []


def test_validation_waits_once_per_micro_batch(source):
    settings = make_settings(source, optim={"val_flip": True})
    learner, _ = learn(settings, epochs=[0])
    (batch,) = ExampleOrder(RECORDS, settings).evaluate("val", 0)
    arrays = draw(batch)
    with Waits() as waits:
        assert len(learner.evaluate(batch, *arrays)) == 3
    assert (waits.reads, waits.copies) == (["tolist"], [])


def test_kept_features_are_read_without_a_wait(source, tmp_path):
    settings = make_settings(source, "vlsm_b")
    cache = FeatureCache(tmp_path / "features", 1 << 30)
    learner, _ = learn(settings, features=cache, epochs=[0])
    model, images = learner.model, torch.rand(2, 3, 64, 64)
    expected = cache.fetch([0, 1], images, model)
    with Waits() as waits:
        kept = cache.fetch([0, 1], images, model)
    assert not waits.reads and all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))


def test_micro_batches_arrive_in_order_one_ahead_and_end_with_their_source(source):
    settings = make_settings(source)
    batches, read, ended = list(ExampleOrder(RECORDS, settings).train(0)), [], []

    def load():
        try:
            for batch in batches:
                read.append(batch)
                yield batch, *(tensor.numpy() for tensor in draw(batch))
        finally:
            ended.append(True)

    seen = []
    for batch, images, masks in stage(load(), CPU):
        seen.append(batch)
        assert len(read) <= len(seen) + 1
        assert torch.equal(images, draw(batch)[0]) and torch.equal(masks, draw(batch)[1])
    assert seen == batches and ended == [True]
    stream = stage(load(), CPU)
    next(stream)
    stream.close()  # as after an early stop
    assert ended == [True, True]


def test_an_error_of_the_source_is_raised_at_its_place():
    def load():
        yield None, np.zeros(1, np.uint8), np.zeros(1, np.uint8)
        raise ValueError("broken")

    stream = stage(load(), CPU)
    next(stream)
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def through_a_file(state):
    """The state as a file gives it back: contiguous tensors."""
    weights, optimizer = state
    tensors = {f"{name} {key}": v for name, s in optimizer["state"].items() for key, v in s.items()}
    tensors = load(save({name: value.contiguous() for name, value in tensors.items()}))
    read = {name: {key: tensors[f"{name} {key}"] for key in s} for name, s in optimizer["state"].items()}
    return load(save({name: value.contiguous() for name, value in weights.items()})), optimizer | {"state": read}


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_fused_steps_go_on_from_each_other_and_from_any_layout(source, monkeypatch, optimizer, before, after):
    settings = make_settings(source, "unet_d", optim={"lr": 1e-4, "optimizer": optimizer})
    undisturbed, expected = learn(settings)
    monkeypatch.setattr(learner_module, "_FUSED", ("cpu",) if before else ())
    first, _ = learn(settings, epochs=[0])
    monkeypatch.setattr(learner_module, "_FUSED", ("cpu",) if after else ())
    again = Learner(build(settings), settings, 2, CPU)
    again.restore(*through_a_file(first.state()))
    states = list(again.optimizer.state.items())
    assert any(not weight.is_contiguous() for weight, _ in states)  # channels last
    assert all(state["exp_avg"].stride() == weight.stride() for weight, state in states)
    assert all(bool(group["fused"]) == after for group in again.optimizer.param_groups)
    again, scores = learn(settings, epochs=[1], learner=again)
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected[10:]], atol=1e-4)
    # Adam makes a step of full size also out of the float noise that biases before norms have for a gradient
    pairs = zip(weights_of(undisturbed).values(), weights_of(again).values(), strict=True)
    differences = torch.cat([(one - other).abs().flatten() for one, other in pairs if one.ndim > 1])
    assert differences.mean() < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_nearly_the_same(source, monkeypatch, precision):
    _, expected = learn(make_settings(source, optim={"lr": 1e-3}))
    monkeypatch.setattr(learner_module, "_LOW_PRECISION", ("cpu",))
    settings = make_settings(source, optim={"lr": 1e-3, "precision": precision})
    learner, scores = learn(settings, epochs=[0])
    assert learner.scaler.is_enabled() == (precision == "fp16")
    again = Learner(build(settings), settings, 2, CPU)
    again.restore(*learner.state())
    assert again.scaler.get_scale() == learner.scaler.get_scale()
    again, others = learn(settings, epochs=[1], learner=again)
    losses = [score.loss for score in scores + others]
    exact = [score.loss for score in expected]
    assert np.allclose(losses, exact, atol=0.05) and losses != exact
    assert all(weight.dtype == torch.float32 for weight in weights_of(again).values())


@pytest.mark.parametrize("is_fused", [False, True])
def test_an_overflow_of_fp16_costs_a_step_and_not_the_weights(source, monkeypatch, is_fused):
    monkeypatch.setattr(learner_module, "_LOW_PRECISION", ("cpu",))
    monkeypatch.setattr(learner_module, "_FUSED", ("cpu",) if is_fused else ())
    settings = make_settings(source, optim={"precision": "fp16"})
    learner, _ = learn(settings, epochs=[])
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: value.clone() for name, value in weights_of(learner).items()}
    learner, scores = learn(settings, epochs=[0], learner=learner)
    assert len(scores) == 10 and learner.scaler.get_scale() < 2.0**60
    assert largest_difference(before, weights_of(learner)) == 0


def test_a_group_of_one_process_shards_and_goes_on(source, tmp_path):
    settings = make_settings(source, trainable="all", optim={"lr": 2e-4}, run={"fsdp": True})
    alone, expected = learn(settings)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        sharded, _ = learn(settings, epochs=[0])
        assert is_sharded(sharded.model) and not is_sharded(alone.model)
        with copy_best(sharded.model, "polyp", sharded.state()[0]) as folder:
            assert vlsm.Segmenter(vlsm.load_checkpoint(folder), "cpu").check_probe().difference < 1e-4
        again = Learner(build(settings), settings, 2, CPU)
        again.restore(*sharded.state())
        again, scores = learn(settings, epochs=[1], learner=again)
        assert largest_difference(weights_of(alone), weights_of(again)) < 2e-4
    finally:
        torch.distributed.destroy_process_group()
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected[10:]], atol=1e-4)


@pytest.mark.nightly
def test_a_compiled_model_learns_the_same(source, caplog):
    torch.compiler.reset()
    settings = make_settings(source, optim={"lr": 2e-4, "epochs": 3})
    eager, _ = learn(settings, epochs=range(2))
    compiled, _ = learn(make_settings(source, optim={"lr": 2e-4, "epochs": 3}, run={"compile": True}))
    assert not [record for record in caplog.records if record.name == "vlsm"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert largest_difference(weights_of(eager), weights_of(compiled)) < 1e-4


@pytest.mark.nightly
def test_without_a_compiler_the_model_goes_on_with_one_warning(source, monkeypatch, caplog):
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    settings = make_settings(source, optim={"lr": 2e-4})
    eager, expected = learn(settings)
    with caplog.at_level(logging.WARNING, "vlsm"):
        learner, scores = learn(make_settings(source, optim={"lr": 2e-4}, run={"compile": True}))
    (record,) = [record for record in caplog.records if record.name == "vlsm"]
    assert record.getMessage().startswith("CLIPSeg is not compiled: ")
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-5)
    assert largest_difference(weights_of(eager), weights_of(learner)) < 1e-4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n79 GiB."), "GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "machine"),
        (MemoryError(), "machine"),
    ],
    ids=str,
)
def test_too_little_memory_is_one_sentence_with_the_settings_to_lower(source, error, kind):
    settings = make_settings(source, trainable="all", run={"micro_batch_size": 4})
    learner, _ = learn(settings, epochs=[])

    def fail(module, inputs, output):
        raise error

    learner.model.register_forward_hook(fail)
    with pytest.raises(type(error)) as caught:
        learn(settings, learner=learner)
    message = explain_out_of_memory(caught.value, settings)
    assert message.startswith(f"the {kind} has too little memory (") and "\n" not in message
    assert "run.micro_batch_size (now 4;" in message and "run.fsdp=true" in message
    assert ("optim.precision=bf16" in message) == (kind == "GPU")
    assert explain_out_of_memory(RuntimeError("connection reset by peer"), settings) is None
