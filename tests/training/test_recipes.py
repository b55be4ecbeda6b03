"""The values of the recipes in jobs/configs: those of the papers as their public code has them, and the strong ones."""

from pathlib import Path

import pytest

from vlsm.config import load_settings
from vlsm.models import MODELS, parse_options
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


@pytest.mark.parametrize("path", [*FOLDER.glob("*.yaml"), *FOLDER.glob("strong/*.yaml")], ids=lambda path: path.stem)
def test_batch_norms_see_the_whole_batch(path):
    settings, options = load(path.relative_to(FOLDER).with_suffix(""))
    if settings.model in WITH_BATCH_NORMS or getattr(options, "unet", False):
        assert settings.run.micro_batch_size == settings.optim.batch_size


def test_every_family_has_a_strong_recipe():
    recipes = {path.stem: load(f"strong/{path.stem}")[0] for path in FOLDER.glob("strong/*.yaml")}
    models = {settings.model for settings in recipes.values()}
    assert models == set(MODELS) - {"biomedclipseg", "unetplusplus", "deeplabv3plus", "pixel", "stack"}
    for settings in recipes.values():
        optim = settings.optim
        assert values(optim, "optimizer", "schedule", "ema_decay", "decay_all") == ("adamw", "cosine", 0.999, False)
        assert optim.val_flip and optim.warmup_epochs > 0 and not settings.data.augment.is_off
        assert (optim.layer_decay < 1) == (settings.trainable == "all")
