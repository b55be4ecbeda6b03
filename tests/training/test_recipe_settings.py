"""What the settings of a recipe change in the learning: rates, decay, the average of the weights, flips."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import vlsm
from tests.conftest import each_model
from tests.tiny import save_tiny_clipseg, save_tiny_open_clip, save_tiny_sam3, save_tiny_sources, tiny_options
from tests.training.test_learner import CPU, RECORDS, build, draw, largest_difference, learn, make_settings, weights_of
from vlsm.training.groups import parameter_groups
from vlsm.training.history import History
from vlsm.training.learner import Learner
from vlsm.training.parallel import describe_batch_norms
from vlsm.training.sampling import ExampleOrder
from vlsm.training.settings import OptimSettings, TrainSettings
from vlsm.training.state import read_state

V0 = Path(__file__).parents[1] / "written" / "v0"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_clipseg(folder / "clipseg")
    save_tiny_open_clip(folder / "open_clip")
    return folder


@pytest.mark.parametrize("optim", [{}, {"warmup_epochs": 1}, {"optimizer": "adam", "schedule": "constant"}])
def test_a_training_of_one_step_learns(source, optim):
    settings = make_settings(source, "pixel", optim={"epochs": 1, "batch_size": 10} | optim)
    before = build(settings).state_dict()
    learner, scores = learn(settings, epochs=[0])
    assert len(scores) == 10
    assert all((before[name] != value).all() for name, value in weights_of(learner).items())


def name_groups(model, **optim):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimSettings(**optim))
    return {names[id(p)]: (group["base_lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_norms_and_biases_do_not_decay_unless_asked():
    model = vlsm.build_model("unet_d", width=4, image_size=64)
    decay = {name: group[1] for name, group in name_groups(model, weight_decay=0.1).items()}
    assert decay.keys() == dict(model.named_parameters()).keys()
    assert decay["network.down.0.conv1.weight"] == decay["network.attention.conv.weight"] == 0.1
    assert decay["network.down.0.conv1.bias"] == decay["network.down.0.norm.weight"] == 0
    assert {group[1] for group in name_groups(model, weight_decay=0.1, decay_all=True).values()} == {0.1}


def test_rates_fall_from_block_to_block_towards_the_input(source):
    model = vlsm.build_model("clipseg", "all", **tiny_options(source)["clipseg"])
    rates = {n: group[0] for n, group in name_groups(model, lr=1, tower_lr=0.5, layer_decay=0.5).items()}
    vision, text = "towers.clip.vision_model.", "towers.clip.text_model."
    assert rates["decoder.film_mul.weight"] == 1
    assert [rates[f"{vision}encoder.layers.{n}.mlp.fc1.weight"] for n in range(4)] == [1 / 32, 1 / 16, 1 / 8, 1 / 4]
    assert rates[f"{vision}pre_layrnorm.weight"] == rates[f"{vision}embeddings.class_embedding"] == 1 / 64
    assert [rates[f"{text}encoder.layers.{n}.mlp.fc1.weight"] for n in (0, 4)] == [1 / 64, 1 / 4]
    assert rates[f"{text}final_layer_norm.weight"] == rates["towers.clip.text_projection.weight"] == 0.5
    other = vlsm.build_model("openclip_seg", "all", **tiny_options(source)["openclip_seg"])
    rates = {n: group[0] for n, group in name_groups(other, lr=1, layer_decay=0.5).items()}
    assert rates["towers.text.text_projection"] == 1 and rates["towers.text.token_embedding.weight"] == 1 / 8
    assert len({rate for name, rate in rates.items() if "visual" in name}) == 5  # four blocks and the stem


def order_of_calls(towers, run):
    """The modules with weights of their own in the order of their calls, each with the tower that it belongs to."""
    names, calls = {module: name for name, module in towers.named_modules()}, []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append(names[module]))
        for module in towers.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    "kind", each_model(["clipseg", "biomedclipseg", "openclip_seg", "transformers_seg", "sam3", "cris"])
)
@torch.no_grad()
def test_layers_before_the_first_block_have_the_lowest_rate_and_those_after_the_last_the_full_one(tmp_path, kind):
    """The order of the calls says which these are, in towers of every library."""
    model = vlsm.build_model(kind, "all", **tiny_options(save_tiny_sources(tmp_path))[kind]).eval()
    rates = {n: group[0] for n, group in name_groups(model, lr=1, layer_decay=0.5).items()}
    size = model.image_spec.size
    tokens = model.towers.tokenize(["polyp"])
    runs = lambda: model.encode_images(torch.zeros(1, 3, size, size)), lambda: model.towers.encode_tokens(tokens)
    for run in runs:
        calls = order_of_calls(model.towers, run)
        numbers = [number for number, call in enumerate(calls) if re.search(r"\.(res)?(blocks|layers?)\.?\d", call)]
        rates_of = {
            call: {rates[f"towers.{call}.{name}"] for name, _ in module.named_parameters(recurse=False)}
            for call in calls
            for module in [model.towers.get_submodule(call)]
        }
        lowest = min(min(own) for own in rates_of.values())
        for number, call in enumerate(calls):
            own = rates_of[call]
            if number < numbers[0]:
                assert own == {lowest}, call
            elif number > numbers[-1]:
                assert own == {1}, call
            else:
                assert own and max(own) < 1 and min(own) > lowest, call


def test_a_cnn_beside_towers_has_the_rate_of_the_decoder(source, tmp_path):
    save_tiny_sam3(tmp_path / "sam3")
    model = vlsm.build_model("sam3", "all", **tiny_options(tmp_path)["sam3+unet"])
    rates = {n: group[0] for n, group in name_groups(model, lr=1, tower_lr=0.5).items()}
    assert {rate for name, rate in rates.items() if name.startswith("fusion.")} == {1}
    assert {rate for name, rate in rates.items() if name.startswith("towers.")} == {0.5}


def test_a_state_of_an_earlier_version_goes_on_under_its_own_rules(source):
    """Its groups differ: it had one for all weights. Its rates were those of the next step, and biases decayed."""
    state = read_state(str(V0 / "interrupted"))
    assert len(state.optimizer["param_groups"]) == 1
    tree = {"weight_decay": 0.5, "schedule": "cosine", "epochs": 2, "lr": 0.1}
    settings = make_settings(source, "pixel", optim=tree)
    learner = Learner(build(settings), settings, 2, CPU)
    assert [group["weight_decay"] for group in learner.optimizer.param_groups] == [0.5, 0]
    learner.restore(dict(state.weights), state.optimizer)
    assert all(torch.equal(value, state.weights[name]) for name, value in weights_of(learner).items())
    saved = learner.state()[1]
    for name, moments in state.optimizer["state"].items():
        assert all(torch.equal(saved["state"][name][key], value) for key, value in moments.items())
    assert [group["weight_decay"] for group in learner.optimizer.param_groups] == [0.5, 0.5]
    (batch, *_) = ExampleOrder(RECORDS, settings).train(0)
    learner.train(batch, *draw(batch), History())
    assert learner.lr == pytest.approx(0.1 * 0.5 * (1 + 2**-0.5))  # cosine at step 1 of 4
    assert learner.state()[1]["rules"] == 1


def restart(learner, settings):
    """Another learner with the saved state, as text and tensors."""
    weights, optimizer = copy.deepcopy(learner.state())
    rest = json.loads(json.dumps({key: value for key, value in optimizer.items() if key != "state"}))
    again = Learner(build(settings), settings, 2, CPU)
    again.restore(weights, rest | {"state": optimizer["state"]})
    return again


def validate(learner):
    """Validate as a worker does, and return the losses."""
    (batch, *_) = ExampleOrder(RECORDS, learner.settings).evaluate("val", 0)
    learner.end_training()
    return [score.loss for score in learner.evaluate(batch, *draw(batch))]


@pytest.mark.parametrize("model", ["clipseg", "unet_d"])
def test_the_average_is_validated_and_goes_on_as_if_nothing_had_been(source, model):
    settings = make_settings(source, model, optim={"ema_decay": 0.9})
    learner, _ = learn(settings, epochs=[0])
    live = {name: value.clone() for name, value in learner.model.state_dict().items()}
    losses = validate(learner)
    averaged = {name: value.clone() for name, value in learner.model.state_dict().items()}
    changed = {name for name in live if not torch.equal(live[name], averaged[name])}
    assert changed == {name for name in learner.average.values if not name.startswith("towers.")}
    again = restart(learner, settings)  # saved after the validation, as at the end of an epoch
    assert all(torch.equal(value, live[name]) for name, value in again.model.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in learner.model.state_dict().items())
    for one in (learner, again):
        learn(settings, epochs=[1], learner=one)
    assert largest_difference(weights_of(learner), weights_of(again)) == 0
    assert validate(learner) == validate(again) != losses


def test_the_average_is_what_its_formula_says(source):
    settings = make_settings(source, "pixel", optim={"ema_decay": 0.15, "epochs": 1, "batch_size": 5})
    order = ExampleOrder(RECORDS, settings)
    learner = Learner(build(settings), settings, 2, CPU)
    expected = learner.model.network.bias.item()
    for decay, batch in zip((0.1, 0.15), order.train(0), strict=True):  # (1 + 0) / (10 + 0), then the largest
        learner.train(batch, *draw(batch), History())
        expected = decay * expected + (1 - decay) * learner.model.network.bias.item()
    learner.end_training()
    assert learner.model.network.bias.item() == pytest.approx(expected, abs=1e-6)


def test_the_average_of_sharded_weights_is_refused(source):
    tree = make_settings(source, trainable="all").model_dump()
    with pytest.raises(ValueError, match="optim.ema_decay does not work with run.fsdp=true"):
        TrainSettings.model_validate(tree | {"run": {"fsdp": True}, "optim": {"ema_decay": 0.9}})


def test_validation_may_measure_cross_entropy_alone_and_mirror_images(source):
    losses = {}
    for name, optim in (("ce", {"dice_weight": 0, "ce_weight": 1}), ("other", {"val_loss": "ce"}), ("sum", {})):
        settings = make_settings(source, "unet_d", optim=optim)
        losses[name] = validate(Learner(build(settings), settings, 2, CPU))
    assert losses["ce"] == losses["other"] != losses["sum"]
    settings = make_settings(source, "unet_d", optim={"val_flip": True})
    learner = Learner(build(settings), settings, 2, CPU)
    (batch, *_) = ExampleOrder(RECORDS, settings).evaluate("val", 0)
    images, masks = draw(batch)
    plain = learner.evaluate(batch, images, masks)
    assert [s.loss for s in plain] != pytest.approx(losses["sum"], abs=1e-6)
    mirrored = learner.evaluate(batch, images.flip(2), masks.flip(2))
    assert [s.loss for s in mirrored] == pytest.approx([s.loss for s in plain], abs=1e-5)


@pytest.mark.parametrize(
    ("model", "optim", "micro", "workers", "words"),
    [
        ("unet_d", {"batch_size": 8}, 8, 1, None),
        ("unet_d", {"batch_size": 16}, 8, 1, None),  # the defaults: statistics of eight examples are good ones
        ("unet_d", {"batch_size": 16}, 7, 1, "see 7 examples at a time, not the 16 of a batch"),
        ("clipseg", {"batch_size": 8}, 2, 1, None),  # layer norms
        (
            "unet_d",
            {"batch_size": 8},
            2,
            1,
            "see 2 examples at a time, not the 8 of a batch.*set run.micro_batch_size=8 if",
        ),
        (
            "unet_d",
            {"batch_size": 8},
            8,
            2,
            "see 4 examples.*workers .2. change the result; set optim.sync_batch_norm=true",
        ),
        ("unet_d", {"batch_size": 8}, 1, 2, "see 1 examples.*micro_batch_size=4 and optim.sync_batch_norm=true"),
        ("unet_d", {"batch_size": 8, "sync_batch_norm": True}, 4, 2, None),
        ("unet_d", {"batch_size": 8, "sync_batch_norm": True}, 2, 2, "see 4 examples.*set run.micro_batch_size=4 if"),
    ],
)
def test_batch_norms_that_see_less_than_the_batch_are_told(source, model, optim, micro, workers, words):
    settings = make_settings(source, model, optim=optim, run={"micro_batch_size": micro})
    warning = describe_batch_norms(build(settings), settings, workers)
    assert (warning is None) if words is None else re.search(words, warning)


def test_with_batch_norms_the_micro_batch_changes_the_result(source):
    """This is why the warning exists; test_micro_batches_change_nothing has the other models."""
    whole, _ = learn(make_settings(source, "unet_d", run={"micro_batch_size": 5}))
    pieces, _ = learn(make_settings(source, "unet_d", run={"micro_batch_size": 2}))
    assert largest_difference(weights_of(whole), weights_of(pieces)) > 1e-3
