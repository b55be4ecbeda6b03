"""Lesions are counted as a person counts them, whatever the masks hold."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy import ndimage

from vlsm.evaluation.lesions import LesionScores, add_lesions, score_lesions

NUCLEI = Path(__file__).parents[3] / "shared" / "data" / "dsb2018_nuclei" / "masks"
MASKS = arrays.arrays(np.uint8, (8, 11), elements=st.integers(0, 1))


def draw(*boxes, size=(60, 60)):
    """A mask of boxes (top, left, height, width)."""
    mask = np.zeros(size, np.uint8)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = 1
    return mask


def test_each_component_is_matched_touched_or_neither():
    """One lesion is met, one is only touched, one is missed; one component is in the air."""
    lesions = draw((0, 0, 10, 10), (20, 0, 10, 10), (40, 0, 10, 10))
    mask = draw((0, 0, 10, 8), (20, 8, 10, 10), (40, 40, 5, 5))
    scores = score_lesions(mask, lesions)
    assert scores == LesionScores(3, 3, 1, 2, 2, 0.8, pytest.approx((160 / 180 + 40 / 200 + 0) / 3))
    totals = add_lesions([asdict(scores)])
    assert (totals.lesion_precision, totals.lesion_recall, totals.lesion_f1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert (totals.touch_precision, totals.touch_recall, totals.touch_f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert totals.panoptic_quality == pytest.approx(0.8 / 3)


def test_one_component_over_two_lesions_finds_both_and_matches_none():
    scores = score_lesions(draw((0, 0, 10, 30)), draw((0, 0, 10, 10), (0, 20, 10, 10)))
    assert scores == LesionScores(2, 1, 0, 2, 1, None, pytest.approx(2 * 100 / 400))


def test_two_components_in_one_lesion_are_both_right_and_are_compared_together():
    scores = score_lesions(draw((0, 0, 10, 4), (0, 6, 10, 4)), draw((0, 0, 10, 10)))
    assert scores == LesionScores(1, 2, 0, 1, 2, None, pytest.approx(160 / 180))


def test_an_iou_of_exactly_a_half_is_no_match():
    assert score_lesions(draw((0, 0, 10, 5)), draw((0, 0, 10, 10))).num_matched == 0
    assert score_lesions(draw((0, 0, 10, 6)), draw((0, 0, 10, 10))).num_matched == 1


def test_pixels_that_touch_at_a_corner_are_one_lesion():
    assert score_lesions(draw(), draw((0, 0, 5, 5), (5, 5, 5, 5))).num_lesions == 1


@pytest.mark.parametrize(
    ("mask", "target", "expected"),
    [
        (False, False, LesionScores(0, 0)),
        (True, False, LesionScores(0, 1)),
        (False, True, LesionScores(1, 0, lesion_dice=0.0)),
    ],
)
def test_empty_masks_follow_the_rule(mask, target, expected):
    box = draw((5, 5, 10, 10))
    assert score_lesions(box * mask, box * target) == expected


def test_figures_without_a_denominator_are_absent_and_those_of_misses_are_0():
    box, empty = draw((5, 5, 10, 10)), draw()
    nothing = add_lesions([asdict(score_lesions(empty, empty))])
    assert {value for name, value in asdict(nothing).items() if not name.endswith("_n")} == {None}
    false = add_lesions([asdict(score_lesions(box, empty))])
    assert (false.lesion_precision, false.lesion_recall, false.lesion_f1, false.panoptic_quality) == (0, None, 0, 0)
    assert (false.touch_precision, false.touch_recall, false.touch_f1, false.lesion_dice_mean) == (0, None, 0, None)
    missed = add_lesions([asdict(score_lesions(empty, box))])
    assert (missed.lesion_precision, missed.lesion_recall, missed.lesion_f1, missed.touch_f1) == (None, 0, 0, 0)
    assert missed.lesion_dice_mean == 0


def test_totals_are_of_all_lesions_and_not_means_over_images():
    """Nine lesions of one image are found, the only one of another is not; an image without any changes nothing."""
    nine = draw(*((6 * row, 6 * column, 4, 4) for row in range(3) for column in range(3)))
    pairs = [(nine, nine), (draw(), draw((0, 0, 4, 4))), (draw(), draw())]
    totals = add_lesions([asdict(score_lesions(*pair)) for pair in pairs])
    assert (totals.lesions_n, totals.lesion_recall, totals.lesion_dice_mean) == (10, 0.9, 0.9)


def test_rows_of_earlier_versions_have_no_lesions_and_are_left_out():
    totals = add_lesions([{"dice": 0.5}, {"dice": 0.5, "num_lesions": None}])
    assert (totals.lesions_n, totals.components_n, totals.panoptic_quality) == (0, 0, None)


def test_many_specks_need_no_table_of_all_pairs():
    """A table of 40,000 x 40,000 pairs would have 12 GB."""
    specks = np.zeros((400, 400), np.uint8)
    specks[::2, ::2] = 1
    assert score_lesions(specks, specks) == LesionScores(40_000, 40_000, 40_000, 40_000, 40_000, 1, 1)


@settings(max_examples=60, deadline=None)
@given(MASKS, MASKS)
def test_scores_are_those_of_a_table_of_all_pairs(mask, target):
    """Slow and plain: every component is compared with every lesion."""
    parts, lesions = (
        [labels == number for number in range(1, count + 1)]
        for labels, count in (ndimage.label(one, np.ones((3, 3))) for one in (mask, target))
    )
    overlaps = np.array([[(part & lesion).sum() for lesion in lesions] for part in parts]).reshape(
        len(parts), len(lesions)
    )
    ious = [overlaps[p, t] / (part | lesion).sum() for p, part in enumerate(parts) for t, lesion in enumerate(lesions)]
    dice = []
    for t, lesion in enumerate(lesions):
        touching = np.any([part for p, part in enumerate(parts) if overlaps[p, t]] or [mask * 0], axis=0)
        dice.append(2 * (touching & lesion).sum() / (touching.sum() + lesion.sum()))
    scores = score_lesions(mask, target)
    assert (scores.num_components, scores.num_lesions) == (len(parts), len(lesions))
    assert scores.num_matched == sum(iou > 0.5 for iou in ious)
    assert (scores.num_right, scores.num_found) == ((overlaps > 0).any(1).sum(), (overlaps > 0).any(0).sum())
    assert scores.matched_iou == (pytest.approx(np.mean([i for i in ious if i > 0.5])) if scores.num_matched else None)
    assert scores.lesion_dice == (pytest.approx(np.mean(dice)) if dice else None)


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="needs ../shared/data/dsb2018_nuclei")
def test_nuclei_that_are_moved_eroded_and_dropped_are_counted():
    """Of real nuclei, three are dropped and three are invented; the others stay as they are."""
    path = max(NUCLEI.iterdir(), key=lambda one: one.stat().st_size)
    target = (np.array(Image.open(path)) > 127).astype(np.uint8)
    labels, count = ndimage.label(target, np.ones((3, 3)))
    assert count > 20
    mask = np.isin(labels, range(4, count + 1)).astype(np.uint8)
    free = ndimage.distance_transform_cdt(~target.astype(bool), "chessboard")
    invented = 0
    while invented < 3:
        row, column = np.unravel_index(free.argmax(), free.shape)
        mask[row, column] = 1
        free[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] = 0
        invented += 1
    totals = add_lesions([asdict(score_lesions(mask, target))])
    assert (totals.lesions_n, totals.components_n) == (count, count)
    for value in (totals.lesion_f1, totals.touch_f1, totals.panoptic_quality, totals.lesion_dice_mean):
        assert value == pytest.approx((count - 3) / count)
