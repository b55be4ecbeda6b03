"""Runs whose masks are empty or cover the whole image: the end of the job, its status and its report say so."""

import html
from dataclasses import asdict

import pytest

from vlsm.config import SegmentSettings
from vlsm.report.endings import segment_ending
from vlsm.report.status import describe_status, read_status
from vlsm.report.write import write_report
from vlsm.runs.compare import compare_run
from vlsm.runs.extremes import describe_extremes
from vlsm.runs.lifecycle import Run, finish_run
from vlsm.runs.plan import write_plan
from vlsm.runs.record import make_record, write_record
from vlsm.runs.results import write_part

KINDS = ["mask", "member 1"]


def write_run(output, fractions):
    """A complete run with a mask for each area fraction, and a member's mask, which does not count."""
    more = dict.fromkeys(("selector", "offset", "length", "problem", "image_version", "size_bytes", "etag", "mtime"))
    images = [
        {"image_id": f"{number}.png", "image_uri": f"/scans/{number}.png", "prompts": ["polyp"], **more}
        for number in range(len(fractions))
    ]
    plan = write_plan(str(output), images, 100, KINDS)
    settings = SegmentSettings(input="/scans", output=str(output), members=[{"checkpoint": "c"}], prompts=["polyp"])
    write_record(str(output), make_record(settings, {"run_id": "run"}, asdict(plan)))
    rows = [
        {name: image[name] for name in ("image_id", "image_uri")}
        | {"prompt": "polyp", "kind": kind, "model": "m", "status": "ok", "height": 10, "width": 10}
        | {"area_px": round(100 * fraction), "area_fraction": fraction, "mask_rle": "0T3"}
        for image, fraction in zip(images, fractions, strict=True)
        for kind in KINDS
    ]
    write_part(str(output), 0, rows, "run", 0)
    return settings, Run(settings, (), plan, "run")


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([1.0, 0.99, 0.98, 0.3], "of 4 masks 3 cover the whole image (98 % of it or more)"),
        ([0.0, 0.0, 0.0, 0.3], "of 4 masks 3 are empty: this model is hardly useful here, unless most images show"),
        ([0.0, 1.0, 0.2], "of 3 masks 1 is empty and 1 covers the whole image"),
    ],
)
def test_most_masks_that_are_empty_or_whole_are_no_success(tmp_path, fractions, message):
    settings, run = write_run(tmp_path / "out", fractions)
    under_way = describe_status(read_status(str(tmp_path / "out")))
    summary = finish_run(run, compare_run(str(tmp_path / "out"), run.plan, "run"), 0, 1.0)
    finished = describe_status(read_status(str(tmp_path / "out")))
    for lines in (under_way, finished, segment_ending(settings, summary)):
        (line,) = [line for line in lines if line.startswith("warning: ")]
        assert message in line
    write_report(str(tmp_path / "out"), str(tmp_path / "report.html"))
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert message[1:] in page
    num_whole = sum(fraction >= 0.98 for fraction in fractions)
    assert ("Masks of the whole image" in page) == (num_whole > 0) == ("review.area_fraction" in page)


@pytest.mark.parametrize("fractions", [[0.0, 0.3], [0.97, 0.97, 0.97], [1.0, 0.2, 0.3], [0.0, 0.2], [0.1]])
def test_ordinary_runs_have_no_such_warning(tmp_path, fractions):
    settings, run = write_run(tmp_path / "out", fractions)
    summary = finish_run(run, compare_run(str(tmp_path / "out"), run.plan, "run"), 0, 1.0)
    lines = [*segment_ending(settings, summary), *describe_status(read_status(str(tmp_path / "out")))]
    assert "warning" not in " ".join(lines)


def test_a_run_of_an_earlier_version_has_no_counts_and_no_warning():
    assert describe_extremes({"ok": 3, "failed": 0}) is None
