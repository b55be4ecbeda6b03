import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlsm.evaluation.scoring import Scores, encoded_dice, score_mask
from vlsm.segmentation.masks import decode_mask, encode_mask

MASKS = arrays.arrays(np.uint8, (9, 13), elements=st.integers(0, 1))


def square(top, left, side=10, size=(40, 50)):
    mask = np.zeros(size, np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_a_mask_that_is_its_target_is_perfect():
    assert score_mask(square(5, 5), square(5, 5)) == Scores(1, 1, 1, 1, 0, 0, 1)


def test_a_square_moved_by_three_pixels():
    scores = score_mask(square(5, 8), square(5, 5))
    assert scores.dice == scores.precision == scores.recall == 0.7
    assert scores.iou == pytest.approx(70 / 130)
    # more than a twentieth of the 36 pixels of an outline, its far side, are three away from the other outline
    assert scores.hd95_px == 3
    assert 0 < scores.asd_px < 3


def test_precision_and_recall_are_not_exchanged():
    half = score_mask(square(5, 5)[:, :] * (np.arange(50) < 10), square(5, 5))
    assert (half.precision, half.recall) == (1, 0.5)
    assert half.dice == pytest.approx(2 / 3) and half.iou == 0.5


def test_distances_are_those_between_outlines_counted_by_hand():
    """Of two lines of one pixel's width, five rows apart, every pixel is five away; one end is two longer."""
    mask, target = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    mask[4, 3:23], target[9, 3:25] = True, True
    distances = [*[5.0] * 20, *[5.0] * 20, np.hypot(5, 1), np.hypot(5, 2)]
    scores = score_mask(mask, target)
    assert scores.dice == scores.iou == scores.precision == scores.recall == 0
    assert scores.asd_px == pytest.approx(np.mean(distances), rel=1e-5)
    assert scores.hd95_px == pytest.approx(np.quantile(distances[20:], 0.95), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "target", "expected"),
    [
        (False, False, Scores(1, 1, 1, 1, 0, 0, 1, 1)),
        (True, False, Scores(0, 0, 0, 0, None, None, 0, 0)),
        (False, True, Scores(0, 0, 0, 0, None, None, 0, 0)),
    ],
)
def test_empty_masks_follow_the_rule(mask, target, expected):
    pair = square(5, 5) * mask, square(5, 5) * target
    assert score_mask(*pair, 2, 1.0, (0.5, 0.5)) == expected
    assert score_mask(*pair).nsd_mm is None  # without a spacing there are no millimetres


def test_masks_of_different_sizes_are_an_error():
    with pytest.raises(ValueError, match="one size"):
        score_mask(square(0, 0), square(0, 0, size=(40, 51)))


@settings(max_examples=40, deadline=None)
@given(MASKS, MASKS)
def test_dice_is_symmetric_and_all_is_in_its_range(mask, target):
    one, other = score_mask(mask, target), score_mask(target, mask)
    assert (one.dice, one.iou, one.hd95_px) == (other.dice, other.iou, other.hd95_px)
    assert (one.precision, one.recall) == (other.recall, other.precision) or not (mask.any() and target.any())
    assert 0 <= one.iou <= one.dice <= 1 and 0 <= one.precision <= 1 and 0 <= one.recall <= 1
    assert one.asd_px == (None if other.asd_px is None else pytest.approx(other.asd_px, abs=1e-6))
    assert one.hd95_px is None or 0 <= one.hd95_px <= np.hypot(9, 13)


@settings(max_examples=40, deadline=None)
@given(MASKS, MASKS)
def test_overlap_is_what_monai_finds_and_what_run_lengths_give(mask, target):
    from monai.metrics import compute_dice, compute_iou

    scores = score_mask(*(decode_mask(encode_mask(each), each.shape) for each in (mask, target)))
    assert encoded_dice(encode_mask(mask), encode_mask(target), mask.shape) == pytest.approx(scores.dice)
    pair = [each[None, None].astype(np.float32) for each in (mask, target)]
    if mask.any() or target.any():
        import torch

        tensors = [torch.from_numpy(each) for each in pair]
        assert scores.dice == pytest.approx(float(compute_dice(*tensors, ignore_empty=False)))
        assert scores.iou == pytest.approx(float(compute_iou(*tensors, ignore_empty=False)))


@settings(max_examples=40, deadline=None)
@given(MASKS, MASKS)
def test_distances_are_those_that_monai_finds(mask, target):
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    scores = score_mask(mask, target)
    if mask.any() and target.any():
        pair = [torch.from_numpy(each[None, None].astype(np.float32)) for each in (mask, target)]
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95)
        asd = compute_average_surface_distance(*pair, include_background=True, symmetric=True)
        assert scores.hd95_px == pytest.approx(float(hd95), abs=1e-4)
        assert scores.asd_px == pytest.approx(float(asd), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(MASKS, MASKS, st.sampled_from([0.0, 1.0, 1.5, 3.0]))
def test_the_normalised_surface_distance_is_that_of_monai(mask, target, tolerance):
    import torch
    from monai.metrics import compute_surface_dice

    if mask.any() and target.any():
        pair = [torch.from_numpy(each[None, None].astype(np.float32)) for each in (mask, target)]
        plain = compute_surface_dice(*pair, [tolerance], include_background=True)
        in_mm = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=[2.5, 0.5])
        scores = score_mask(mask, target, tolerance, tolerance, (2.5, 0.5))
        assert (scores.nsd, scores.nsd_mm) == pytest.approx((float(plain), float(in_mm)), abs=1e-6)


def test_rows_and_columns_of_a_spacing_are_not_exchanged():
    """Two lines of one row, three rows apart: 3 mm with rows of 1 mm, and 30 mm with rows of 10 mm."""
    mask, target = np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)
    mask[2], target[5] = 1, 1
    near, far = (score_mask(mask, target, 2, 5.0, spacing) for spacing in ((1.0, 10.0), (10.0, 1.0)))
    assert (near.nsd, near.nsd_mm, far.nsd_mm) == (0, 1, 0)
