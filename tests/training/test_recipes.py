"""The values of the recipes in jobs/configs: those of the papers as their public code has them, and the strong ones."""

from pathlib import Path

import pytest
import yaml

import vlsm
from tests.tiny import save_tiny_sources, tiny_options
from vlsm.config import load_settings
from vlsm.evaluation.sweep import read_models
from vlsm.models import MODELS, parse_options
from vlsm.training.groups import build_optimizer
from vlsm.training.settings import TrainSettings

FOLDER = Path(__file__).parents[2] / "jobs" / "configs"
VLSMS = ["clipseg", "biomedclipseg", "biomedclipseg_d", "cris", "vlsm_a", "vlsm_b", "vlsm_c"]
CNNS = ["unet", "unetplusplus", "deeplabv3plus"]
WITH_BATCH_NORMS = {"cris", "vlsm_a", "vlsm_b", "vlsm_c", "unet_d", *CNNS}


def load(name):
    settings = load_settings(TrainSettings, str(FOLDER / f"{name}.yaml"), [], {"output": "out", "datasets": {"a": "a"}})
    return settings, parse_options(settings.model, settings.options)


def values(group, *names):
    return tuple(getattr(group, name) for name in names)


@pytest.mark.parametrize("name", [*VLSMS, *CNNS])
def test_the_best_epoch_of_medvlsm_has_the_best_dice(name):
    """One metric stops the run, another lowers the rate."""
    optim = load(name)[0].optim
    assert values(optim, "monitor", "early_stop", "min_delta", "min_epochs", "epochs") == ("dice", 20, 1e-4, 10, 1000)
    assert values(optim, "dice_weight", "ce_weight", "clip_norm", "precision") == (1, 0, 0.5, "fp16")


@pytest.mark.parametrize(
    ("name", "lr", "batch_size"), [*((name, 2e-3, 128) for name in VLSMS if name != "cris"), ("cris", 2e-5, 32)]
)
def test_the_optimiser_of_the_vlsms(name, lr, batch_size):
    settings, _ = load(name)
    optim = settings.optim
    assert values(optim, "optimizer", "lr", "batch_size") == ("adamw", lr, batch_size)
    assert values(optim, "weight_decay", "decay_all") == (1e-3, True)
    plateau = values(optim, "schedule", "plateau_monitor", "plateau_factor", "plateau_patience")
    assert plateau == ("plateau", "loss", 0.1, 5)
    assert settings.data.prompt == "random"
    assert settings.trainable == ("all" if name == "cris" else "decoder")


@pytest.mark.parametrize("name", CNNS)
def test_the_optimiser_of_the_cnns(name):
    settings, options = load(name)
    assert values(settings.optim, "optimizer", "lr", "weight_decay", "schedule") == ("adam", 1e-3, 0, "constant")
    assert values(options, "image_size", "encoder", "encoder_weights") == (256, "resnet50", "imagenet")
    assert settings.optim.batch_size == 16


def test_the_training_of_unet_d():
    settings, options = load("unet_d")
    optim = settings.optim
    assert values(optim, "lr", "batch_size", "clip_norm", "schedule") == (1e-5, 10, 1.0, "constant")
    assert values(optim, "dice_weight", "ce_weight", "val_loss", "monitor") == (1, 1, "ce", "loss")
    assert values(optim, "early_stop", "min_delta", "min_epochs") == (20, 0, 1)
    assert values(optim, "optimizer", "weight_decay", "decay_all") == ("adamw", 1e-3, True)
    assert values(options, "image_size", "normalize") == (352, False)


def test_cris_is_enlarged_as_published():
    assert load("cris")[1].enlarge == "published"


@pytest.mark.parametrize("name", [*VLSMS, *CNNS, "unet_d"])
def test_papers_use_neither_augmentation_nor_averages(name):
    settings, options = load(name)
    assert settings.data.augment.is_off and settings.optim.ema_decay is None and not settings.optim.val_flip
    assert settings.optim.warmup_epochs == 0 and options.resize == "squeeze"
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert any("differs from the published training" in line for line in lines)  # each says what still differs


def every_training():
    """The trees of settings of all recipes, and of all models of the sweeps."""
    trees = {
        str(path.relative_to(FOLDER).with_suffix("")): yaml.safe_load(path.read_text())
        for path in sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("strong/*.yaml")])
    }
    for path in sorted(FOLDER.glob("sweeps/*.yaml")):
        sweep = yaml.safe_load(path.read_text())
        models = read_models(sweep["models"], str(path.parent))
        trees |= {f"sweeps/{path.stem} {name}": sweep.get("train", {}) | tree for name, tree in models.items()}
    return [pytest.param(tree, id=name) for name, tree in trees.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_options(save_tiny_sources(tmp_path_factory.mktemp("sources")))


@pytest.mark.parametrize("tree", every_training())
def test_batch_norms_see_the_whole_batch(tree):
    settings = TrainSettings.model_validate({"output": "out", "datasets": {"a": "a"}} | tree)
    options = parse_options(settings.model, settings.options)
    if settings.model in WITH_BATCH_NORMS or getattr(options, "unet", False):
        assert settings.run.micro_batch_size == settings.optim.batch_size


@pytest.mark.parametrize("tree", every_training())
def test_every_named_setting_builds_a_model_that_can_learn(tree, tiny):
    """With tiny weights in place of the published ones, which are on the hub."""
    settings = TrainSettings.model_validate({"output": "out", "datasets": {"a": "a"}} | tree)
    small = tiny[f"{settings.model}+unet" if settings.options.get("unet") else settings.model]
    others = {name: value for name, value in settings.options.items() if name in ("enlarge", "normalize", "resize")}
    model = vlsm.build_model(settings.model, settings.trainable, **small | others)
    model.set_trainable(settings.trainable, settings.lora_rank)
    groups = build_optimizer(model, settings.optim, is_fused=False).param_groups
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(learning) > 0
    assert any("lora" in name for name in learning) == (settings.trainable == "lora")
    if settings.trainable == "all" and settings.optim.tower_lr:
        assert len({group["lr"] for group in groups}) > 2  # towers by layer, and the rest


def test_the_newer_pretrained_models_have_recipes():
    recipes = {name: load(f"strong/{name}") for name in ("transformers", "siglip2", "tipsv2", "sam3", "sam3_lora")}
    sources = {name: options.source for name, (_, options) in recipes.items()}
    assert sources == {
        "transformers": "google/medsiglip-448",
        "siglip2": "google/siglip2-so400m-patch16-384",
        "tipsv2": "google/tipsv2-b14",
        "sam3": "facebook/sam3",
        "sam3_lora": "facebook/sam3",
    }
    assert all(options.unet for name, (_, options) in recipes.items() if not name.startswith("sam3"))
    sides = [recipes[name][1].image_size for name in ("sam3", "sam3_lora")]
    assert sides == [504, 504] and all(side % 14 == 0 for side in sides)  # SAM 3 and TIPSv2 have patches of 14 pixels
    side = recipes["tipsv2"][1].image_size
    assert side % 14 == side % 16 == 0  # UNet-D halves it four times
    assert [recipes[name][0].trainable for name in recipes] == ["all", "all", "all", "decoder", "lora"]


def test_the_models_of_the_newer_sweep_take_equal_steps():
    path = FOLDER / "sweeps" / "today.yaml"
    models = read_models(yaml.safe_load(path.read_text())["models"], str(path.parent))
    assert len(models) == 12
    steps = {
        (tree["optim"]["epochs"], tree["optim"]["batch_size"], tree["optim"].get("early_stop"))
        for tree in models.values()
    }
    assert steps == {(50, 16, None)}


def test_every_family_has_a_strong_recipe():
    recipes = {path.stem: load(f"strong/{path.stem}")[0] for path in FOLDER.glob("strong/*.yaml")}
    models = {settings.model for settings in recipes.values()}
    assert models == set(MODELS) - {"biomedclipseg", "unetplusplus", "deeplabv3plus", "pixel", "stack"}
    for settings in recipes.values():
        optim = settings.optim
        assert values(optim, "optimizer", "schedule", "ema_decay", "decay_all") == ("adamw", "cosine", 0.999, False)
        assert optim.val_flip and optim.warmup_epochs > 0 and not settings.data.augment.is_off
        assert (optim.layer_decay < 1) == (settings.trainable == "all")
