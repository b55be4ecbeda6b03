"""What a reader of a report sees first and could misread: calibration, reasons, counts and words."""

import html
import json
import re
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.browser import CHROMIUM, Browser
from tests.conftest import save_square
from vlsm.config import SegmentSettings, load_settings
from vlsm.datasets.inspection import EXAMPLES_SCHEMA
from vlsm.report.charts import draw_ridge, format_count
from vlsm.report.distribution import Distribution
from vlsm.report.status import read_status
from vlsm.report.write import write_report
from vlsm.runs.plan import write_plan
from vlsm.runs.record import make_record, write_record
from vlsm.runs.results import read_rows, write_part
from vlsm.runs.schema import COLUMN_NOTES, part_schema
from vlsm.segmentation.masks import encode_mask
from vlsm.training.history import MEAN, History, Row

PROMPTS = ["polyp", "息肉 <b>"]
CALIBRATION = {"temperature": 1.3, "threshold": 0.45, "num_images": 100, "error_before": 0.1, "error_after": 0.02}
CALIBRATION |= {"dice_at_half": 0.7, "dice": 0.8, "min_confidence": 0.6, "area_fraction": [0.01, 0.4]}
CALIBRATION |= {"reliability": [[0.1, 0.1, 0.9], [0.9, 0.8, 0.1]]}


@pytest.fixture
def output(tmp_path):
    """Six images with two prompts: one image failed, one mask is empty, three have reasons for a review."""
    plan_row = {"selector": None, "offset": None, "length": None, "problem": None, "prompts": PROMPTS}
    plan_row |= {"image_version": None, "size_bytes": None, "etag": None, "mtime": None}
    images = [
        plan_row | {"image_id": f"{number}.png", "image_uri": str(tmp_path / f"{number}.png")} for number in range(6)
    ]
    (tmp_path / "checkpoint").mkdir()
    write_calibration(tmp_path, None)
    words = {
        "input": str(tmp_path),
        "output": str(tmp_path / "out"),
        "members": [{"checkpoint": str(tmp_path / "checkpoint")}],
    }
    settings = load_settings(
        SegmentSettings, None, [f"prompts={json.dumps(PROMPTS)}", "review.min_confidence=0.6"], words
    )
    plan = write_plan(str(tmp_path / "out"), images, 100)
    write_record(str(tmp_path / "out"), make_record(settings, {"run_id": "run"}, asdict(plan)))
    rows = []
    for number, image in enumerate(images):
        for prompt in PROMPTS:
            row = {name: image[name] for name in ("image_id", "image_uri")}
            row |= {"prompt": prompt, "kind": "mask", "model": "clipseg@0123"}
            if number == 5:
                rows.append(row | {"status": "failed", "error": "missing: there is no such file"})
                continue
            mask = (save_square(image["image_uri"])[..., 0] > 128).astype(np.uint8)
            mask *= not (number == 0 and prompt == "polyp")
            review = {1: "low confidence", 2: "low confidence, odd area"}.get(number) if prompt == "polyp" else None
            row |= {"height": 60, "width": 90, "mask_rle": encode_mask(mask), "area_fraction": float(mask.mean())}
            rows.append(row | {"status": "ok", "confidence": 0.84 if mask.any() else None, "review": review})
    write_part(str(tmp_path / "out"), 0, rows, "run", 0)
    return tmp_path / "out"


def write_calibration(folder, calibration):
    (folder / "checkpoint" / "checkpoint.yaml").write_text(yaml.safe_dump({"calibration": calibration}))


def page_of(output):
    with open(write_report(str(output), output.parent / "page.html"), encoding="utf-8") as file:
        return file.read()


def header(page):
    """The labels and texts of the first screen."""
    found = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page.partition("<nav")[0])
    return {html.unescape(label): html.unescape(text) for label, text in found}


def test_the_first_screen_says_what_the_results_are_of(output):
    shown = header(page_of(output))
    assert shown["Model"] == "clipseg@0123"
    assert shown["2 prompts"] == ", ".join(PROMPTS)
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+ 20\d\d, \d\d:\d\d UTC", shown["Date"])


def test_the_calibration_is_the_one_that_the_run_has_recorded(output):
    """The checkpoint may have been calibrated, or deleted, since."""
    record = yaml.safe_load((output / "config.yaml").read_text())

    def shown(recorded, now):
        fact = {"model": "clipseg", "calibration": recorded}
        (output / "config.yaml").write_text(yaml.safe_dump(record | {"checkpoints": [fact]}))
        write_calibration(output.parent, now)
        page = page_of(output)
        return header(page)["Calibration"], 'id="calibration"' in page

    numbers = {key: value for key, value in CALIBRATION.items() if key != "reliability"}
    assert shown(None, CALIBRATION) == ("not calibrated", False)
    assert shown(numbers, None) == ("calibrated on 100 validation images", True)
    assert shown(numbers | {"num_images": 70}, CALIBRATION)[0] == "calibrated on 70 validation images"
    (output.parent / "checkpoint" / "checkpoint.yaml").unlink()
    assert header(page_of(output))["Calibration"] == "calibrated on 70 validation images"


@pytest.mark.parametrize(
    ("planned_at", "shown"),
    [(None, "unknown"), ("<b>yesterday", "<b>yesterday"), ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00+14:00")],
)
def test_a_date_that_is_none_does_not_stop_the_report(output, planned_at, shown):
    record = yaml.safe_load((output / "config.yaml").read_text())
    (output / "config.yaml").write_text(yaml.safe_dump(record | {"planned_at": planned_at}))
    assert header(page_of(output))["Date"] == shown


def test_a_confidence_without_calibration_is_not_taken_for_quality(output):
    doubt = "it does not tell how good the masks are"
    page = page_of(output)
    assert header(page)["Calibration"] == "not calibrated"
    assert doubt in page.partition("<nav")[0].partition("Confidence, median")[2]
    write_calibration(output.parent, CALIBRATION)
    page = page_of(output)
    assert header(page)["Calibration"] == "calibrated on 100 validation images"
    assert doubt not in page
    (output.parent / "checkpoint" / "checkpoint.yaml").unlink()
    page = page_of(output)
    assert header(page)["Calibration"].startswith("unknown")
    assert doubt in page


def test_reasons_for_a_review_and_empty_masks_are_counted_and_filtered(output):
    page = page_of(output)
    table = page.partition('id="review"')[2].partition("</table>")[0]
    rows = [re.findall(r"<span>([^<]*)</span>", row) for row in table.split("<tr>")[2:]]
    assert [row[:2] for row in rows] == [["low confidence", "2"], ["odd area", "1"], ["empty mask", "1"]]
    assert rows[0][2:] == ["20.0 %", "confidence below 0.6"]
    assert (header(page)["Marked for review"], header(page)["Empty masks"]) == ("2", "1")
    cards = [json.loads(html.unescape(words)) for words in re.findall(r'data-words="([^"]*)"', page)]
    assert sorted(card.get("review", []) for card in cards if "review" in card) == [
        ["low confidence"],
        ["low confidence", "odd area"],
    ]
    assert [card["mask"] for card in cards if card.get("mask") == "empty"] == ["empty"]
    for name in ("review", "mask"):
        assert f'<select data-word="{name}">' in page
    assert "<h3>Empty masks" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_gallery_shows_the_masks_with_one_reason(output):
    page_of(output)
    titles = "[...document.querySelectorAll('.card:not([hidden]) .title')].map(title => title.textContent)"
    with Browser() as browser:
        browser.open(output.parent / "page.html")
        for word, value, images in (
            ("review", "low confidence", ["1.png", "2.png"]),
            ("review", "odd area", ["2.png"]),
            ("mask", "empty", ["0.png"]),
        ):
            browser.run("document.querySelector('#controls').reset()")
            browser.run(
                f"(() => {{ const field = document.querySelector('[data-word={word}]'); field.value = '{value}';"
                " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
            assert sorted(browser.run(titles)) == images
        assert browser.errors == []


def test_failed_is_the_number_of_images_everywhere(output):
    page = page_of(output)
    assert sum(row["status"] == "failed" for row in read_rows(str(output))) == 2
    assert read_status(str(output)).failed == 1
    assert header(page)["Failed"] == "1"
    table = page.partition('id="failures"')[2].partition("</table>")[0]
    assert ("Images</th>" in table, re.findall(r"<span>([^<]*)</span>", table)[:2]) == (True, ["missing", "1"])


def test_an_image_with_several_prompts_is_one_picture_with_a_legend(output):
    section = page_of(output).partition('id="prompts-together"')[2].partition("</section>")[0]
    assert section.count("<img ") == 5
    assert section.count('fill="#56b4e9"') == section.count('fill="#e69f00"') == 5
    assert "息肉 &lt;b&gt;" in section and "polyp (empty)" in section


def test_headings_are_words_and_the_page_explains_them(output):
    page = page_of(output)
    heads = re.findall(r"<th scope[^>]*>([^<]*)</th>", page)
    assert heads and not [head for head in heads if "_" in head]
    words = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page.partition('id="words"')[2]))
    assert "mean probability of the pixels inside a mask" in words["Confidence"]
    assert "low confidence" in words["Review"]


def test_the_columns_of_the_output_say_in_the_file_what_they_mean(output):
    path = output / "masks" / "part-00000000.parquet"
    written = pq.read_schema(path)
    assert set(COLUMN_NOTES) == {*written.names, "embedding"}  # which only a run that asks for it has
    for name in written.names:
        assert written.field(name).metadata == {b"description": COLUMN_NOTES[name].encode()}
    before = list(read_rows(str(output)))
    table = pq.read_table(path)
    plain = pa.schema([field.remove_metadata() for field in table.schema], table.schema.metadata)
    pq.write_table(table.cast(plain), path)  # as earlier versions wrote it
    assert list(read_rows(str(output))) == before
    assert part_schema(0).equals(plain, check_metadata=False)


def test_a_histogram_has_counts_at_its_axis():
    distribution = Distribution()
    distribution.add(np.array([0.5] * 1234 + [0.9]))
    for groups in ([("", distribution)], [("a", distribution), ("b", distribution)]):
        for row in draw_ridge("x", groups).rows:
            heights = {text: y for y, text in row.counts}
            assert (heights["0"], "1,234" in heights) == (row.base, True)
            assert heights["1,234"] == pytest.approx(min(y for _, y, *_ in row.bars), abs=0.01)
    assert [format_count(count) for count in (99_999, 123_456, 1_234_567, 10**10)] == ["99,999", "123k", "1.23M", "10G"]


@pytest.fixture
def trained(tmp_path):
    """One epoch of a training on eight examples; the first one of val is also one of train, another looks like it."""
    mask = (save_square(tmp_path / "square.png")[..., 0] > 128).astype(np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    hashes = np.random.default_rng(0).integers(1 << 63, size=8)  # about 32 bits of any two differ
    examples = [
        {"dataset": "d", "split": ("train", "val")[number % 2], "where": f"row {number}", "error": None, "height": 60}
        | {"image_uri": str(tmp_path / "square.png"), "mask_uri": str(tmp_path / "mask.png"), "width": 90}
        | {"prompts": [("p1", ["polyp"])], "image_sha256": f"file {number}", "image_hash": int(hashes[number])}
        for number in range(8)
    ]
    examples[1] |= {"image_sha256": "file 0", "image_hash": examples[0]["image_hash"]}
    examples[3]["image_hash"] = examples[2]["image_hash"] ^ 0b11
    rows = [Row(1, 3, split, name, 1.0, 0.3, 6, 0.1, 1.0, 1.0) for split in ("train", "val") for name in ("d", MEAN)]
    output = tmp_path / "out"
    output.mkdir()
    config = {"model": "pixel", "data": {}, "optim": {"epochs": 1, "monitor": "dice"}}
    record = {"config": config, "plan": {"records": {"train d": 4, "val d": 4}, "epochs": 1}}
    (output / "config.yaml").write_text(yaml.safe_dump(record))
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES_SCHEMA), output / "examples.parquet")
    pq.write_table(History(rows).table(), output / "metrics.parquet")
    return output


def test_a_training_shows_what_its_checkpoint_predicts(trained, bright_checkpoint):
    page = page_of(trained)
    assert "None: the checkpoint cannot be used." in page.partition('id="predictions"')[2].partition("</section>")[0]
    (trained / "checkpoint").symlink_to(bright_checkpoint)
    page = page_of(trained)
    section = page.partition('id="predictions"')[2].partition("</section>")[0]
    assert "4 of 4 validation images" in section
    assert section.count("<img ") == 4
    dices = [float(text) for text in re.findall(r"<dt>Dice</dt><dd>([\d.]+)</dd>", section)]
    assert dices == sorted(dices) and min(dices) > 0.9
    assert header(page)["Calibration"].startswith("not calibrated yet")


def test_a_training_names_images_that_are_alike_in_two_splits(trained):
    section = page_of(trained).partition('id="twins"')[2].partition("</section>")[0]
    cells = re.findall(r"<span>([^<]*)</span>", section)
    assert ["val of d", "train of d", "1", "1"] == cells[:4]
    assert ["val of d", "train of d", "1", "–"] == cells[4:8]
    assert section.count('<li class="case">') == 2
    assert re.findall(r"(\d+) of 64 bits", section) == ["0", "2"]
    table = pq.read_table(trained / "examples.parquet")
    pq.write_table(table.drop_columns(["image_hash"]), trained / "examples.parquet")  # as earlier versions wrote it
    assert 'id="twins"' not in page_of(trained)
    others = pa.array(
        [0x1234_5678_9ABC_DEF0 if split == "train" else 0x0FED_CBA9 for split in table["split"].to_pylist()]
    )
    table = table.set_column(table.column_names.index("image_hash"), "image_hash", others.cast(pa.uint64()))
    files = pa.array([f"file {number}" for number in range(len(table))])
    table = table.set_column(table.column_names.index("image_sha256"), "image_sha256", files)
    pq.write_table(table.cast(EXAMPLES_SCHEMA), trained / "examples.parquet")
    assert "None: no image of val or test looks like" in page_of(trained)
