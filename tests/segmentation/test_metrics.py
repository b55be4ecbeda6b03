import numpy as np
import pytest

from vlsm.segmentation.metrics import dice_score

EMPTY, FULL = np.zeros((2, 4), np.uint8), np.ones((2, 4), np.uint8)
LEFT = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], np.uint8)
CORNER = np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.uint8)


@pytest.mark.parametrize(
    ("mask", "target_mask", "expected"),
    [(EMPTY, EMPTY, 1.0), (EMPTY, FULL, 0.0), (FULL, EMPTY, 0.0), (FULL, LEFT, 8 / 12), (CORNER, LEFT, 2 / 5)],
)
def test_dice_equals_the_count_by_hand(mask, target_mask, expected):
    assert dice_score(mask, target_mask) == pytest.approx(expected)


def test_masks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        dice_score(EMPTY, EMPTY.T)
