import pytest

from vlsm.models import MODELS
from vlsm.models.__main__ import main
from vlsm.models.costs import measure_cost, measure_costs


@pytest.fixture(scope="module")
def costs():
    """Of all models at their published sizes, which takes 25 s; only `.ci/nightly` needs it."""
    return {cost.name: cost for cost in measure_costs()}


def test_the_costs_of_the_first_models_are_the_published_ones():
    cnn, vlsm = measure_cost("unet_d"), measure_cost("clipseg")
    assert cnn.num_parameters == 11_833_593 and cnn.image_gflop == pytest.approx(108, abs=0.5)
    assert cnn.num_trainable["lora"] is None and cnn.prompt_gflop == 0
    # published with 12 blocks: 92; the taps need 10 of them
    assert vlsm.image_gflop - vlsm.prompt_gflop == pytest.approx(92 * 10 / 12, abs=1)
    assert vlsm.num_trainable["decoder"] == 1_127_009 and vlsm.prompt_gflop > 0


@pytest.mark.parametrize("name", ["openclip_seg", "transformers_seg", "cris", "sam3", "stack"])
def test_costs_of_every_kind_of_model_are_counted(name):
    cost = measure_cost(name)
    assert 0 < cost.num_trainable["decoder"] < cost.num_parameters and 0 < cost.prompt_gflop < cost.image_gflop


@pytest.mark.nightly
def test_parameters_and_operations_are_the_published_ones(costs):
    assert set(costs) == set(MODELS)
    assert costs["unet_d"].num_parameters == 11_833_593
    assert costs["unet_d"].image_gflop == pytest.approx(108, abs=0.5)
    assert [round(costs[name].image_gflop) for name in ("unet", "unetplusplus", "deeplabv3plus")] == [40, 217, 35]
    # published with 12 blocks: 92 and 35; the taps need 10 and 11 of them
    assert costs["clipseg"].image_gflop - costs["clipseg"].prompt_gflop == pytest.approx(92 * 10 / 12, abs=1)
    assert costs["biomedclipseg"].image_gflop - costs["biomedclipseg"].prompt_gflop == pytest.approx(
        35 * 11 / 12, abs=1
    )
    assert costs["biomedclipseg"].num_trainable["decoder"] == 1_127_009
    blocks = 10
    low_rank, magnitudes = blocks * 4 * 8 * (768 + 768), blocks * 4 * 768
    small_layers = blocks * 2 * (2 * 768 * 64 + 64 + 768)
    more = {"decoder": 0, "lora": low_rank, "dora": low_rank + magnitudes, "adapters": small_layers}
    assert costs["clipseg"].num_trainable == {trainable: 1_127_009 + number for trainable, number in more.items()}


@pytest.mark.nightly
def test_what_cannot_learn_is_not_counted(costs):
    assert [costs["unet_d"].num_trainable[name] for name in ("lora", "dora", "adapters")] == [None] * 3
    assert costs["cris"].num_trainable["adapters"] is costs["openclip_seg"].num_trainable["dora"] is None
    assert costs["cris"].num_trainable["lora"] > costs["cris"].num_trainable["decoder"]


@pytest.mark.nightly
def test_a_further_prompt_costs_only_what_it_changes(costs):
    for name, cost in costs.items():
        sees_text = name not in ("unet_d", "unet", "unetplusplus", "deeplabv3plus", "pixel")
        assert (cost.prompt_gflop > 0) == sees_text
    assert costs["vlsm_a"].prompt_gflop < costs["vlsm_a"].image_gflop / 3
    assert costs["biomedclipseg"].prompt_gflop < costs["biomedclipseg"].image_gflop / 50


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["sam3", "cris", "transformers_seg"])
def test_options_that_add_a_cnn_add_its_costs(costs, name):
    plain, both = costs[name], measure_cost(name, {"unet": True})
    alone = measure_cost("unet_d", {"image_size": plain.image_size})
    learning = both.num_trainable["decoder"] - plain.num_trainable["decoder"]
    assert learning == both.num_parameters - plain.num_parameters
    assert both.num_parameters - plain.num_parameters > alone.num_parameters
    # the CNN's, its map's, and in its bottleneck the map's
    assert alone.image_gflop < both.image_gflop - plain.image_gflop < 1.5 * alone.image_gflop
    assert alone.image_gflop / 4 < both.prompt_gflop - plain.prompt_gflop < 0.8 * alone.image_gflop


@pytest.mark.nightly
def test_presence_costs_a_decoder_for_each_prompt(costs):
    plain, both = costs["sam3"], measure_cost("sam3", {"presence": True})
    assert both.num_trainable == plain.num_trainable and both.num_parameters > plain.num_parameters
    added = both.prompt_gflop - plain.prompt_gflop
    assert both.image_gflop - plain.image_gflop == pytest.approx(added) and 0 < added < plain.prompt_gflop


@pytest.mark.parametrize("name", MODELS)
def test_the_options_of_a_model_are_printed(name, capsys):
    assert main([name]) == 0
    assert "image_size=" in capsys.readouterr().out


@pytest.mark.nightly
def test_the_table_is_printed(costs, monkeypatch, capsys):
    monkeypatch.setattr("vlsm.models.costs.measure_costs", lambda: list(costs.values()))
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(MODELS)
    assert "hf-hub:microsoft/BiomedCLIP" in lines[2]
