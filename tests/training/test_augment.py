import numpy as np
import pytest

from vlsm.config import TileSettings
from vlsm.images.windows import plan_windows
from vlsm.training.augment import augment_example, draw_window
from vlsm.training.settings import AugmentSettings

IMAGE = np.full((48, 48, 3), 40, np.uint8)
IMAGE[8:20, 12:40] = 220
MASK = (IMAGE[..., 0] > 128).astype(np.uint8)


@pytest.mark.parametrize(
    "settings",
    [
        AugmentSettings(flip=True),
        AugmentSettings(rotate_degrees=45),
        AugmentSettings(scale=0.3),
        AugmentSettings(flip=True, rotate_degrees=90, scale=0.2, color=0.3),
        AugmentSettings(preset="strong"),
    ],
)
def test_the_mask_follows_the_image_and_stays_two_valued(settings):
    overlaps = []
    for seed in range(20):
        image, mask = augment_example(IMAGE, MASK, settings, seed)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((48, 48, 3), np.uint8, (48, 48), np.uint8)
        assert set(np.unique(mask)) <= {0, 1}
        bright = image.max(axis=2) > image.max() * 0.6
        overlaps.append((bright & (mask == 1)).sum() / (bright | (mask == 1)).sum())
    assert np.mean(overlaps) > 0.9


def test_equal_seeds_change_equally_and_others_differently():
    settings = AugmentSettings(flip=True, rotate_degrees=30, color=0.4)
    first, again, other = (augment_example(IMAGE, MASK, settings, seed) for seed in (1, 1, 2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


@pytest.mark.parametrize("change", [{"color": 0.5}, {"hue": 0.4}, {"blur": 1}, {"noise": 0.1}])
def test_changes_of_levels_leave_the_mask_alone(change):
    coloured = IMAGE.copy()
    coloured[..., 2] //= 2
    image, mask = augment_example(coloured, MASK, AugmentSettings(**change), 3)
    assert (mask == MASK).all() and (image != coloured).any()


def test_a_preset_gives_the_values_that_are_not_set():
    strong = AugmentSettings(preset="strong", blur=0, flip=False)
    assert (strong.flip, strong.blur, strong.rotate_degrees, strong.noise) == (False, 0, 45, 0.04)
    assert AugmentSettings(**strong.model_dump()) == strong  # as read from a record
    assert AugmentSettings(preset="none").is_off and not AugmentSettings(preset="light").is_off
    off = dict.fromkeys(["rotate_degrees", "scale", "color"], 0) | {"flip": False}
    assert AugmentSettings(preset="light", **off).is_off
    with pytest.raises(ValueError, match="preset"):
        AugmentSettings(preset="mild")


def test_windows_are_those_of_a_segmentation_and_a_third_hold_the_foreground():
    mask = np.zeros((90, 300), np.uint8)
    mask[70:74, 280:284] = 1
    windows = [draw_window(mask, 64, seed) for seed in range(300)]
    assert windows == [draw_window(mask, 64, seed) for seed in range(300)]
    (size,) = {(window.height, window.width) for window in plan_windows(mask.shape, TileSettings(size=64))}
    assert all(window.cut(mask).shape == (window.height, window.width) == size for window in windows)
    assert len({(window.top, window.left) for window in windows}) > 150
    with_foreground = sum(window.cut(mask).any() for window in windows) / len(windows)
    by_chance = 0.05  # windows that reach the last columns without being drawn around them
    assert 1 / 3 - 0.06 < with_foreground < 1 / 3 + by_chance + 0.06
    empty = draw_window(np.zeros((20, 30), np.uint8), 64, 0)
    assert (empty.top, empty.left, empty.height, empty.width) == (0, 0, 20, 30)
