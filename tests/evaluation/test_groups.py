"""Scores by group and by patient, against figures that were computed by hand and by scipy."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from vlsm.archive.columns import normalize
from vlsm.datasets.inspection import Facts, examples_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError
from vlsm.evaluation.groups import (
    check_groups,
    compare_groups,
    find_gaps,
    format_groups,
    format_groups_csv,
    group_value,
)
from vlsm.evaluation.parts import PredictionSource, score_columns, scores_schema
from vlsm.evaluation.planning import Evaluation, finish_evaluation
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.statistics import compare_pairs, interval
from vlsm.evaluation.systems import System, Target
from vlsm.evaluation.tables import compare, format_markdown
from vlsm.report.write import write_report
from vlsm.runs.record import create_record
from vlsm.runs.results import write_part
from vlsm.segmentation.masks import encode_mask


def settings(**given):
    return EvaluateSettings(output="o", datasets={"d": "x"}, checkpoints=("c",), **given)


def score(number, dice, system="a", **more):
    row = {"dataset": "d", "prompt_name": "p1", "prompt_class": "honest", "system": system, "record": f"r{number}"}
    row |= {"status": "ok", "dice": dice, "iou": dice / 2, "review": None, "group": None}
    return row | more


def failed(number, **more):
    return score(number, 0.0, **more) | {"status": "failed", "dice": None, "iou": None}


# three patients with 1, 2 and 3 images: the means of their Dice are 0.2, 0.5 and 0.9
PATIENTS = ["x", "y", "y", "z", "z", "z"]
DICE = [0.2, 0.4, 0.6, 0.8, 0.9, 1.0]
BASE = [0.1, 0.5, 0.5, 0.5, 0.5, 0.5]  # the differences are 0.1; -0.1, 0.1; 0.3, 0.4, 0.5


def test_an_interval_of_patients_has_the_percentiles_of_all_draws_of_patients():
    """With three patients there are 27 draws. Each is as likely, so the percentiles of a large bootstrap are theirs."""
    sums, counts = np.array([0.2, 1.0, 2.7]), np.array([1, 2, 3])
    draws = np.stack(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    means = np.sort(sums[draws].sum(0) / counts[draws].sum(0))
    assert (means[0], means[-1]) == pytest.approx((0.2, 0.9))  # 1 of 27 draws each, which is more than 2.5 %
    low, high = interval(np.array(DICE), PATIENTS, 2000, 0)
    assert (low, high) == pytest.approx((0.2, 0.9))
    images = interval(np.array(DICE), range(6), 2000, 0)
    assert low < images[0] < images[1] < high  # images alone seem to say more


def test_with_an_image_for_each_patient_the_interval_is_that_of_scipy_over_images():
    values = np.random.default_rng(0).uniform(0, 1, 30)
    options = {"n_resamples": 500, "batch": 100, "method": "percentile", "rng": np.random.default_rng(7)}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert interval(values, range(30), 500, 7) == pytest.approx((expected.low, expected.high), abs=0)
    twice = interval(np.repeat(values, 2), np.repeat(np.arange(30), 2).tolist(), 500, 7)
    assert twice == pytest.approx((expected.low, expected.high))  # each image once more says nothing new
    assert interval(values[:4], ["x"] * 4, 500, 7) == (None, None)


def pairs(**more):
    rows = [score(n, dice, patient=who) for n, (dice, who) in enumerate(zip(DICE, PATIENTS, strict=True))]
    return rows, [score(n, dice, system="b") for n, dice in enumerate(BASE)]


def test_the_test_compares_the_mean_difference_of_each_patient():
    rows, base = pairs()
    difference, number, p = compare_pairs(rows, base, "patient")
    assert (difference, number) == (pytest.approx(1.3 / 6), 6)
    assert p == stats.wilcoxon([0.1, 0.0, 0.4]).pvalue
    assert compare_pairs(rows, base, None)[2] == pytest.approx(stats.wilcoxon(np.array(DICE) - np.array(BASE)).pvalue)
    assert compare_pairs(rows, [], "patient") == (None, None, None)


def test_a_table_by_patient_has_the_same_means_and_says_how_many_patients_there_are():
    rows, base = pairs()
    rows = [*rows, score(6, 0.5, patient=None), score(7, 0.5, patient=None), failed(8, patient="w")]
    by_image, by_patient = (compare([*rows, *base], "b", 500, 0, who)[0] for who in (None, "patient"))
    assert by_image.dice_mean == by_patient.dice_mean == pytest.approx(4.9 / 8)
    assert (by_image.patients_n, by_patient.patients_n) == (None, 5)  # an image without a patient is one of its own
    assert by_patient.dice_high - by_patient.dice_low > by_image.dice_high - by_image.dice_low
    assert "| 8 (1), 5 patients |" in (text := format_markdown([by_patient], "b", {}))
    assert "The bootstrap of the intervals draws patients" in text
    assert "Patients" not in format_markdown([by_image], "b", {})


def grouped(**given):
    """Sites with 3, 2 and 1 images, one image without a site, and one that failed."""
    sites = ["north", "north", "north", "south", "south", "east", None]
    dice = [0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 1.0]
    rows = [score(n, value, site=site) for n, (value, site) in enumerate(zip(dice, sites, strict=True))]
    rows.append(failed(7, site="south"))
    rows += [
        score(n, value - 0.1, system="b", site=site) for n, (value, site) in enumerate(zip(dice, sites, strict=True))
    ]
    given = settings(**{"groups": ["site"], "small_group": 2, "resamples": 200} | given)
    return compare_groups(rows, "b", given, score_columns(given)), given


def test_groups_have_their_figures_and_small_ones_are_said():
    rows, _ = grouped()
    first = [row for row in rows if row.system == "a"]
    assert [row.value for row in first] == ["east", "north", "south", None]
    assert [(row.n, row.n_failed, row.is_small) for row in first] == [
        *((1, 0, True), (3, 0, False), (2, 1, False), (1, 0, True))
    ]
    assert [row.dice_mean for row in first] == pytest.approx([0.1, 0.8, 0.4, 1.0])
    assert [row.iou_mean for row in first] == pytest.approx([0.05, 0.4, 0.2, 0.5])
    assert [row.difference for row in first] == pytest.approx([0.1] * 4)
    assert [row.p for row in first] == [1.0, 0.25, 0.5, 1.0]  # 2 of the 2^n signs are as extreme
    assert (first[0].dice_low, first[2].dice_low) == (None, 0.3)
    assert all(row.difference is None and row.patients_n is None for row in rows if row.system == "b")


def test_the_gap_is_between_the_best_and_the_worst_group_that_is_not_small():
    rows, given = grouped()
    gap, _ = find_gaps(rows)
    assert [row.value for row in gap.groups] == ["east", "south", "north", None]
    assert [row.value for row in gap.rated] == ["south", "north"] and gap.size == pytest.approx(0.4)
    text = "\n".join(format_groups(rows, given))
    assert "| d | p1 | a | site | 4 (2) | south: 0.400 (n 2) | north: 0.800 (n 3) | 0.400 |" in text
    assert "| site | east | 1 (0), small |  | 0.100 |" in text and "| no value | 1 (0), small |" in text
    assert "fewer than 2 images" in text
    rows, given = grouped(small_group=3)
    gap, _ = find_gaps(rows)
    assert gap.size is None and "| 4 (3) |  |  |  |" in "\n".join(format_groups(rows, given))
    assert format_groups([], given) == []


def test_a_group_is_small_by_its_patients_where_they_are_named():
    given = settings(groups=["site"], patient="who", small_group=2, resamples=100)
    rows = [score(n, 0.5, site="s", who="one") for n in range(20)]
    (row,) = compare_groups(rows, "b", given, score_columns(given))
    assert (row.n, row.patients_n, row.is_small, row.dice_low) == (20, 1, True, None)


def test_the_csv_has_all_groups_and_no_formula():
    given = settings(groups=["site"])
    rows = compare_groups([score(0, 0.5, site="=1+1"), score(1, 0.5, site=None)], "a", given, score_columns(given))
    first, second = csv.DictReader(io.StringIO(format_groups_csv(rows)))
    assert (first["value"], first["n"], second["value"], second["is_small"]) == ("'=1+1", "1", "", "True")


def test_columns_of_scores_are_those_of_the_list_or_have_a_prefix():
    given = settings(groups=["site", "group", "dice"], patient="patient_id")
    assert score_columns(given) == {"site": "site", "group": "group", "dice": "list_dice", "patient_id": "patient_id"}
    assert scores_schema(given).names[-3:] == ["site", "list_dice", "patient_id"]


def test_a_group_is_that_of_the_dataset_or_else_that_of_the_run():
    record = Record("d", "test", "r", "i", "m", {}, further=(("Site", "A"), ("sex", "f")))
    run = {"site": "B", "age": 7, "none": None}
    assert [group_value(record, run, name) for name in ("site", "sex", "age", "none")] == ["A", "f", "7", None]
    assert normalize("Site") == "site"


@pytest.fixture
def evaluated(tmp_path):
    """A finished evaluation of a run with columns of a list; the dataset itself has none."""
    from PIL import Image

    masks = [np.zeros((20, 30), np.uint8) for _ in range(4)]
    for number, mask in enumerate(masks):
        mask[2:12, 3 : 13 + number] = 1
        Image.fromarray(mask * 255).save(tmp_path / f"{number}.png")
    row = {"prompt": "polyp", "kind": "mask", "model": "m", "status": "ok", "height": 20, "width": 30}
    rows = [
        row
        | {"image_id": f"{number}", "image_uri": f"{tmp_path}/{number}.png", "mask_rle": encode_mask(masks[0])}
        | {"area_px": 100, "area_fraction": 100 / 600, "site": "<b>=A" if number < 2 else None, "patient": number // 2}
        for number in range(4)
    ]
    columns = pa.struct([("site", pa.string()), ("patient", pa.int8())])
    write_part(str(tmp_path / "run"), 0, rows, "r", 0, columns)
    given = settings(prompts=["p1"], groups=["site"], patient="patient", small_group=1, resamples=100)
    given = given.model_copy(update={"output": str(tmp_path / "out")})
    records = [
        Record("d", "test", f"r{number}", row["image_uri"], row["image_uri"], {"p1": ("polyp",)})
        for number, row in enumerate(rows)
    ]
    targets = [Target(record, str(number), {"p1": "polyp"}) for number, record in enumerate(records)]
    source = PredictionSource("a", str(tmp_path / "run"), "r", 1, {t.image_id: [t] for t in targets}, given)
    evaluation = Evaluation(given, [System("a", str(tmp_path / "run"), None, targets)])
    create_record(given.output, {"config": given.model_dump(mode="json"), "plan": {}})
    finish_evaluation(evaluation, [source.score_part(0)], 1.0)
    return tmp_path / "out"


def test_an_evaluation_of_masks_has_the_groups_of_their_list(evaluated, tmp_path):
    scores = pq.read_table(evaluated / "scores.parquet").to_pylist()
    assert [(row["site"], row["patient"]) for row in scores] == [("<b>=A", "0")] * 2 + [(None, "1")] * 2
    dice = [1, 200 / 210, 200 / 220, 200 / 230]
    assert [row["dice"] for row in scores] == pytest.approx(dice)
    first, second = csv.DictReader((evaluated / "groups.csv").open(encoding="utf-8", newline=""))
    assert (first["value"], first["n"], first["patients_n"], second["value"]) == ("<b>=A", "2", "1", "")
    assert [float(row["dice_mean"]) for row in (first, second)] == pytest.approx([np.mean(dice[:2]), np.mean(dice[2:])])
    text = (evaluated / "table.md").read_text(encoding="utf-8")
    assert "## Groups" in text and "| 4 (0), 2 patients |" in text and "<b>" not in text
    page = open(write_report(str(evaluated), tmp_path / "page.html"), encoding="utf-8").read()
    assert 'id="groups"' in page and "&lt;b&gt;=A" in page and "no value" in page and "<b>=A" not in page
    assert ">worst group<" in page.lower() and ">patients<" in page.lower()


def test_a_list_of_labelled_images_gives_its_records_the_columns_that_are_asked_for(tmp_path):
    text = "image_uri,mask_uri,split,Patient ID,sex,group\na.png,m.png,test,007,f,g\nb.png,m.png,test,,m,\n"
    (tmp_path / "list.csv").write_text(text)
    uri = str(tmp_path / "list.csv")
    read = DatasetSettings(carry=("patient_id",)).grouping(("sex", "nothing"))
    records = read_dataset("d", uri, read)
    assert [record.further for record in records] == [(("Patient ID", "007"), ("sex", "f")), (("sex", "m"),)]
    assert all(record.further == () for record in read_dataset("d", uri))
    assert "further" not in read_dataset("d", uri)[0].stated()  # digests of earlier evaluations stay
    check_groups(records, (), settings(groups=["patient_id", "sex"], patient="group"))
    check_groups(records, ("site",), settings(groups=["site"]))
    table = examples_table(records, [Facts(), Facts()])  # as a training writes it
    pq.write_table(table, tmp_path / "examples.parquet")
    again = read_dataset("d", str(tmp_path / "examples.parquet"))
    assert [record.further for record in again] == [record.further for record in records]
    with pytest.raises(ConfigError, match="groups names 'nothing'; no list of a dataset"):
        check_groups(records, ("site",), settings(groups=["nothing"]))
    with pytest.raises(ConfigError, match="patient names 'who'"):
        check_groups(records, (), settings(patient="who"))
