import html
import json
import re
import shutil
from collections import Counter
from dataclasses import fields
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.browser import CHROMIUM, Browser
from vlsm.datasets.inspection import EXAMPLES_SCHEMA
from vlsm.errors import ResultError
from vlsm.evaluation.lesions import LesionTotals
from vlsm.evaluation.presence import PresenceTotals
from vlsm.evaluation.tables import TableRow
from vlsm.report import pictures
from vlsm.report.__main__ import main
from vlsm.report.evaluations import _split_columns
from vlsm.report.glossary import explain
from vlsm.report.survey import ROW, Extremes, Sample, Survey, scan
from vlsm.report.write import write_report
from vlsm.runs.results import open_results, write_part
from vlsm.segmentation.masks import encode_mask
from vlsm.training.history import MEAN, History, Row

HOSTILE = "<script>alert(1)</script>.png"
QUOTES = "\"'><img src=x onerror=alert(2)>.png"
CJK = "息肉、扁平的"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def write_record(folder, **more):
    folder.mkdir(exist_ok=True)
    record = {
        "config": {"input": "s3://secret/place/archive", "members": [{"checkpoint": "s3://b/k/first"}], "window": None}
    }
    record |= {"plan": {"num_images": 300, "is_complete": True}, "checkpoint_digests": ["ab" * 32]}
    record |= {"versions": {"vlsm": "0.1.0"}, "git_revision": "cd" * 20, "planned_at": "2026-01-02T03:04:05+00:00"}
    (folder / "config.yaml").write_text(yaml.safe_dump(record | more), encoding="utf-8")


def noise_images(folder):
    """A few images that no encoder makes small, 600 x 450, and one mask for all."""
    generator, folder = np.random.default_rng(0), folder / "secret place"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (450, 600, 3), np.uint8)).save(path, compress_level=1)
    mask = np.zeros((450, 600), np.uint8)
    mask[120:260, 200:460] = 1
    return paths, mask


def common(number, paths):
    name = {0: HOSTILE, 1: QUOTES}.get(number, f"{number:03d}.png")
    return {"image_id": name, "image_uri": str(paths[number % 3]), "prompt": (CJK, "flat </style> polyp")[number % 2]}


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """A run of 300 noise images in two parts, 20 of them failed, one gone since."""
    folder = tmp_path_factory.mktemp("segmented")
    paths, mask = noise_images(folder)
    generator, rows = np.random.default_rng(1), []
    for number in range(300):
        row = common(number, paths) | {"kind": "mask", "model": "m@1", "status": "ok", "height": 450, "width": 600}
        row |= {"mask_rle": encode_mask(mask), "area_fraction": generator.random() / 3, "agreement": generator.random()}
        row |= {"confidence": generator.uniform(0.5, 1) if number % 7 else None}
        if number % 15 == 1:
            row |= dict.fromkeys(("mask_rle", "area_fraction", "agreement", "confidence"))
            row |= {"status": "failed", "error": f"corrupt: {row['image_uri']} is <b>broken</b>"}
        rows += [row, row | {"kind": "member 1", "confidence": 0.001}]
    rows[4] |= {"image_uri": str(folder / "secret place" / "gone.png"), "confidence": 0.4}
    output = folder / "out"
    write_record(output)
    write_part(str(output), 0, rows[:400], "run", 0)
    write_part(str(output), 1, rows[400:], "run", 0)
    return output


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of two systems on 60 noise images."""
    folder = tmp_path_factory.mktemp("evaluated")
    paths, mask = noise_images(folder)
    generator, rows = np.random.default_rng(2), []
    for system in ("first", "second <i>"):
        for number in range(60):
            shifted = np.roll(mask, number, axis=1)
            row = common(number, paths) | {"dataset": "kvasir", "system": system, "prompt_name": "p1", "split": "test"}
            row |= {"prompt_class": "honest", "status": "ok", "height": 450, "width": 600, "error": None}
            row |= {"dice": generator.random(), "confidence": generator.uniform(0.5, 1), "area_fraction": 0.127}
            rows.append(row | {"mask_rle": encode_mask(shifted), "target_rle": encode_mask(mask)})
    output = folder / "out"
    write_record(output)
    pq.write_table(pa.Table.from_pylist(rows), output / "scores.parquet")
    scores = pd.DataFrame(rows).groupby("system").dice.agg(["count", "mean"]).reset_index()
    table = scores.rename(columns={"count": "n"}).assign(dataset="kvasir", prompt_name="p1", prompt_class="honest")
    table.assign(ci_low=table["mean"] - 0.07, ci_high=table["mean"] + 0.07).to_csv(output / "table.csv", index=False)
    (output / "summary.json").write_text("{}")
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs of a training on 12 drawn examples, with one to come."""
    folder = tmp_path_factory.mktemp("trained")
    paths, mask = noise_images(folder)
    Image.fromarray(mask * 255).save(folder / "mask.png")
    facts = {"height": 450, "width": 600, "area_fraction": 0.127, "error": None}
    examples = [
        {"dataset": "kvasir", "split": ("train", "val")[number % 2], "where": "x", "image_uri": str(paths[number % 3])}
        | {"mask_uri": str(folder / "mask.png"), "prompts": [("p1", ["polyp"])], **facts}
        for number in range(12)
    ]
    examples.append(examples[0] | {"image_uri": "lost.png", "error": "missing"})  # left out by data.skip_broken
    rows = [
        Row(epoch, 3 * epoch, split, dataset, 1 / epoch, 0.3125 * epoch, 6, 0.1, 1.0, 1.0)
        for epoch in (1, 2)
        for split in ("train", "val")
        for dataset in ("kvasir", MEAN)
    ]
    output = folder / "out"
    data = {"mask_threshold": 127, "max_pixels": 10**8, "max_image_bytes": 10**8}
    config = {"model": "unet", "data": data, "optim": {"epochs": 3, "monitor": "dice"}}
    write_record(output, config=config, plan={"records": {"train kvasir": 6, "val kvasir": 6}})
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES_SCHEMA), output / "examples.parquet")
    pq.write_table(History(rows).table(), output / "metrics.parquet")
    return output


@pytest.fixture(scope="module")
def pages(segmented, evaluated, trained, tmp_path_factory):
    """The three reports' paths."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        name: Path(write_report(str(output), folder / f"{name}.html"))
        for name, output in (("segmented", segmented), ("evaluated", evaluated), ("trained", trained))
    }


def stats(page):
    """The headline figures of a page."""
    found = re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page.partition("<nav")[0])
    return {html.unescape(label): value for label, value in found}


@pytest.mark.parametrize("name", ["segmented", "evaluated", "trained"])
def test_a_page_asks_for_nothing_and_is_small(pages, name):
    page = pages[name].read_text(encoding="utf-8")
    assert len(page.encode()) < 10e6
    found = Tags(page)
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(key) or "data:").startswith(("data:image/webp;base64,", "#", "data:"))
    assert Counter(tag for tag, _ in found.tags)["script"] == 1
    assert not re.search(r"url\(|@import|https?://", page)
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_the_figures_of_a_segment_run_are_those_of_its_rows(pages, segmented):
    frame = pd.read_parquet(segmented / "masks")
    frame = frame[frame.kind == "mask"]
    page = pages["segmented"].read_text(encoding="utf-8")
    counts = frame.status.value_counts()
    shown = stats(page)
    assert [shown["Images"], shown["Ok"], shown["Failed"]] == ["300", str(counts["ok"]), str(counts["failed"])]
    for name in ("confidence", "agreement", "area_fraction"):
        label = f"{name.replace('_', ' ').capitalize()}, median"
        assert float(shown[label]) == pytest.approx(frame[name].median(), abs=2e-3)
    least = frame.nsmallest(6, "confidence").image_id.tolist()
    titles = [html.unescape(title) for title in re.findall(r'class="title" title="([^"]*)"', page)]
    assert titles[:6] == least
    largest = frame.nlargest(6, "area_fraction").image_id.tolist()
    assert titles[12:18] == largest
    assert "This run is not complete: 300 of 300 planned images" in page


def test_the_figures_of_an_evaluation_are_those_of_its_scores(pages, evaluated):
    frame = pd.read_parquet(evaluated / "scores.parquet")
    page = pages["evaluated"].read_text(encoding="utf-8")
    means = frame.groupby("system").dice.mean()
    assert stats(page)["Mean Dice, the best of the table"] == f"{means.max():.3f}"
    assert f"interval {means.max() - 0.07:.3f} to {means.max() + 0.07:.3f}" in page
    own = frame[frame.system == means.idxmax()]
    titles = [html.unescape(title) for title in re.findall(r'class="title" title="([^"]*)"', page)]
    assert titles[:6] == own.nlargest(6, "dice").image_id.tolist()
    assert titles[12:18] == own.nsmallest(6, "dice").image_id.tolist()
    around = (own.dice - own.dice.median()).abs()
    assert around[own.image_id.isin(titles[6:12])].max() <= around.nsmallest(8).max()
    counted = [
        int(n) for n in re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)</title>", page.partition("Confidence</fig")[0])
    ]
    assert sum(counted) == len(frame)


def test_the_figures_of_a_training_are_those_of_its_metrics(pages):
    page = pages["trained"].read_text(encoding="utf-8")
    shown = stats(page)
    assert shown["Validation Dice"] == "0.625"
    assert shown["Best epoch"] == "2"
    assert shown["Examples"] == "12"  # the one that is left out is none
    assert "not complete: 2 of 3 epochs" in page
    assert page.count('class="line c-0') == 8  # loss and Dice, train and val, each with its key
    assert page.count('class="card"') == 6  # the same image and mask twice is one picture


@pytest.mark.parametrize("name", ["segmented", "evaluated"])
def test_names_prompts_and_errors_stay_text(pages, name):
    page = pages[name].read_text(encoding="utf-8")
    found = Tags(page)
    assert not [attributes for tag, attributes in found.tags if tag == "img" and attributes["src"] == "x"]
    assert HOSTILE in "".join(found.text)  # its folder and its name are two spans
    assert CJK in page or json.dumps(CJK)[1:-1] in page
    assert "<b>broken" not in page


def test_a_page_tells_no_folders(pages):
    for path in pages.values():
        page = path.read_text(encoding="utf-8")
        assert "secret" not in page
    assert "…/first" in pages["segmented"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("missing: there is no file /a b/c.png", "missing: there is no file c.png"),
        ("missing: s3://bucket/run has no such image", "missing: run has no such image"),
        ("corrupt: s3://bucket/x/y.tar#a/b.png and/or c", "corrupt: y.tar#a/b.png and/or c"),
    ],
)
def test_errors_are_told_without_folders(error, told):
    assert pictures.describe_error({"error": error, "image_uri": "/a b/c.png"}) == told


def test_an_image_that_is_gone_has_its_reason(pages):
    problems = re.findall(r'class="problem">([^<]*)<', pages["segmented"].read_text(encoding="utf-8"))
    assert "missing: there is no file gone.png" in {problem.strip() for problem in problems}
    assert {problem.partition(":")[0] for problem in problems} == {"missing", "corrupt"}


def test_the_same_run_gives_the_same_page(pages, trained, segmented, tmp_path):
    assert Path(write_report(str(trained), tmp_path / "again.html")).read_bytes() == pages["trained"].read_bytes()
    surveys = [Survey(metric="confidence", group="prompt") for _ in range(2)]
    for survey in surveys:
        for table in scan(open_results(str(segmented))):
            survey.add(table)
    assert surveys[0].sample.rows(100) == surveys[1].sample.rows(100)


def test_the_columns_of_a_table_are_divided_by_what_they_tell():
    names = [field.name for field in fields(TableRow) if field.name not in ("lesions", "presence")]
    names += [field.name for group in (LesionTotals, PresenceTotals) for field in fields(group)]
    row = dict.fromkeys(names, 1.0) | dict.fromkeys(("dataset", "prompt_name", "prompt_class", "system"), "x")
    tables = [list(table[0]) for table in _split_columns([row])]
    assert len(tables) == 4 and set().union(*tables) == set(names)
    main, more, presence, lesions = (set(table) for table in tables)
    assert {"dice_mean", "negatives_n"} <= main and {"hd95_median", "nsd_mean"} <= more
    assert {"sensitivity", "presence_auroc"} <= presence and {"panoptic_quality", "touch_f1"} <= lesions
    assert all({"dataset", "system"} <= set(table) for table in tables)
    earlier = {name: value for name, value in row.items() if name in names[:25]}
    assert len(_split_columns([earlier])) == 2
    assert all(map(explain, (presence | lesions) - main))


def test_an_evaluation_without_its_table_has_a_page(evaluated, tmp_path):
    rows = pq.read_table(evaluated / "scores.parquet").slice(0, 3).drop_columns(["prompt_name"])
    write_record(tmp_path / "begun")
    pq.write_table(rows, tmp_path / "begun" / "scores.parquet")
    page = Path(write_report(str(tmp_path / "begun"), tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "This evaluation is not complete." in page
    assert stats(page)["Dice, median"] == f"{np.median(rows['dice'].to_numpy()):.3f}"
    assert page.count('class="card"') == 3


def test_a_damaged_summary_is_named(evaluated, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(evaluated, output)
    (output / "summary.json").write_text("{damaged")
    with pytest.raises(ResultError, match=r"run/summary.json is damaged: .*; remove it"):
        write_report(str(output), tmp_path / "page.html")


def test_slices_and_masks_of_one_image_are_cards_of_their_own(tmp_path):
    """An evaluation of three slices of a volume that is cut sideways, each with two masks in one file."""
    volume = np.zeros((30, 40, 20), np.uint8)
    volume[10:20] = 200
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "v.nii")
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 5:10] = 1
    rows = [
        {"image_id": f"v#slice={number}", "image_uri": str(tmp_path / "v.nii"), "selector": f"slice={number}"}
        | {"mask_uri": "labels.nii", "record": f"row {number}, mask {label}", "prompt": "x", "prompt_name": "record"}
        | {"dataset": "d", "system": "s", "split": "test", "status": "ok", "error": None, "height": 20, "width": 40}
        | {"dice": 0.5, "mask_rle": encode_mask(mask), "target_rle": encode_mask(mask), "prompt_class": "honest"}
        for number in (0, 10, 11)
        for label in (1, 2)
    ]
    config = {"datasets": {"d": "x"}, "systems": {}, "data": {"slices": "sagittal", "columns": {"mask_uri": "mask"}}}
    write_record(tmp_path / "out", config=config)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "out" / "scores.parquet")
    page = Path(write_report(str(tmp_path / "out"), tmp_path / "page.html")).read_text(encoding="utf-8")
    assert page.count('class="card"') == 6
    assert 'class="problem"' not in page


def test_outlines_are_seen_where_prediction_and_target_agree_and_where_they_do_not():
    image, mask = np.zeros((300, 300, 3), np.uint8), np.zeros((300, 300), np.uint8)
    mask[100:200, 100:200] = 1
    for target in (mask, np.roll(mask, 40, axis=0)):
        picture = np.asarray(pictures._fit(image, (mask, target), 480)[0])
        colors = Counter(map(tuple, picture.reshape(-1, 3).tolist()))
        assert min(colors[pictures.PREDICTION], colors[pictures.TARGET]) > 500


def test_rows_are_kept_by_number_and_not_by_run(tmp_path):
    rows = [
        {"image_id": f"{number:05d}", "image_uri": "x", "prompt": f"prompt {number}", "kind": "mask", "model": "m"}
        | {"status": "ok", "confidence": (number * 7919 % 10007) / 10007, "agreement": float("nan")}
        for number in range(9000)
    ]
    for part in range(3):
        write_part(str(tmp_path), part, rows[part * 3000 : part * 3000 + 3000], "run", 0)
    survey, lowest = Survey(metric="confidence", group="prompt"), Extremes("confidence")
    for table in scan(open_results(str(tmp_path))):
        survey.add(table)
        lowest.add(table)
    assert survey.num_rows == survey.images.total() == 9000
    assert survey.total("agreement") is None
    assert survey.total("confidence").count == 9000
    assert len(survey.values["prompt"]) <= 1001
    assert len(survey.distributions) <= 801
    assert [row["image_id"] for row in lowest.rows(3)] == [
        row["image_id"] for row in sorted(rows, key=lambda row: row["confidence"])[:3]
    ]
    chosen = survey.sample.rows(240)
    assert len({row["image_id"] for row in chosen}) == 240


def test_a_sample_has_some_of_each_kind():
    rows = [
        {"image_id": str(n), "status": "ok" if n % 100 else "failed", "confidence": 0.9 if n % 50 else 0.1}
        for n in range(2000)
    ]

    sample = Sample("confidence")
    table = pa.Table.from_pylist([row | {"priority": n / 2000} for n, row in enumerate(rows)], schema=ROW)
    sample.add(table)
    counts = Counter((row["status"], row["confidence"]) for row in sample.rows(45))
    assert len({(row["status"], row["confidence"]) for row in sample.rows(45)[:3]}) == 3  # what is cut off is no kind
    assert counts == {("ok", 0.9): 15, ("ok", 0.1): 15, ("failed", 0.1): 15}


def test_the_report_lies_beside_its_run_wherever_the_command_is_called(trained, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(trained, tmp_path / "runs" / "first")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}.html\n"
    assert {path.name for path in run.parent.iterdir()} == {"first", "first.html"}
    assert main([str(run), "mine/page.html"]) == 0
    assert (tmp_path / "here" / "mine" / "page.html").read_bytes() == (run.parent / "first.html").read_bytes()
    assert main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "labels.csv").write_text("mine")
    assert main([str(run), str(tmp_path / "labels.csv")]) == 2 and (tmp_path / "labels.csv").read_text() == "mine"
    assert "there is no run in" in capsys.readouterr().err


def test_the_page_is_part_of_the_package():
    folder = resources.files("vlsm.report")
    assert all(folder.joinpath(f"page.{kind}").is_file() for kind in ("html", "css", "js"))


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("name", ["segmented", "evaluated", "trained"])
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)])
def test_a_page_opens_without_complaint_and_fits_its_window(pages, browser, tmp_path, name, size):
    browser.errors.clear()
    browser.open(pages[name], *size, dark=size[0] < 600)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert browser.run(f"{boxes}.every(box => box.scrollWidth <= box.clientWidth)")  # no table is wider than the page
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as seen:
        assert seen.size == size
        assert len(set(seen.convert("L").resize((60, 60)).tobytes())) > 10
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "about"}


VISIBLE = "[...document.querySelectorAll('.card:not([hidden])')]"


def choose(browser, selector, value):
    browser.run(
        f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(value)};"
        " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


@needs_chromium
def test_the_gallery_is_filtered_and_sorted(pages, browser):
    browser.open(pages["segmented"])
    confidences = f"{VISIBLE}.map(card => JSON.parse(card.dataset.numbers).confidence ?? null)"
    assert browser.run(f"{VISIBLE}.length") == 60
    choose(browser, "#sort", "-confidence")
    values = browser.run(confidences)
    assert values == sorted(values, reverse=True)
    choose(browser, "[data-number=confidence] input", "0.9")
    assert min(browser.run(confidences)) >= 0.9
    browser.run("document.querySelector('#controls').reset()")
    choose(browser, "[data-word=status]", "failed")
    assert browser.run(f"new Set({VISIBLE}.map(card => JSON.parse(card.dataset.words).status)).size") == 1
    number = browser.run(f"{VISIBLE}.length")
    assert number == 20
    assert browser.run("document.querySelector('#count').textContent") == f"{number} of 240"
    choose(browser, "[data-word=status]", "")
    choose(browser, "#search", "<SCRIPT>")
    assert browser.run(f"{VISIBLE}.map(card => card.querySelector('.title').textContent)") == [HOSTILE]
    assert browser.run("[...document.querySelectorAll('[data-word=prompt] option')].map(o => o.value)") == [
        "",
        "flat </style> polyp",
        CJK,
    ]
    choose(browser, "#search", "")
    browser.run("document.querySelector('#more').click()")
    assert browser.run(f"{VISIBLE}.length") == 120


@needs_chromium
def test_a_picture_is_enlarged_and_put_back_with_the_keyboard(pages, browser):
    browser.errors.clear()
    browser.open(pages["segmented"])
    first = "document.querySelector('.case .open')"
    browser.run(f"{first}.focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#viewer').open")
    title = browser.run("document.querySelector('#shown h2').textContent")
    assert title == browser.run(f"{first}.querySelector('.title').textContent")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#shown h2').textContent") != title
    assert browser.run("document.querySelectorAll('#shown img').length") == 2
    browser.press("Escape")
    assert not browser.run("document.querySelector('#viewer').open")
    assert browser.run("document.activeElement.className") == "open"
    assert browser.errors == []
