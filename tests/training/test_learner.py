"""What a Learner promises: the same learning however it is cut into processes, micro-batches and interruptions."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, save

import vlsm
from tests.conftest import rare
from tests.tiny import save_tiny_clipseg, save_tiny_sam3, save_tiny_siglip, tiny_options
from tests.training.test_sampling import make_records
from vlsm.errors import VlsmError
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import History, Row, read_history
from vlsm.training.learner import Learner, NotFiniteError
from vlsm.training.sampling import ExampleOrder
from vlsm.training.settings import TrainSettings
from vlsm.training.state import State, pack_state, read_state

RECORDS = make_records(train_a=10, val_a=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_sam3(folder / "sam3")
    save_tiny_siglip(folder / "siglip")
    return save_tiny_clipseg(folder / "clipseg").parent


def make_settings(source, model="clipseg", **changes):
    """Group norms would be the same in every cut; batch norms are not, so models without them are compared."""
    options, model = tiny_options(source)[model], model.partition("+")[0]
    tree = {"output": "out", "datasets": {"a": "a"}, "model": model, "options": options}
    optim = {"epochs": 2, "batch_size": 5, "lr": 1e-2} | changes.pop("optim", {})
    return TrainSettings.model_validate(tree | {"optim": optim} | changes)


def build(settings):
    torch.manual_seed(0)
    model = vlsm.build_model(settings.model, **settings.options)
    return model.set_trainable(settings.trainable, settings.lora_rank, settings.adapt, settings.adapter_width).train()


def draw(batch):
    """An image and a mask per example, always the same ones."""
    images, masks = [], []
    for example in batch.examples:
        rng = np.random.default_rng(example)
        images.append(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        masks.append((images[-1][..., 0] > 128).astype(np.uint8))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def learn(settings, rank=0, num_workers=1, epochs=range(2), learner=None, history=None, **options):
    order = ExampleOrder(RECORDS, settings, rank, num_workers)
    learner = learner or Learner(build(settings), settings, order.num_steps, CPU, **options)
    scores = []
    for epoch in epochs:
        for batch in order.train(epoch):
            scores += learner.train(batch, *draw(batch), history or History())
    return learner, scores


def weights_of(learner):
    return {name: value for name, value in learner.state()[0].items() if value.is_floating_point()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_micro_batches_change_nothing(source):
    whole, scores = learn(make_settings(source, run={"micro_batch_size": 8}))
    pieces, others = learn(make_settings(source, run={"micro_batch_size": 2}))
    assert largest_difference(weights_of(whole), weights_of(pieces)) < 1e-4
    assert np.allclose([score.loss for score in scores], [score.loss for score in others], atol=1e-4)
    assert len(scores) == 20


def _learn_in_parallel(rank, folder, tree):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    settings = TrainSettings.model_validate(json.loads(tree))
    learner, _ = learn(settings, rank, 2)
    weights = weights_of(learner)
    again = Learner(build(settings), settings, 2, CPU)
    states = [learner.state()]
    torch.distributed.broadcast_object_list(states, src=0)
    again.restore(*states[0])
    _, scores = learn(settings, rank, 2, epochs=[1], learner=again)
    _, expected = learn(settings, rank, 2, epochs=[1], learner=learner)
    assert [score.example for score in scores] == [score.example for score in expected]
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-4)
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "trainable", "fsdp"),
    [
        ("clipseg", "all", False),
        ("clipseg", "all", True),
        rare("sam3+presence", "all", False),
        rare("sam3", "all", True),
        rare("transformers_seg", "lora", False),
    ],
)
def test_two_processes_learn_what_one_learns_and_go_on_from_its_state(source, tmp_path, model, trainable, fsdp):
    """Five examples a step do not divide by two."""
    # Adam makes steps of one size out of gradients that are float noise, so small steps are compared
    optim = {"lr": 2e-4}
    run = {"micro_batch_size": 1, "fsdp": fsdp}
    settings = make_settings(source, model, trainable=trainable, optim=optim, run=run)
    alone, _ = learn(settings)
    arguments = (str(tmp_path), settings.model_dump_json())
    # one process imports the libraries, from which all others are forked
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(_learn_in_parallel, arguments, nprocs=2, start_method="forkserver")
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert largest_difference(weights_of(alone), together) < 2e-4


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("clipseg", {}),
        ("clipseg", {"trainable": "dora", "adapt": "both"}),
        ("clipseg", {"trainable": "adapters", "adapt": "both"}),
        ("unet_d", {}),
        ("unet", {}),
    ],
)
def test_a_learner_goes_on_from_its_state_as_if_nothing_had_been(source, model, changes):
    settings = make_settings(source, model, **changes)
    undisturbed, expected = learn(settings)
    first, _ = learn(settings, epochs=[0])
    weights, optimizer = first.state()
    again = Learner(build(settings), settings, 2, CPU)
    again.restore(
        weights,
        json.loads(json.dumps({key: optimizer[key] for key in optimizer if key != "state"}))
        | {"state": optimizer["state"]},
    )
    again, scores = learn(settings, epochs=[1], learner=again)
    assert scores == expected[10:]
    assert largest_difference(weights_of(undisturbed), weights_of(again)) == 0


def test_dropout_follows_from_the_seed(source):
    (one, first), (_, second) = learn(make_settings(source, "unet_d")), learn(make_settings(source, "unet_d"))
    assert first == second
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in one.model.modules())
    assert learn(make_settings(source, "unet_d", seed=1))[1] != first


def test_frozen_towers_stay_and_learning_towers_have_their_own_rate(source):
    for trainable in ("decoder", "all"):
        settings = make_settings(source, trainable=trainable, optim={"tower_lr": 1e-5, "lr": 1e-3})
        before = build(settings).state_dict()
        learner, _ = learn(settings)
        after = learner.model.state_dict()
        towers = [name for name in before if name.startswith("towers.") and before[name].is_floating_point()]
        moved = max((after[name] - before[name]).abs().max().item() for name in towers)
        decoder = max((after[n] - before[n]).abs().max().item() for n in before if n.startswith("decoder."))
        assert (moved == 0) if trainable == "decoder" else (0 < moved < 1e-4)
        assert decoder > 1e-3


@pytest.mark.parametrize("trainable", ["lora", "dora", "adapters"])
def test_a_text_tower_that_learns_encodes_its_prompts_at_every_step(source, tmp_path, trainable):
    cache = FeatureCache(tmp_path / "features", max_bytes=1 << 30)
    settings = make_settings(source, trainable=trainable, adapt="text", run={"micro_batch_size": 5})
    model = build(settings)
    with torch.no_grad():
        (before,) = model.encode_prompts(["polyp"])
    calls, encode = [], model.encode_prompts
    model.encode_prompts = lambda prompts: calls.append(torch.is_grad_enabled()) or encode(prompts)
    learner = Learner(model, settings, 2, CPU, cache)
    assert learner.features is cache  # the image tower stays as it is
    learn(settings, learner=learner)
    assert calls == [True] * 4  # two epochs of two steps
    with torch.no_grad():
        (after,) = model.encode_prompts(["polyp"])
    assert (after - before).abs().max() > 1e-3
    frozen = [name for name, parameter in build(settings).named_parameters() if not parameter.requires_grad]
    expected, found = dict(build(settings).named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in frozen)


def test_kept_features_change_nothing(source, tmp_path):
    settings = make_settings(source, "vlsm_b", optim={"epochs": 3, "lr": 1e-3})  # see above
    plain, expected = learn(settings, epochs=range(3))
    calls = []
    cache = FeatureCache(tmp_path / "features", max_bytes=1 << 30)
    learner = Learner(build(settings), settings, 2, CPU, cache)
    encode = learner.model.encode_towers
    learner.model.encode_towers = lambda pixel_values: calls.append(len(pixel_values)) or encode(pixel_values)
    _, scores = learn(settings, epochs=range(3), learner=learner)
    assert sum(calls) == 10  # each example once in three epochs
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-5)
    assert largest_difference(weights_of(plain), weights_of(learner)) < 1e-4


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None, {"0": torch.zeros(3)}, {"a": torch.zeros(3)}])
def test_damaged_features_are_computed_again(source, tmp_path, content):
    settings = make_settings(source)
    _, expected = learn(settings)
    cache = FeatureCache(tmp_path, max_bytes=1 << 30)
    learn(settings, features=cache)
    path = tmp_path / "0.safetensors"
    intact = path.read_bytes()
    damaged = save(content) if isinstance(content, dict) else content
    path.write_bytes(intact[: len(intact) // 2] if damaged is None else damaged)
    _, scores = learn(settings, features=cache)
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-5)
    shapes = [{name: part.shape for name, part in load(data).items()} for data in (path.read_bytes(), intact)]
    assert shapes[0] == shapes[1]


def test_features_that_cannot_be_written_cost_nothing_but_time(source, tmp_path):
    settings = make_settings(source)
    _, expected = learn(settings)
    cache = FeatureCache(tmp_path / "features", max_bytes=1 << 30)
    (tmp_path / "features").rmdir()  # the first worker of the node has ended, and removed it
    _, scores = learn(settings, features=cache)
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-5)


def test_features_keep_to_their_bytes(source, tmp_path):
    settings = make_settings(source)
    num_bytes = 3 * 17 * 32 * 4  # of one example: three layers of 17 tokens
    _, expected = learn(settings)
    cache = FeatureCache(tmp_path / "features", max_bytes=4 * num_bytes + 2000)
    _, scores = learn(settings, features=cache)
    assert len(list((tmp_path / "features").iterdir())) == 4
    assert np.allclose([s.loss for s in scores], [s.loss for s in expected], atol=1e-5)


def test_features_are_left_out_where_they_change(source, tmp_path):
    cache = FeatureCache(tmp_path / "features", max_bytes=1 << 30)
    others = {"trainable": "lora"}, {"trainable": "adapters", "adapt": "both"}
    for changes in (*others, {"data": {"augment": {"flip": True}}}, {"data": {"tile_size": 32}}):
        settings = make_settings(source, **changes)
        assert Learner(build(settings), settings, 2, CPU, cache).features is None


def test_a_loss_that_is_no_number_stops_before_anything_is_learned_from_it(source):
    settings = make_settings(source, "unet_d")
    order = ExampleOrder(RECORDS, settings)
    learner, _ = learn(settings, epochs=[0])
    before = weights_of(learner)
    batch = next(order.train(1))
    with torch.no_grad():
        learner.model.network.head.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"the loss of example \d is nan at epoch 2, step 1") as caught:
        learner.train(batch, *draw(batch), History())
    assert isinstance(caught.value, VlsmError) and caught.value.example in batch.examples
    after = weights_of(learner)
    assert all(torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))


def make_history(dice):
    common = {"step": 0, "loss": 0.5, "num_examples": 1, "lr": 0.1, "seconds": 1.0, "finished_at": 0.0}
    return History([Row(epoch=n, split="val", dataset="mean", dice=d, **common) for n, d in enumerate(dice, start=1)])


@pytest.mark.parametrize(
    ("optim", "dice", "expected"),
    [
        ({"schedule": "constant"}, [], [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_epochs": 1}, [], [0.5, 1, 1, 1]),
        ({"schedule": "cosine"}, [], [(1 + np.cos(np.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75)]),
        ({"schedule": "cosine", "warmup_epochs": 1}, [], [0.5, 1, 1, 0.5]),
        ({"schedule": "constant", "warmup_epochs": 0.1}, [], [1, 1, 1, 1]),
        ({"schedule": "plateau", "plateau_patience": 1}, [0.5, 0.6, 0.6], [1, 1, 1, 1]),
        ({"schedule": "plateau", "plateau_patience": 1}, [0.6, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "plateau", "plateau_patience": 0}, [0.6, 0.5, 0.5], [0.01, 0.01, 0.01, 0.01]),
        # the loss of every epoch is the same, so it is on a plateau while Dice still rises
        ({"schedule": "plateau", "plateau_patience": 1, "plateau_monitor": "loss"}, [0.5, 0.6, 0.7], [0.1] * 4),
    ],
)
def test_learning_rates(source, optim, dice, expected):
    settings = make_settings(source, "unet_d", optim=optim)
    order = ExampleOrder(RECORDS, settings)
    learner = Learner(build(settings), settings, order.num_steps, CPU)
    rates = []
    for batch in [*order.train(0), *order.train(1)]:
        learner.train(batch, *draw(batch), make_history(dice))
        rates.append(learner.lr / settings.optim.lr)
    assert rates == pytest.approx(expected, abs=1e-9)


def test_synchronised_batch_norms_need_gpus(source):
    with pytest.raises(VlsmError, match="sync_batch_norm needs GPUs"):
        import unittest.mock

        with unittest.mock.patch("vlsm.training.parallel.world_size", return_value=2):
            settings = make_settings(source, "unet_d", optim={"sync_batch_norm": True})
            Learner(build(settings), settings, 2, CPU)


@pytest.mark.parametrize(
    ("dice", "min_delta", "stale"),
    [
        ([], 0, 0),
        ([0.5, 0.7, 0.7, float("nan")], 0, 2),
        ([0.5, 0.55, 0.6, 0.62], 0.08, 1),  # 0.6 is better than 0.5 by enough, 0.62 not better than 0.6
        ([0.5, 0.50009, 0.50018], 1e-4, 0),  # small steps add up, since each is compared with the last improvement
        ([0.5, 0.50009], 1e-4, 1),
    ],
)
def test_epochs_without_improvement(dice, min_delta, stale):
    assert make_history(dice).stale_epochs("dice", min_delta) == stale


@pytest.mark.parametrize(("monitor", "best"), [("dice", 2), ("loss", 2)])
def test_the_best_epoch(monitor, best):
    history = make_history([0.5, 0.7, 0.7, float("nan")])
    assert history.best_epoch(monitor) == best
    assert History().best_epoch(monitor) == 0


@pytest.mark.parametrize(
    ("dice", "losses", "best"),
    [
        ([0.0, 0.0, 0.0], [0.9, 0.7, 0.8], {"dice": 2, "loss": 2}),
        ([0.5, 0.5], [0.7, 0.7], {"dice": 1, "loss": 1}),
        ([0.5, 0.4, 0.5], [0.7, 0.1, float("nan")], {"dice": 1, "loss": 2}),
        ([0.5, 0.6, 0.6], [float("inf")] * 3, {"dice": 2, "loss": 2}),
        ([0.5, 0.6], [0.3, 0.3], {"dice": 2, "loss": 2}),
    ],
)
def test_of_equal_epochs_the_one_that_is_better_by_the_other_metric_is_the_best(dice, losses, best, tmp_path):
    rows = [replace(row, loss=loss) for row, loss in zip(make_history(dice).rows, losses, strict=True)]
    history = History(rows)
    assert {monitor: history.best_epoch(monitor) for monitor in best} == best
    # a run of an earlier version kept the first one, and its checkpoint is that of this epoch
    assert History(rows, "first").best_epoch("dice") == 1 + int(np.nanargmax(dice))
    # early stopping and resuming: the choice is the same from both files, and epoch by epoch
    running = [History(rows[:number]).best_epoch("dice") for number in range(1, len(rows) + 1)]
    assert [number for number, epoch in enumerate(running, 1) if epoch == number][-1] == best["dice"]
    assert history.stale_epochs("dice", 0) == History(rows, "first").stale_epochs("dice", 0)


@pytest.mark.parametrize("ties", ["other", "first"])
def test_a_resumed_run_breaks_ties_as_it_began(ties, tmp_path):
    history = History(make_history([0.5, 0.5]).rows, ties)
    (tmp_path / "last.safetensors").write_bytes(pack_state(State(history=history, optimizer={})))
    assert read_state(str(tmp_path)).history == history
    pq.write_table(history.table(), tmp_path / "metrics.parquet")
    assert read_history(str(tmp_path)) == history
    pq.write_table(history.table().replace_schema_metadata({}), tmp_path / "metrics.parquet")
    assert read_history(str(tmp_path)).ties == "first"  # of an earlier version
