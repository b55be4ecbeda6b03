"""What tests/matrix.py takes for a difference between two environments."""

import numpy as np
import pytest

from tests.matrix import RESIZED_TOLERANCE, TOLERANCE, compare


def outcome(**changes):
    """What an environment makes of one image, but for some changes of single values."""
    probability = np.array([[0.2, 0.5 - TOLERANCE / 3, 0.9]], np.float32)
    found = {
        "pixels a.png": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        "square m": np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3),
        "probability m a.png": probability,
        "mask m a.png": (probability >= 0.5).astype(np.uint8),
    }
    for kind, (place, value) in changes.items():
        name = next(name for name in found if name.startswith(kind))
        found[name][place] = value
    return found


def test_rounding_is_no_difference():
    near = outcome(probability=((0, 1), 0.5 + TOLERANCE / 3), mask=((0, 1), 1))
    lines, largest = compare(outcome(), near)
    assert lines == []
    assert largest == {
        "pixels": 0,
        "square": 0,
        "probability": pytest.approx(2 * TOLERANCE / 3, rel=1e-3),
        "mask pixels": 1,
    }


@pytest.mark.parametrize("probability", [0.9 - RESIZED_TOLERANCE / 2, 0.9 - 2 * RESIZED_TOLERANCE])
def test_a_square_of_another_library_moves_probabilities_a_little(probability):
    resized = outcome(square=((0, 0, 0, 0), 1), probability=((0, 2), probability))
    assert len(compare(outcome(), resized)[0]) == (probability < 0.9 - RESIZED_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mask": ((0, 0), 1)}, "mask m a.png: 1 pixels are on the other side"),
        ({"probability": ((0, 2), 0.9 - 2 * TOLERANCE)}, "probability m a.png: the largest difference is 0.002"),
        ({"pixels": ((0, 0, 0), 1)}, "pixels a.png: the largest difference is 1"),
        ({"square": ((0, 0, 0, 0), 2)}, "square m: the largest difference is 2"),
    ],
)
def test_more_is_one(change, line):
    assert compare(outcome(), outcome(**change))[0] == [line]


def test_what_is_missing_or_of_another_size_is_one():
    short = outcome()
    short["pixels a.png"] = short["pixels a.png"][:1]
    del short["square m"]
    assert compare(outcome(), short)[0] == [
        "square m is in one environment only",
        "pixels a.png: (2, 2, 3) there, (1, 2, 3) here",
    ]
