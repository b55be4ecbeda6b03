import csv
import io

import numpy as np
import pytest
from scipy import stats

from vlsm.datasets.records import Record
from vlsm.evaluation.prompts import classify, find_telling, texts_of
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.tables import compare, format_csv, format_markdown

RNG = np.random.default_rng(1)
DICE = {"a": RNG.uniform(0.4, 0.9, 15), "b": RNG.uniform(0.5, 1, 15)}


def score(system, number, prompt_name="p1", prompt_class="honest", **more):
    """A row of scores."""
    dice = float(DICE[system][number])
    values = {"dice": dice, "iou": dice / (2 - dice), "precision": 0.25, "recall": 0.75, "reference_dice": None}
    values["review"] = "low confidence" if number % 3 == 0 else None
    row = {"dataset": "d", "system": system, "record": f"record {number}", "prompt_name": prompt_name}
    row |= {"prompt_class": prompt_class, "status": "ok", "hd95_px": 10.0 + number, "asd_px": 1.0}
    return row | values | more


def failed(system, number):
    empty = dict.fromkeys(("dice", "iou", "precision", "recall", "hd95_px", "asd_px"))
    return score(system, number, status="failed", **empty)


@pytest.fixture
def rows():
    """Of a all 15 records, of b one has failed and one has no distances."""
    rows = [score("a", number) for number in range(15)] + [score("b", number) for number in range(13)]
    return [*rows, failed("b", 13), score("b", 14, hd95_px=None, asd_px=None)]


@pytest.fixture
def lines(rows):
    return {line.system: line for line in compare(rows, "a", 2000, seed=3)}


def test_figures_are_those_of_numpy_and_scipy(lines):
    kept = np.r_[0:13, 14]
    a, b = DICE["a"], DICE["b"][kept]
    line = lines["b"]
    assert (line.n, line.n_failed, line.hd95_n, line.asd_n, line.difference_n) == (14, 1, 13, 13, 14)
    assert line.dice_mean == pytest.approx(b.sum() / 14)
    assert line.dice_sd == pytest.approx(np.sqrt(((b - b.mean()) ** 2).sum() / 13))
    assert line.dice_median == pytest.approx(np.sort(b)[6:8].mean())
    assert line.iou_mean == pytest.approx((b / (2 - b)).mean())
    assert (line.precision_mean, line.recall_mean) == (0.25, 0.75)
    assert (line.hd95_median, line.asd_median) == (16, 1)
    assert line.difference == pytest.approx((b - a[kept]).mean())
    assert line.p == pytest.approx(stats.wilcoxon(b, a[kept]).pvalue)


def test_what_should_be_looked_at_is_counted_against_what_is_bad(lines):
    is_bad, is_told = DICE["a"] < 0.7, np.arange(15) % 3 == 0
    line = lines["a"]
    assert 0 < is_bad.sum() < 15
    assert (line.review_n, line.bad_n, line.bad_found) == (5, is_bad.sum(), (is_bad & is_told).sum())
    told = f"5 ({line.bad_found / 5:.2f}, {line.bad_found / line.bad_n:.2f})"
    assert f"| {told} |" in format_markdown([line], "a", {})


def test_the_baseline_is_not_compared_with_itself(lines):
    assert lines["a"].difference is None and lines["a"].p is None


def test_wilcoxon_is_what_tables_give_for_ranks_counted_by_hand():
    """Five differences of one sign: of 32 ways to give signs, two are as extreme."""
    rows = [score("a", number) for number in range(5)]
    rows += [row | {"system": "c", "dice": row["dice"] - (1 + number) / 100} for number, row in enumerate(rows)]
    assert compare(rows, "a", 100, 0)[1].p == pytest.approx(2 / 32)


def test_equal_systems_have_a_p_of_one():
    rows = [score("a", number) for number in range(5)]
    rows += [row | {"system": "twin"} for row in rows]
    line = compare(rows, "a", 100, 0)[1]
    assert (line.difference, line.p) == (0, 1)


def test_the_interval_is_that_of_resampled_means_and_the_same_each_time(rows, lines):
    rng = np.random.default_rng(9)
    means = rng.choice(DICE["a"], (20_000, 15)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (lines["a"].dice_low, lines["a"].dice_high) == pytest.approx((low, high), abs=0.01)
    assert compare(rows, "a", 2000, seed=3)[0] == lines["a"]
    assert compare(rows, "a", 2000, seed=4)[0] != lines["a"]


def test_nothing_but_failures_gives_a_line_without_figures():
    (line,) = compare([failed("a", 0)], "a", 100, 0)
    assert (line.n, line.n_failed, line.dice_mean, line.dice_low, line.hd95_n) == (0, 1, None, None, 0)
    assert "| d | p1 | a | 0 (1) |  |" in format_markdown([line], "a", {})


def test_the_best_is_bold(rows, lines):
    text = format_markdown([*lines.values()], "a", {})
    assert f"| b | 14 (1) | **{lines['b'].dice_mean:.3f}** ±" in text
    assert f"| a | 15 (0) | {lines['a'].dice_mean:.3f} ±" in text


def test_systems_that_know_the_images_are_named_above_the_table(lines):
    text = format_markdown([*lines.values()], "a", {}, known=[("b|", 3, 1500)])
    assert "- b\\|: 3 of 1,500\n\n## Prompts" in text
    assert "learned from images" not in format_markdown([*lines.values()], "a", {})


def test_what_is_alone_is_not_bold():
    assert "| **" not in format_markdown(compare([score("a", 1), score("a", 2)], "a", 100, 0), "a", {})


def test_upper_bounds_and_robustness_stand_apart_under_headings_of_their_own(rows):
    rows += [score("a", number, "p5", "upper_bound") for number in range(3)]
    rows += [score("a", number, "empty", "robustness", reference_dice=0.5) for number in range(3)]
    text = format_markdown(compare(rows, "a", 100, 0), "a", {("d", "p1"): "'No tumor' says so"})
    honest, upper = text.split("## Upper bound")
    upper, robust = upper.split("## Other words")
    assert "| p1 |" in honest and "| p5 |" not in honest
    assert "| p5 |" in upper and "| p1 |" not in upper and "- d, p1: 'No tumor' says so" in upper
    assert "| d | empty | a | 3 (0) | 0.500 |" in robust
    assert "not corrected" in honest


def test_the_csv_has_all_figures(lines):
    (_, row) = csv.DictReader(io.StringIO(format_csv(lines.values())))
    assert float(row["dice_mean"]) == lines["b"].dice_mean and float(row["p"]) == lines["b"].p
    assert row["reference_dice_mean"] == ""


def settings(**more):
    return EvaluateSettings(output="x", datasets={"d": "x"}, checkpoints=("x",), **more)


def record(dataset, **prompts):
    texts = {name: (text,) if isinstance(text, str) else text for name, text in prompts.items()}
    return Record(dataset, "test", "record 1", "i", "m", texts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("own", "honest"), ("p0", "honest"), ("p1", "honest"), ("text:polyp", "honest")]
    + [("p2", "upper_bound"), ("p10", "upper_bound"), ("findings", "upper_bound"), ("empty", "robustness")],
)
def test_prompts_are_classed_by_their_names(name, expected):
    names = ("own", "p0", "p1", "text:polyp", "p2", "p10", "findings")
    assert classify(name, settings(prompts=names)) == expected


def test_of_several_sentences_the_first_is_used_and_templates_are_filled():
    records = [record("d", p1="polyp", p2=("one", "two")), record("e", p1="tumor")]
    chosen = settings(prompts=("p2", "own"), prompt_robustness=True)
    texts = texts_of(records[:1] + [record("e", p1="tumor", p2="three")], "lesion", chosen, with_robustness=True)
    assert texts[0]["p2"] == "one" and texts[0]["own"] == "lesion"
    assert texts[0]["empty"] == "" and texts[0]["wrong class"] == "tumor" and texts[1]["wrong class"] == "polyp"
    assert texts[0]["paraphrase 1"] == "a picture of one"
    assert texts_of(records[:1], "lesion", chosen, with_robustness=True)[0]["wrong class"] == "a car"
    assert "empty" not in texts_of(records[:1], "lesion", chosen, with_robustness=False)[0]


def told(prompt, fraction, system="a"):
    return {"system": system, "dataset": "d", "prompt_name": "p1", "prompt": prompt, "target_fraction": fraction}


@pytest.mark.parametrize(
    ("rows", "is_telling"),
    [
        ([told("Tumor in the image", 0.1), told("No tumor in the image", 0.0)], True),
        ([told("Tumor", 0.1), told("normal tissue", None)], True),  # whatever its label is
        ([told("finding", 0.1), told("clear", 0.0)], True),
        ([told("lesion", 0.1), told("lesion", 0.0)], False),
        ([told("no tumor", 0.1), told("no tumor", 0.0)], False),  # the same of all
        ([told("lesion", 0.1), told("stone", 0.2), told("stone", 0.0)], False),
        ([told("nodule", 0.1), told("abnormal nose", 0.2)], False),
        ([told("no polyp", 0.1), told("polyp", 0.1, "b")], False),  # the stored prompts of two checkpoints
    ],
)
def test_prompts_that_give_the_answer_away_are_found(rows, is_telling):
    assert list(find_telling(rows)) == ([("d", "p1")] if is_telling else [])


def test_a_table_says_where_a_prompt_is_from():
    """`record` and `own` are words of the settings; the files keep them, the table for people does not."""
    lines = compare([score("a", 1, "record"), score("a", 1, "own"), score("a", 1, "p1")], "a", 100, 0)
    text = format_markdown(lines, "a", {})
    for words in ("| d | each image's own | a |", "| d | the checkpoint's own | a |", "| d | p1 | a |"):
        assert words in text
    assert "record" not in text.replace("prompts=[record]", "") and "honest" not in text
    assert [row["prompt_name"] for row in csv.DictReader(io.StringIO(format_csv(lines)))] == ["record", "own", "p1"]
