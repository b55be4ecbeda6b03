"""Whether an image shows the finding: figures counted by hand, rules for what is absent, and earlier versions."""

import csv
import io
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.test_tables import score
from vlsm.evaluation.presence import add_presence
from vlsm.evaluation.tables import compare, format_csv, format_markdown
from vlsm.segmentation.presence import judge_presence


def row(target, area, highest=None, **more):
    dice = 1.0 if not target and not area else 0.8 if target and area else 0.0
    values = {"target_fraction": target, "area_fraction": area, "max_probability": highest, "dice": dice}
    return values | {"is_present": area > 0, "presence_threshold": None} | more


ROWS = [row(0.1, 0.2, 0.9), row(0.1, 0.0, 0.4), row(0.0, 0.0, 0.3), row(0.0, 0.06, 0.6), row(0.0, 0.0, 0.4)]


def test_figures_are_those_counted_by_hand():
    totals = add_presence(ROWS)
    assert totals.negatives_n == 3
    assert (totals.sensitivity, totals.specificity) == (0.5, pytest.approx(2 / 3))
    assert totals.positive_dice_mean == pytest.approx(0.4)
    assert totals.presence_auroc == pytest.approx((3 + 1.5) / 6)  # 0.9 beats all; 0.4 beats one and is equal to one
    assert totals.false_area_mean == pytest.approx(0.02)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(positive, negative):
    rows = [row(0.1, 0, one) for one in positive] + [row(0.0, 0, one) for one in negative]
    pairs = [(one > other) + (one == other) / 2 for one in positive for other in negative]
    assert add_presence(rows).presence_auroc == pytest.approx(np.mean(pairs))


def test_figures_without_their_records_are_absent():
    only_positive, only_negative, nothing = (add_presence(ROWS[part]) for part in (slice(2), slice(2, 5), slice(0)))
    assert (only_positive.specificity, only_positive.presence_auroc, only_positive.false_area_mean) == (None,) * 3
    assert (only_negative.sensitivity, only_negative.presence_auroc, only_negative.positive_dice_mean) == (None,) * 3
    assert (only_negative.negatives_n, only_negative.specificity) == (3, pytest.approx(2 / 3))
    assert set(asdict(nothing).values()) == {0, None}


def test_rows_of_earlier_versions_are_judged_by_their_foreground():
    new = {"max_probability", "is_present", "presence_threshold"}
    earlier = [{name: value for name, value in one.items() if name not in new} for one in ROWS]
    totals = add_presence(earlier)
    assert (totals.sensitivity, totals.specificity) == (0.5, pytest.approx(2 / 3))
    assert totals.presence_auroc is None


def test_one_row_without_a_probability_makes_the_figures_absent_and_not_those_of_other_records():
    rows = [*ROWS[:4], row(0.0, 0.0, None, is_present=None)]
    totals = add_presence(rows)
    assert (totals.presence_auroc, totals.specificity, totals.sensitivity) == (None, None, 0.5)


@pytest.mark.parametrize(
    ("area", "highest", "threshold", "expected"),
    [
        (0.1, None, None, True), (0.0, 0.9, None, False), (None, 0.9, None, None),
        (0.0, 0.9, 0.9, True), (0.1, 0.5, 0.9, False), (0.1, None, 0.9, None),
    ],
)  # fmt: skip
def test_a_system_says_that_the_finding_is_there(area, highest, threshold, expected):
    assert judge_presence({"area_fraction": area, "max_probability": highest}, threshold) is expected


def test_the_presence_takes_the_place_of_the_highest_probability():
    row = {"area_fraction": 0.1, "max_probability": 0.9, "presence": 0.2}
    assert judge_presence(row, 0.5) is False and judge_presence(row | {"presence": None}, 0.5) is True
    assert judge_presence(row, None) is True  # without a threshold any foreground counts, as before
    rows = [one | {"presence": presence} for one, presence in zip(ROWS, (0.9, 0.5, 0.6, 0.1, 0.2), strict=True)]
    assert add_presence(rows).presence_auroc == pytest.approx(5 / 6)  # only 0.5 and 0.6 are in the wrong order
    rows[0]["presence"] = None  # both in one curve would be two scales
    assert add_presence(rows).presence_auroc == add_presence(ROWS).presence_auroc


def test_the_table_tells_how_many_records_are_negative_and_their_mean_apart():
    rows = [score("a", number, **one) for number, one in enumerate(ROWS)]
    (line,) = compare(rows, "a", 100, 0)
    assert line.dice_mean == pytest.approx((0.8 + 0 + 1 + 0 + 1) / 5)  # over all, as in earlier versions
    text = format_markdown([line], "a", {})
    assert "| a | 5 (0), 3 negative | 0.560" in text
    assert "## Images without the finding" in text
    assert "| d | p1 | a | 5 | 3 | 0.400 | any | 0.500 | 0.667 | 0.750 | 2.00% |" in text
    (written,) = csv.DictReader(io.StringIO(format_csv([line])))
    assert (written["negatives_n"], float(written["specificity"])) == ("3", line.presence.specificity)
    columns = list(written)
    assert columns.index("reference_dice_mean") < columns.index("nsd_mean") < columns.index("negatives_n")


def test_a_table_without_negative_records_is_as_before():
    rows = [score("a", number, target_fraction=0.1, area_fraction=0.1) for number in range(3)]
    text = format_markdown(compare(rows, "a", 100, 0), "a", {})
    assert "| a | 3 (0) |" in text and "## Images without the finding" not in text and "## Lesions" not in text
