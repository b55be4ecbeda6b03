"""The gallery as a place for a review: marks by key and by hand, kept by the browser, saved and loaded as files."""

import html
import json
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from tests.browser import CHROMIUM, Browser
from tests.report.reviewed import KVASIR, NAMES, PROMPT, RUN_ID, write_run
from vlsm.errors import ConfigError
from vlsm.images.overlays import outline_path, shrink_mask
from vlsm.report.__main__ import main
from vlsm.report.reviews import Gallery, review_id
from vlsm.report.write import write_report
from vlsm.runs.marks import digest_mask, read_marks
from vlsm.runs.results import read_rows

pytestmark = pytest.mark.skipif(not KVASIR.is_dir(), reason="needs ../shared/data/kvasir_seg")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
NUMBER = 12
CARD = "document.querySelectorAll('#cards li:not([hidden])')"
CSV, JSON = f"marks-{RUN_ID[:8]}.csv", f"marks-{RUN_ID[:8]}.json"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("reviewed") / "out", NUMBER, NAMES)


@pytest.fixture(scope="module")
def page(output):
    return Path(write_report(str(output)))


@pytest.fixture(scope="module")
def chromium():
    with Browser() as opened:
        yield opened


@pytest.fixture
def browser(chromium, page):
    """A browser that shows the page and has no marks."""
    chromium.open(page)
    chromium.run("localStorage.clear()")
    chromium.errors.clear()
    chromium.open(page)
    return chromium


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def ids(browser, mark=""):
    """The image_ids of the visible cards, or of those with a mark."""
    visible = f"[...{CARD}].filter(card => !{json.dumps(mark)} || card.dataset.mark === {json.dumps(mark)})"
    return browser.run(f"{visible}.map(card => JSON.parse(card.dataset.row)[0])")


def press(browser, keys):
    for key in keys:
        browser.press(key)


def rows_of(table):
    return {(row["image_id"], row["mark"]) for row in table.to_pylist()}


@needs_chromium
def test_keys_mark_masks_and_the_marks_survive_a_reload(browser, page):
    order = ids(browser)
    assert text(browser, "#marked") == f"0 of {NUMBER} marked"
    press(browser, "aarx")  # the first key chooses the first mask, and marks nothing
    for again in (False, True):
        if again:
            browser.open(page)
        assert ids(browser, "accept") == order[:1]
        assert ids(browser, "redo") == order[1:2]
        assert ids(browser, "reject") == order[2:3]
        assert text(browser, "#marked") == f"3 of {NUMBER} marked"
        assert text(browser, "#numbers") == "1 accepted, 1 redo, 1 rejected"
    assert browser.errors == []


@needs_chromium
def test_keys_move_undo_and_change_a_mark(browser):
    order = ids(browser)
    current = "JSON.parse(document.querySelector('.current').dataset.row)[0]"
    press(browser, ["j", "j", "ArrowRight", "k"])
    assert browser.run(current) == order[1]
    columns = browser.run(f"[...{CARD}].filter(card => card.offsetTop === {CARD}[0].offsetTop).length")
    press(browser, ["ArrowLeft", "ArrowDown"])
    assert browser.run(current) == order[columns]
    press(browser, ["ArrowUp", "x", "ArrowLeft", "a", "r"])
    assert (ids(browser, "accept"), ids(browser, "redo"), ids(browser, "reject")) == ([order[0]], [order[1]], [])
    press(browser, "uu")
    assert (ids(browser, "accept"), ids(browser, "redo"), ids(browser, "reject")) == ([], [], [order[0]])
    assert browser.run(current) == order[0]
    press(browser, "uu")
    assert text(browser, "#marked") == f"0 of {NUMBER} marked"
    assert text(browser, "#said") == "There is nothing to undo."


@needs_chromium
def test_no_key_marks_while_somebody_types(browser):
    press(browser, "j")
    browser.run("document.querySelector('#search').focus()")
    press(browser, "ax")
    assert browser.run("document.querySelector('#search').value") == "ax"
    assert text(browser, "#marked") == f"0 of {NUMBER} marked"


@needs_chromium
def test_unmarked_masks_alone_are_shown_until_none_is_left(browser):
    order = ids(browser)
    show = "(() => { const field = document.querySelector('#marks'); field.value = %s;"
    show += " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    browser.run(show % "'unmarked'")
    press(browser, "jaa")
    assert ids(browser) == order[2:]
    press(browser, "u")
    assert ids(browser) == order[1:]
    press(browser, "x" * NUMBER)
    assert ids(browser) == []
    assert text(browser, "#marked") == f"{NUMBER} of {NUMBER} marked"
    browser.run(show % "'reject'")
    assert ids(browser) == order[1:]


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_buttons_mark_and_unmark_and_the_page_fits(browser, page, width, tmp_path):
    browser.open(page, width, 850)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    heights = browser.run("[...document.querySelectorAll('.card .verdict button')].map(b => b.offsetHeight)")
    assert min(heights) >= 44  # for a finger
    order = ids(browser)
    button = f"{CARD}[1].querySelector('[data-mark=redo]')"
    browser.run(f"{button}.click()")
    assert ids(browser, "redo") == [order[1]]
    assert browser.run(f"{button}.getAttribute('aria-pressed')") == "true"
    browser.run(f"{button}.click()")
    assert ids(browser, "redo") == []
    browser.run(f"{CARD}[0].querySelector('.open').click()")
    assert browser.run("document.querySelector('#viewer').open")
    assert browser.run("document.querySelector('#viewer').scrollWidth <= innerWidth")
    browser.run("document.querySelector('#verdict [data-mark=reject]').click()")
    assert ids(browser, "reject") == [order[0]]
    assert text(browser, "#shown h2") == order[1]  # it goes on
    browser.screenshot(tmp_path / "viewer.png")
    assert browser.errors == []


@needs_chromium
def test_the_outline_is_hidden_and_a_picture_is_zoomed(browser):
    press(browser, "jz")
    layer = "getComputedStyle(document.querySelector('#shown .layer')).display"
    width = "document.querySelector('#shown img').getBoundingClientRect().height"
    assert browser.run("document.querySelector('#viewer').open")
    before = browser.run(width)
    assert browser.run(layer) == "block"
    press(browser, "o")
    assert browser.run(layer) == "none"
    assert browser.run("getComputedStyle(document.querySelector('#cards .layer')).display") == "none"
    press(browser, "oz")
    assert browser.run(layer) == "block"
    assert browser.run(width) > 1.2 * before
    assert browser.run("document.querySelector('.pictures').scrollLeft + document.querySelector('.pictures').scrollTop")
    press(browser, "zz")
    assert browser.run(width) == pytest.approx(before)
    press(browser, ["a", "Escape"])
    assert text(browser, "#marked") == f"1 of {NUMBER} marked"


@needs_chromium
@pytest.mark.parametrize(("action", "name"), [("csv", CSV), ("json", JSON)])
def test_a_saved_file_has_the_marks_of_every_name_and_is_loaded_again(browser, page, output, tmp_path, action, name):
    """Names that a spreadsheet would take for formulas come back as they were."""
    marks = ("accept", "redo", "reject")
    order = ids(browser)
    assert set(NAMES) < set(order)
    press(browser, "j" + "".join("arx"[index % 3] for index in range(NUMBER)))
    path = browser.download(f"document.querySelector('[data-do={action}]').click()", tmp_path, name)
    table = read_marks(str(path))
    assert rows_of(table) == {(image, marks[index % 3]) for index, image in enumerate(order)}
    assert set(table["run_id"].to_pylist()) == {RUN_ID}
    assert set(table["prompt"].to_pylist()) == {PROMPT}
    digests = {row["image_id"]: digest_mask(row["mask_rle"]) for row in read_rows(str(output))}
    assert {row["image_id"]: row["mask_digest"] for row in table.to_pylist()} == digests
    assert None not in table["time"].to_pylist()
    browser.run("localStorage.clear()")
    browser.open(page)
    assert text(browser, "#marked") == f"0 of {NUMBER} marked"
    browser.choose_file("#load", path)
    wait_for(browser, "loaded")
    assert text(browser, "#marked") == f"{NUMBER} of {NUMBER} marked"
    assert ids(browser, "redo") == order[1::3]
    if action == "csv":
        cells = pd.read_csv(path)["image_id"]
        assert not [cell for cell in cells if cell[0] in "=+-@"]


def wait_for(browser, words):
    """Wait until the page says these words."""
    for _ in range(3000):
        if words in text(browser, "#said"):
            return
        browser.run("new Promise(resolve => setTimeout(resolve, 20))")
    raise TimeoutError(text(browser, "#said"))


@needs_chromium
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("run_id,image_id,prompt,mark,time\nother,a.png,polyp,accept,\n", "its marks are of another run"),
        (f"run_id,image_id,prompt,mark,time\n{RUN_ID},a.png,polyp,maybe,\n", "a row is no mark"),
        (f'run_id,image_id,prompt,mark,time\n{RUN_ID},"a.png,polyp,accept,\n', "a quote is not closed"),
        ('{"marks": 1}', "is not loaded"),
        ("", "it has no mark"),
    ],
)
def test_a_file_with_other_marks_changes_nothing(browser, tmp_path, content, reason):
    press(browser, "jx")
    (tmp_path / "other.csv").write_text(content)
    browser.choose_file("#load", tmp_path / "other.csv")
    wait_for(browser, reason)
    assert text(browser, "#marked") == f"1 of {NUMBER} marked"


@needs_chromium
def test_the_later_mark_counts_and_marks_of_other_masks_stay(browser, tmp_path):
    order = ids(browser)
    press(browser, "jx")
    lines = [f"{RUN_ID},elsewhere.png,{PROMPT},redo,2026-01-01T00:00:00Z,{'0' * 16}"]
    lines += [
        f"{RUN_ID},{name},{PROMPT},accept,{year}-01-01T00:00:00Z,"
        for name, year in zip(order[-2:], (1999, 2099), strict=True)
    ]
    lines += [f'{RUN_ID},"{json.dumps(order[0])[1:-1]}",{PROMPT},accept,1999-01-01T00:00:00Z,']
    (tmp_path / "more.csv").write_text("\n".join(["run_id,image_id,prompt,mark,time,mask_digest", *lines]))
    browser.choose_file("#load", tmp_path / "more.csv")
    wait_for(browser, "4 marks are loaded")
    assert ids(browser, "reject") == order[:1]  # the mark of 1999 is older
    assert ids(browser, "accept") == order[-2:]
    assert "1 of masks that are not on this page" in text(browser, "#numbers")
    table = read_marks(str(browser.download("document.querySelector('[data-do=csv]').click()", tmp_path, CSV)))
    assert ("elsewhere.png", "redo") in rows_of(table) and table.num_rows == 4


@needs_chromium
def test_a_mark_is_of_a_mask_and_not_of_its_name(browser, tmp_path):
    """The same run with other masks: marks of the earlier ones do not show, and a file has one for each image."""
    press(browser, "jaa")
    other = write_run(tmp_path / "out", NUMBER, NAMES, start=NUMBER)
    browser.open(write_report(str(other)))
    assert text(browser, "#marked") == f"0 of {NUMBER} marked"
    press(browser, "jx")
    table = read_marks(str(browser.download("document.querySelector('[data-do=csv]').click()", tmp_path, CSV)))
    counts = Counter(row["image_id"] for row in table.to_pylist())
    assert set(counts.values()) == {1}


def test_the_page_states_its_policy_and_asks_for_nothing(page):
    content = page.read_text(encoding="utf-8")
    assert re.search(r"default-src 'none'; img-src data:; style-src 'sha256-[^']+'; script-src 'sha256-", content)
    assert content.count("<script") == 1 and "unsafe" not in content
    assert not re.search(r"url\(|@import|https?://| on\w+=\"", content)
    assert str(KVASIR) not in content  # no folders


def test_rows_and_outlines_are_those_of_the_masks(page, output):
    content = page.read_text(encoding="utf-8")
    cards = [json.loads(html.unescape(row)) for row in re.findall(r'class="card" data-row="([^"]*)"', content)]
    rows = {row["image_id"]: row for row in read_rows(str(output))}
    assert {card[0] for card in cards} == set(rows)
    assert all(card[1:] == [PROMPT, digest_mask(rows[card[0]]["mask_rle"])] for card in cards)
    assert content.count('class="layer"') == NUMBER


@pytest.mark.parametrize("size", [(61, 90), (480, 640)])
@pytest.mark.parametrize("kind", ["disc", "ring", "dot", "two", "empty", "noise"])
def test_a_path_encloses_the_mask(size, kind):
    mask = np.zeros(size, np.uint8)
    if kind in ("disc", "ring"):
        cv2.circle(mask, (40, 30), 20, 1, -1)
        cv2.circle(mask, (40, 30), 8, 0, -1) if kind == "ring" else None
    elif kind == "two":
        mask[5:20, 5:20] = mask[30:50, 40:80] = 1
    elif kind == "noise":
        mask = np.random.default_rng(0).integers(0, 2, size, np.uint8)
    elif kind == "dot":
        mask[17, 33] = 1
    path, (width, height) = outline_path(mask, 800, 3000)
    assert len(path) <= 3000
    assert (path == "") == (kind == "empty")
    if kind in ("empty", "noise"):
        return
    filled = np.zeros((height, width), np.uint8)
    contours = [
        np.cumsum([[float(n) - 0.5 for n in start.split()], *steps_of(steps)], axis=0).round().astype(np.int32)
        for start, steps in re.findall(r"M([\d. ]+)l([\d\- ]+)z", path)
    ]
    cv2.fillPoly(filled, contours, 1)  # of two contours in each other, the inner one is a hole
    assert np.count_nonzero(filled != shrink_mask(mask, (width, height))) <= max(1, 0.05 * mask.sum())


def steps_of(text):
    numbers = [int(number) for number in re.findall(r"-?\d+", text)]
    return [numbers[start : start + 2] for start in range(0, len(numbers), 2)]


def test_a_larger_gallery_has_more_and_larger_pictures(output, page, tmp_path, capsys):
    few = Path(write_report(str(output), tmp_path / "few.html", gallery=Gallery(cards=5)))
    assert few.read_text().count('class="card"') == 5
    assert "5 of 12 rows" in few.read_text()
    assert main([str(output), str(tmp_path / "large.html"), "--gallery", "1000", "--gallery-px", "800"]) == 0
    large = (tmp_path / "large.html").read_text()
    assert large.count('class="card"') == NUMBER
    assert len(large) > 1.1 * len(page.read_text())
    assert Gallery(cards=1000).most_mb == pytest.approx(26, abs=1)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gallery", "0"], "--gallery is 0; it must be a number of masks from 1 to 5,000"),
        (["--gallery-px", "9"], "--gallery-px is 9; it must be from 100 to 1,600 pixels"),
        (["--gallery", "5000", "--gallery-px", "1600"], "may take 1,732 MB, and 250 MB are the most"),
    ],
)
def test_a_gallery_has_bounds(output, tmp_path, capsys, words, reason):
    assert main([str(output), str(tmp_path / "page.html"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("run_id", [None, 7, "", "a b", '"><script>', "x" * 65])
def test_a_run_without_a_usable_id_has_no_review(run_id):
    assert review_id({"run_id": run_id}) == ""


def test_bounds_are_said_as_errors():
    with pytest.raises(ConfigError, match="5,000"):
        Gallery(cards=5001)
