import numpy as np
import pytest

from vlsm.training.augment import augment_example
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


def test_color_leaves_the_mask_alone():
    image, mask = augment_example(IMAGE, MASK, AugmentSettings(color=0.5), 3)
    assert (mask == MASK).all() and (image != IMAGE).any()
