import itertools

import numpy as np
import pytest
from pycocotools import mask as coco

from vlsm.masks import (
    decode_mask,
    describe_logits,
    describe_members,
    encode_mask,
    enlarge_logits,
    mask_from_logits,
    mirrored_mean,
)


@pytest.mark.parametrize("size", [(64, 64), (530, 622), (37, 200), (20, 9), (1, 1)])
def test_enlarged_logits_equal_torchs_antialiased_bilinear(size):
    import torch

    logits = np.random.default_rng(0).normal(0, 5, (32, 32)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None, None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0, 0].numpy()
    np.testing.assert_allclose(enlarge_logits(logits, size), expected, atol=1e-4)


def test_a_mask_stays_where_its_logits_are_in_a_wide_image():
    logits = np.full((16, 16), -5.0)
    logits[:4, 12:] = 5  # top right
    mask = mask_from_logits(logits, (40, 200), 0.5)
    assert mask.shape == (40, 200)
    assert mask[:8, 160:].all()
    assert not mask[12:].any()
    assert not mask[:, :140].any()


def test_the_threshold_is_a_probability_and_counts_as_foreground():
    logits = np.full((4, 4), np.log(0.3 / 0.7))
    assert mask_from_logits(logits, (8, 8), 0.29).all()
    assert not mask_from_logits(logits, (8, 8), 0.31).any()
    assert mask_from_logits(np.zeros((4, 4)), (8, 8), 0.5).all()


def test_the_record_of_a_mask_is_what_pycocotools_reads():
    logits = np.full((16, 16), -3.0)
    logits[4:8, 2:14] = 2
    record = describe_logits(logits, (32, 48), 0.5)
    mask = mask_from_logits(logits, (32, 48), 0.5)
    theirs = coco.decode({"size": [32, 48], "counts": record.mask_rle})
    np.testing.assert_array_equal(mask, theirs)
    rows, columns = np.nonzero(mask)
    assert record.area_px == mask.sum()
    assert record.area_fraction == pytest.approx(mask.mean())
    assert record.bbox == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    probability = 1 / (1 + np.exp(-enlarge_logits(logits, (32, 48))))
    assert record.confidence == pytest.approx(probability[mask == 1].mean(), abs=1e-6)


def test_an_empty_mask_has_no_box_and_no_confidence():
    record = describe_logits(np.full((8, 8), -4.0), (10, 12), 0.5)
    assert (0, 0.0, None, None) == (record.area_px, record.area_fraction, record.bbox, record.confidence)
    assert not decode_mask(record.mask_rle, (10, 12)).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (123, 77)])
def test_run_lengths_give_the_mask_back(size):
    mask = (np.random.default_rng(2).random(size) < 0.4).astype(np.uint8)
    np.testing.assert_array_equal(mask, decode_mask(encode_mask(mask), size))


def members(rng, size=16):
    """Three members with squares of their own, of which the first gives two texts."""
    return [rng.normal(0, 2, (texts, side, side)) for texts, side in ((2, size), (1, size), (1, 2 * size))]


def probabilities(logits, size):
    return np.mean([1 / (1 + np.exp(-enlarge_logits(one, size).astype(np.float64))) for one in logits], axis=0)


def test_members_are_joined_by_the_weighted_mean_at_the_images_size():
    all_logits, weights, size = members(np.random.default_rng(0)), [1, 2, 1], (30, 50)
    found = describe_members(all_logits, weights, size, 0.6)
    own = [probabilities(logits, size) for logits in all_logits]
    mean = (own[0] + 2 * own[1] + own[2]) / 4
    np.testing.assert_array_equal(decode_mask(found.mask_rle, size), mean >= 0.6)
    assert found.confidence == pytest.approx(mean[mean >= 0.6].mean())
    masks = [one >= 0.6 for one in own]
    dices = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)]
    assert found.agreement == pytest.approx(np.mean(dices))


@pytest.mark.parametrize(("weights", "least"), [([1, 1, 1], 2), ([0.1, 0.1, 0.2], 3), ([3, 1, 1], 1)])
def test_a_vote_takes_more_than_half_of_the_weights(weights, least):
    all_logits, size = members(np.random.default_rng(1)), (30, 50)
    found = decode_mask(describe_members(all_logits, weights, size, 0.5, vote=True).mask_rle, size)
    votes = [probabilities(logits, size) >= 0.5 for logits in all_logits]
    wanted = {2: sum(votes) >= 2, 3: votes[2] & (votes[0] | votes[1]), 1: votes[0]}[least]
    np.testing.assert_array_equal(found, wanted)


def test_a_single_member_agrees_with_nobody_and_empty_masks_agree():
    logits = np.random.default_rng(2).normal(0, 2, (1, 16, 16))
    assert describe_members([logits], [5], (20, 20), 0.5) == describe_logits(logits[0], (20, 20), 0.5)
    empty = describe_members([logits - 100, logits - 100], [1, 1], (20, 20), 0.5)
    assert (empty.area_px, empty.agreement, empty.confidence) == (0, 1.0, None)


def test_the_mean_with_the_mirror_image_is_that_of_probabilities():
    rng = np.random.default_rng(3)
    one, mirrored = rng.normal(0, 3, (2, 8, 8)), rng.normal(0, 3, (2, 8, 8))
    found = 1 / (1 + np.exp(-mirrored_mean(one, mirrored)))
    np.testing.assert_allclose(found, (1 / (1 + np.exp(-one)) + 1 / (1 + np.exp(-mirrored[..., ::-1]))) / 2, rtol=1e-9)
    assert np.isfinite(mirrored_mean(np.full((1, 2, 2), 900.0), np.full((1, 2, 2), -900.0))).all()
