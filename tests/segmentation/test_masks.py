import numpy as np
import pytest

from vlsm.images.preprocess import Square
from vlsm.segmentation.masks import decode_mask, encode_mask
from vlsm.segmentation.results import segmentation_of


def mask_from_logits(logits, size, threshold, square):
    return segmentation_of(logits[None], np.zeros((*size, 3), np.uint8), "x", threshold, square).mask


@pytest.mark.parametrize("size", [(64, 64), (530, 622), (37, 200), (20, 9), (1, 1)])
def test_enlarged_logits_equal_torchs_antialiased_bilinear(size):
    import torch

    logits = np.random.default_rng(0).normal(0, 5, (32, 32)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None, None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0, 0].numpy()
    np.testing.assert_allclose(Square(len(logits)).enlarge_logits(logits, size), expected, atol=1e-4)


def test_a_mask_stays_where_its_logits_are_in_a_wide_image():
    logits = np.full((16, 16), -5.0)
    logits[:4, 12:] = 5  # top right
    mask = mask_from_logits(logits, (40, 200), 0.5, Square(len(logits)))
    assert mask.shape == (40, 200)
    assert mask[:8, 160:].all()
    assert not mask[12:].any()
    assert not mask[:, :140].any()


def test_the_threshold_is_a_probability_and_counts_as_foreground():
    logits = np.full((4, 4), np.log(0.3 / 0.7))
    assert mask_from_logits(logits, (8, 8), 0.29, Square(len(logits))).all()
    assert not mask_from_logits(logits, (8, 8), 0.31, Square(len(logits))).any()
    assert mask_from_logits(np.zeros((4, 4)), (8, 8), 0.5, Square(4)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (123, 77)])
def test_run_lengths_give_the_mask_back(size):
    mask = (np.random.default_rng(2).random(size) < 0.4).astype(np.uint8)
    np.testing.assert_array_equal(mask, decode_mask(encode_mask(mask), size))
