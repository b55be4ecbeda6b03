"""A matrix of trainings: which trials there are, with which settings, and the table of what they gave."""

import csv
import io
import random
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from tests.conftest import save_square
from vlsm.datasets.inspection import Facts
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import CheckpointError, ConfigError
from vlsm.evaluation.folds import write_lists
from vlsm.evaluation.sweep import (
    SweepSettings,
    choose_next,
    list_uri,
    plan_trial_groups,
    read_models,
    tabulate,
    write_csv,
    write_markdown,
)
from vlsm.evaluation.sweep_checks import check_sweep
from vlsm.evaluation.sweep_scores import average_scores
from vlsm.runs.record import describe_differences, make_record
from vlsm.training.settings import DataSettings

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


def test_the_resources_of_a_sweep_and_of_its_jobs_may_change_when_it_goes_on():
    models = {"run": {"model": "pixel"}}  # a name as any other
    record = make_record(make_settings(models=models), {}, {"trials": 4})
    changed = {"models": {"run": {"model": "pixel", "run": {"cpus_per_worker": 0.5}}}, "run": {"parallel": 3}}
    changed |= {"train": {"run": {"workers": 2}}, "evaluate": {"run": {"actors": 2}}}
    assert describe_differences(record, make_settings(**changed), {}) == []
    other = make_settings(models={"run": {"model": "unet_d"}}, datasets={"a": "data/a", "run": "data/b"})
    differences = " ".join(describe_differences(record, other, {}))
    assert "models.run.model" in differences and "datasets.run" in differences


def test_pooled_models_learn_all_datasets_and_are_scored_on_each():
    settings = make_settings(pooled=True, external={"c": "data/c"})
    (group,) = plan_trial_groups(settings)
    assert all(list(trial.settings.datasets) == ["a", "b"] for trial in group.trials)
    assert list(group.settings.datasets) == ["a", "b", "c"]


def test_each_fold_is_trained_and_scored_with_its_own_list():
    groups = plan_trial_groups(make_settings(folds=3, seeds=[0, 1], external={"c": "data/c"}))
    assert len(groups) == 6 and len({trial.settings.output for group in groups for trial in group.trials}) == 24
    second = groups[1]
    assert [(trial.fold, trial.seed) for trial in second.trials] == [(2, 0), (2, 1), (2, 0), (2, 1)]
    assert second.trials[0].name == "small on a, p1, fold 2, seed 0"
    for trial in second.trials:
        assert trial.settings.datasets == {"a": "out/folds/fold-2-of-3/a.parquet"}
        assert trial.settings.output.endswith(f"/a/p1/fold-2-of-3/seed-{trial.seed}")
    assert second.settings.output == "out/evaluations/a/p1/fold-2-of-3"
    lists = {"a": "folds/fold-2-of-3/a.parquet", "c": "folds/fold-2-of-3/c.parquet"}
    assert {name: uri.rpartition("out/")[2] for name, uri in second.settings.datasets.items()} == lists


def make_stacks(members=("small", "large", "/other/checkpoint"), **options):
    stack = {"model": "stack", "options": {"members": list(members)}, "data": {"learn_from": "val"}}
    models = {"stack": stack, "small": {"model": "pixel"}, "large": {"model": "unet_d"}}
    return make_settings(models=models, **options)


def test_the_members_of_a_stack_are_other_trials_of_the_sweep():
    groups = plan_trial_groups(make_stacks(seeds=[0, 1], folds=2))
    stacks = [trial for group in groups for trial in group.trials if trial.model == "stack"]
    assert len(stacks) == 8
    for trial in stacks:
        needed = [trial.settings.output.replace("trials/stack/", f"trials/{name}/") for name in ("small", "large")]
        assert list(trial.needs) == needed
        checkpoints = [str(Path(output).absolute() / "checkpoint") for output in needed]
        assert trial.settings.options["members"] == [*checkpoints, "/other/checkpoint"]
        assert trial.settings.data.learn_from == "val"
    assert not any(trial.needs for group in groups for trial in group.trials if trial.model != "stack")
    with pytest.raises(ConfigError, match="models: stack: a member of the stack is a stack itself"):
        plan_trial_groups(make_stacks(("small", "stack")))


def test_a_stack_starts_after_its_members():
    (group,) = plan_trial_groups(make_stacks(pooled=True))
    stack, small, large = group.trials
    assert choose_next([stack, small, large], []) == small
    assert choose_next([stack, large], [small.settings.output]) == large
    assert choose_next([stack], [large.settings.output]) is None
    assert choose_next([stack], []) == stack
    assert choose_next([], []) is None


def test_a_dry_run_does_not_look_for_members_that_the_sweep_will_train(tmp_path):
    datasets = {"a": write_pairs(tmp_path / "a")}
    data = {"split": {"val": 0.25, "test": 0.25}, "prompts": {"a": "polyp"}}
    settings = make_stacks(("small", "large"), datasets=datasets, train={"data": data})
    assert check_sweep(settings, plan_trial_groups(settings)) == ["dataset a: 4 without a split"]
    settings = make_stacks(("small", "larg"), datasets=datasets, train={"data": data})
    with pytest.raises(CheckpointError, match="there is no checkpoint at '.*/larg'"):
        check_sweep(settings, plan_trial_groups(settings))


def test_splits_that_are_made_are_the_same_for_all_models():
    (group,) = plan_trial_groups(make_settings(train={"data": {"split": {"val": 0.2}}}, pooled=True))
    for settings in (group.settings, *(trial.settings for trial in group.trials)):
        assert [uri.rpartition("out/")[2] for uri in settings.datasets.values()] == [
            "splits/a.parquet",
            "splits/b.parquet",
        ]
    other = {"model": "unet_d", "data": {"split": {"val": 0.1, "seed": 2}}}
    with pytest.raises(ConfigError, match="models: x: data.split differs from that of y"):
        plan_trial_groups(make_settings(models={"y": {"model": "unet_d"}, "x": other}))


def test_the_lists_of_a_sweep_hold_each_dataset_with_equal_tests_in_all_folds(tmp_path):
    sources = {}
    for name, size, split in (("a", 24, ""), ("b", 12, ""), ("c", 3, "")):
        sources[name] = str(tmp_path / f"{name}.csv")
        rows = "".join(f"{name}{number}.png,{number}.png,{split}\n" for number in range(size))
        Path(sources[name]).write_text(f"image_uri,mask_uri,split\n{rows}")

    def inspect(records):
        keys = [f"{record.dataset} {record.image_uri}" for record in records]
        hashes = [random.Random(key).getrandbits(64) for key in keys]
        return [Facts(None, 8, 8, key, key, 0.5, image_hash) for key, image_hash in zip(keys, hashes, strict=True)]

    settings = make_settings(
        output=str(tmp_path / "out"),
        datasets={name: sources[name] for name in "ab"},
        external={"c": sources["c"]},
        folds=3,
        train={"data": {"split": {"test": 0.25}}},
    )
    groups = plan_trial_groups(settings)
    lines = write_lists(settings, groups[0].trials[0].settings.data, inspect)
    assert lines[-1] == "fold 3 of 3: 18 train, 9 val, 12 test"
    for name, sizes in (("a", (6, 12, 6)), ("b", (3, 6, 3)), ("c", (0, 0, 3))):
        folds = [read_dataset(name, list_uri(settings, name, fold)) for fold in (1, 2, 3)]
        parts = [
            [{r.image_uri for r in fold if r.split == split} for split in ("val", "train", "test")] for fold in folds
        ]
        assert all(abs(len(part) - size) <= 1 for fold in parts for part, size in zip(fold, sizes, strict=True))
        assert parts[0][2] == parts[1][2] == parts[2][2] and not parts[0][0] & parts[1][0]
    plain = settings.model_copy(update={"train": {}})
    with pytest.raises(ConfigError, match="dataset a has no test records to score; --set train.data.split.test=0.1"):
        write_lists(plain, plan_trial_groups(plain)[0].trials[0].settings.data, inspect)
    on_val = plain.model_copy(update={"evaluate": {"split": "val"}, "external": {}})
    assert write_lists(on_val, DataSettings(), inspect)[-1] == "fold 3 of 3: 24 train, 12 val, 0 test"


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
            "num_failed": 0,
            "seed": position,
            "fold": None,
        }
        for dataset, kind, model, dices in (
            ("a", "honest", "small", (0.5, 0.6)),
            ("a", "honest", "large", (0.7, 0.9)),
            ("c", "honest", "small", (0.4, 0.4)),
            ("c", "honest", "large", (0.3, 0.1)),
            ("a", "upper_bound", "small", (0.95, 0.95)),
        )
        for position, dice in enumerate(dices)
    ]
    settings = make_settings(seeds=[0, 1])
    folds = settings.model_copy(update={"folds": 2, "seeds": (0,)})  # the same figures, from folds
    (row, *_) = tabulate([row | {"seed": 0, "fold": row["seed"] + 1} for row in rows], folds)
    assert (row["num_folds"], row["num_seeds"], round(row["mean"], 6)) == (2, 1, 0.55)
    assert "mean and standard deviation over 2 folds with 1 seed, " in write_markdown([row], folds)
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


def test_a_trial_without_any_score_stays_in_the_table():
    """Of two models with two seeds, one trial has no score at all and one has a failed score."""
    (group, _) = plan_trial_groups(make_settings(seeds=[0, 1], prompts=["p1"]))
    scores = {
        "small, seed 0": [0.5, 0.7],
        "small, seed 1": [0.4, None],
        "large, seed 0": [None, None],
        "large, seed 1": [None, None],
    }
    table = pa.Table.from_pylist(
        [
            {"system": system, "dataset": "a", "prompt_name": "p1", "prompt_class": "honest"}
            | {"status": "failed" if dice is None else "ok", "dice": dice}
            for system, values in scores.items()
            for dice in values
        ]
    )
    results = average_scores(table, group.trials)
    assert [(row["model"], row["dice"], row["num_failed"]) for row in results] == [
        ("small", pytest.approx(0.6), 0),
        ("small", 0.4, 1),
        ("large", None, 2),
        ("large", None, 2),
    ]
    settings = make_settings(seeds=[0, 1])
    rows = tabulate(results, settings)
    assert [(row["num_seeds"], row["mean"], row["num_failed"]) for row in rows] == [(2, 0.5, 1), (0, None, 4)]
    markdown = write_markdown(rows, settings)
    assert "| small | **50.0 ± 14.1** [1] |" in markdown and "| large | none [4] |" in markdown
    assert "Failed scores are in no mean" in markdown
    assert list(csv.DictReader(io.StringIO(write_csv(rows))))[1]["mean"] == ""


def test_the_evaluation_reads_the_datasets_as_the_trainings_do():
    data = {"mask_threshold": 0, "slices": "coronal", "prompt": "p0", "augment": {"flip": True}}
    settings = make_settings(train={"data": data}, evaluate={"limit": 3})
    for group in plan_trial_groups(settings):
        expected = DatasetSettings(mask_threshold=0, slices="coronal")
        assert group.settings.data.model_dump() == expected.model_dump()
        assert group.settings.limit == 3
    same = make_settings(train={"data": data}, evaluate={"data": {"mask_threshold": 0}})
    assert plan_trial_groups(same)[0].settings.data.slices == "coronal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": {"data": {"mask_threshold": 1}}}, "is 0 in models: small and 1 in evaluate"),
        ({"evaluate": {"mask_threshold": 1}}, "is 0 in models: small and 1 in evaluate"),
        (
            {"models": {"x": {"model": "unet_d"}, "y": {"model": "unet_d", "data": {"mask_threshold": 9}}}},
            "is 0 in models: x and 9 in models: y",
        ),
    ],
)
def test_a_sweep_reads_its_datasets_in_one_way(options, message):
    with pytest.raises(ConfigError, match=f"data.mask_threshold {message}; .*set train.data.mask_threshold only"):
        plan_trial_groups(make_settings(train={"data": {"mask_threshold": 0}}, **options))


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


def write_pairs(folder, number=4):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for name in range(number):
            save_square(folder / kind / f"{name}.png")
    return str(folder)


def check(**options):
    settings = make_settings(**options)
    return check_sweep(settings, plan_trial_groups(settings))


def test_a_dry_run_finds_missing_folders_splits_prompts_and_options(tmp_path):
    datasets = {name: write_pairs(tmp_path / name) for name in "ab"}
    with pytest.raises(ConfigError, match="dataset a"):
        check(datasets={"a": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError) as error:
        check(datasets=datasets, pooled=True)
    words = "--set train.data.split.val=0.1 --set train.data.split.test=0.1 --set train.data.prompts.a=WORDS"
    assert words in str(error.value) and "--set train.data.prompts.b=WORDS" in str(error.value)
    data = {"split": {"val": 0.25, "test": 0.25}, "prompts": {"a": "polyp", "b": "lesion"}}
    assert check(datasets=datasets, train={"data": data}) == [
        "dataset a: 4 without a split",
        "dataset b: 4 without a split",
    ]
    assert check(datasets=datasets, train={"data": {"prompts": data["prompts"]}}, folds=2)
    with pytest.raises(ConfigError, match="data.prompts names c, but there is no such dataset; .*a, b"):
        check(datasets=datasets, train={"data": data | {"prompts": {"c": "x"}}})
    with pytest.raises(CheckpointError, match="image_sze"):
        check(datasets=datasets, train={"data": data}, models={"x": {"model": "unet_d", "options": {"image_sze": 8}}})


def test_a_single_seed_is_one_seed():
    assert "over 1 seed, and" in write_markdown([], make_settings())
    assert "over 2 seeds, and" in write_markdown([], make_settings(seeds=[0, 1]))
