"""A matrix of trainings: which trials there are, with which settings, and the table of what they gave."""

import csv
import io
from pathlib import Path

import pytest
import yaml

from vlsm.errors import ConfigError
from vlsm.evaluation.sweep import SweepSettings, plan_trial_groups, read_models, tabulate, write_csv, write_markdown

ROOT = Path(__file__).parents[2]


def make_settings(**options):
    models = {"small": {"model": "pixel", "options": {"image_size": 16}}, "large": {"model": "unet_d"}}
    tree = {"output": "out", "datasets": {"a": "data/a", "b": "data/b"}, "models": models}
    return SweepSettings.model_validate(tree | options)


def test_every_model_is_trained_on_every_dataset_with_every_prompt_and_seed():
    settings = make_settings(prompts=["p0", "text:a b"], seeds=[0, 3], train={"optim": {"epochs": 7}})
    groups = plan_trial_groups(settings)
    trials = [trial for group in groups for trial in group.trials]
    assert len(groups) == 4 and len(trials) == 16
    assert len({trial.settings.output for trial in trials}) == 16
    for trial in trials:
        assert list(trial.settings.datasets) == [trial.dataset]
        assert (trial.settings.data.prompt, trial.settings.seed) == (trial.prompt, trial.seed)
        assert trial.settings.optim.epochs == 7
    assert trials[0].settings.options == {"image_size": 16}
    first = groups[0].settings
    assert list(first.systems) == ["small, seed 0", "small, seed 3", "large, seed 0", "large, seed 3"]
    assert first.systems["large, seed 3"][0].checkpoint == f"{trials[3].settings.output}/checkpoint"
    assert (first.prompts, list(first.datasets)) == (("p0",), ["a"])


def test_pooled_models_learn_all_datasets_and_are_scored_on_each():
    settings = make_settings(pooled=True, external={"c": "data/c"})
    (group,) = plan_trial_groups(settings)
    assert all(list(trial.settings.datasets) == ["a", "b"] for trial in group.trials)
    assert list(group.settings.datasets) == ["a", "b", "c"]


def test_a_models_own_settings_come_before_those_of_all_and_of_its_file(tmp_path):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": "unet_d", "optim": {"lr": 1, "epochs": 2}}))
    models = read_models({"m": {"config": "m.yaml", "optim": {"lr": 0.5}}}, str(tmp_path))
    (group, _) = plan_trial_groups(make_settings(models=models, train={"optim": {"epochs": 9, "batch_size": 3}}))
    optim = group.trials[0].settings.optim
    assert (optim.lr, optim.epochs, optim.batch_size) == (0.5, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "models: there are none"),
        ({"baseline": "medium"}, "baseline is medium; models are small, large"),
        ({"seeds": [1, 1]}, "seeds: 1 is repeated"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        make_settings(**options)


def test_wrong_settings_of_a_model_name_it(tmp_path):
    with pytest.raises(ConfigError, match=r"models: x: unknown model 'unet_e'"):
        plan_trial_groups(make_settings(models={"x": {"model": "unet_e"}}))
    with pytest.raises(ConfigError, match=r"models: x: .*lost\.yaml cannot be read"):
        read_models({"x": {"config": "lost.yaml"}}, str(tmp_path))


def test_the_table_has_means_over_seeds_and_the_best_in_bold():
    rows = [
        {
            "trained_on": "a",
            "dataset": dataset,
            "prompt": "p1",
            "prompt_class": kind,
            "model": model,
            "dice": dice,
        }
        for dataset, kind, model, dices in (
            ("a", "honest", "small", (0.5, 0.6)),
            ("a", "honest", "large", (0.7, 0.9)),
            ("c", "honest", "small", (0.4, 0.4)),
            ("c", "honest", "large", (0.3, 0.1)),
            ("a", "upper_bound", "small", (0.95, 0.95)),
        )
        for dice in dices
    ]
    settings = make_settings(seeds=[0, 1])
    table = tabulate(rows, settings)
    assert [(row["model"], round(row["mean"], 6), round(row["difference"], 6)) for row in table] == [
        ("small", 0.55, 0),
        ("large", 0.8, 0.25),
        ("small", 0.4, 0),
        ("large", 0.2, -0.2),
        ("small", 0.95, 0),
    ]
    assert table[1]["sd"] == pytest.approx(0.1 * 2**0.5)
    assert list(csv.DictReader(io.StringIO(write_csv(table))))[1]["model"] == "large"
    honest, bound = write_markdown(table, settings).split("## Upper bound")
    assert "| model | a, p1 | c, p1 (trained on a) |" in honest
    assert "| small | 55.0 ± 7.1 | **40.0 ± 0.0** |" in honest
    assert "| large | **80.0 ± 14.1** (+25.0) | 20.0 ± 14.1 (-20.0) |" in honest
    assert "| small | **95.0 ± 0.0** |" in bound


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_matrices_that_come_along_are_understood(path):
    tree = yaml.safe_load(path.read_text())
    models = read_models(tree["models"], str(path.parent))
    settings = make_settings(**tree | {"models": models})
    trials = [trial for group in plan_trial_groups(settings) for trial in group.trials]
    assert len(trials) == 2 * len(models) * len(settings.seeds)
    assert {trial.model for trial in trials} == set(models)
    assert all(trial.model.startswith(trial.settings.model) for trial in trials)
