"""Parts of a page that several kinds of run have: distributions, failures, what is read of OUTPUT for all of them."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, Calibration
from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError, VlsmError
from vlsm.images.reader import Reader
from vlsm.report.charts import Ridge, draw_reliability, draw_ridge
from vlsm.report.page import Case, Cell, Section, Stat, Table, as_case
from vlsm.report.pictures import MAX_CARDS, MAX_CASES, OpenFiles, Painter, describe_error, paint, shorten
from vlsm.report.survey import METRICS, Extremes, Sample, Survey, row_key
from vlsm.runs.record import SUMMARY_NAME, read_record

_READING = ("slices", "window", "max_pixels", "max_image_bytes")  # settings that decide what an image looks like
_MAX_GROUPS = 6

Ends = Sequence[tuple[str, str, Extremes]]


def read_config(output: str) -> dict[str, Any]:
    """config.yaml of a run.

    Raises:
        ConfigError: there is none, or it is not a run's.
    """
    record = read_record(output)
    if record is None:
        raise ConfigError(
            f"there is no run in {output!r}; a report is made of a segment, train or evaluate run's OUTPUT"
        )
    return record


def read_finished_summary(output: str) -> dict[str, Any] | None:
    """summary.json of a run, or None where it is not complete."""
    uri = storage.join(output, SUMMARY_NAME)
    return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def open_reader(config: dict[str, Any]) -> Reader:
    """What reads images as the run did, but waits for a store only as long as a person does."""
    known = {name: config[name] for name in _READING if name in config}
    run = {"outage_patience_s": storage.QUICK_S, "image_timeout_s": 30.0}
    fixed = {"input": "", "output": "", "members": [{"checkpoint": ""}], "run": run}
    return Reader(SegmentSettings.model_validate(fixed | known))


def metric_stats(survey: Survey, metrics: tuple[str, ...]) -> list[Stat]:
    """A headline figure for the median of each metric that there is."""
    totals = [(name, survey.total(name)) for name in metrics]
    return [Stat(f"{METRICS[name]}, median", f"{found.median:.3f}") for name, found in totals if found]


def distributions(survey: Survey, what: str) -> list[Section]:
    """A chart for each metric that there is, with a row for each group; no section where there is none."""
    ridges: list[Ridge] = []
    has_names = len(survey.values[survey.group]) > 1
    for metric, title in METRICS.items():
        groups = survey.groups(metric, _MAX_GROUPS)
        if groups:
            labels = [(shorten(name, 28) if has_names else "", found) for name, found in groups]
            ridges.append(draw_ridge(title, labels))
    num_groups = max((len(survey.groups(metric, 10**6)) for metric in METRICS), default=0)
    intro = f"All {what}; the dashed line is the median."
    if num_groups > _MAX_GROUPS:
        intro += f" Of {num_groups:,} {survey.group}s, the {_MAX_GROUPS} with the most."
    return [Section("distributions", "Distributions", intro, ridges=ridges)] if ridges else []


def failures(survey: Survey) -> list[Section]:
    """Why rows failed, and some of the ids; no section where none did."""
    if not survey.reasons:
        return []
    rows = []
    for reason, count in survey.reasons.most_common():
        examples = survey.examples[reason]
        ids = list(dict.fromkeys(shorten(str(row["image_id"]), 80) for row in examples))[:3]
        rows.append(
            [
                Cell(reason),
                Cell(f"{count:,}", True),
                Cell(", ".join(ids)),
                Cell(shorten(describe_error(examples[0]), 200)),
            ]
        )
    table = Table(["reason", "rows", "such as", "the first one's message"], rows)
    return [Section("failures", "Failures", tables=[table])]


def show(
    ends: Ends, sample: Sample, painter: Painter, columns: Sequence[str], open_files: OpenFiles | None
) -> tuple[list[tuple[str, str, list[Case]]], list[Case]]:
    """The rows at the ends as groups of cases, and those and a sample as the gallery's cards, all drawn.

    Args:
        ends: of each group its name, a note, and its rows; a group without rows is left out.
        sample: for the gallery.
        painter: draws a row.
        columns: what it needs of the files that rows are of.
        open_files: makes a dataset of them.
    """
    groups = [(name, note, each.rows(MAX_CASES // max(5, len(ends)))) for name, note, each in ends]
    at_ends = [row for *_, rows in groups for row in rows]
    cards = {row_key(row): row for row in (*at_ends, *sample.rows(MAX_CARDS))}
    cards = dict(itertools.islice(cards.items(), MAX_CARDS))
    pictures = paint(cards.values(), {row_key(row) for row in at_ends}, painter, columns, open_files)
    large = [
        (name, note, [as_case(row, pictures, is_large=True) for row in rows]) for name, note, rows in groups if rows
    ]
    return large, [as_case(row, pictures) for row in cards.values()]


def gallery_note(num_cards: int, num_rows: int, spread: str) -> str:
    """What the cards are."""
    if num_cards >= num_rows:
        return f"All {num_rows:,} rows."
    return f"{num_cards:,} of {num_rows:,} rows, spread over {spread}."


def calibrations(checkpoints: dict[str, str]) -> list[Section]:
    """What is known of the probabilities of checkpoints, by name and location; no section where nothing is.

    Checkpoints that are no longer there, or were never calibrated, are left out.
    """
    lines, rows = [], []
    unusable: tuple[type[Exception], ...] = (OSError, VlsmError, *storage.store_errors())
    unusable += (yaml.YAMLError, ValidationError, KeyError, TypeError)
    for name, uri in checkpoints.items():
        try:
            tree = yaml.safe_load(storage.read_bytes(storage.join(uri, SETTINGS_NAME)))
            found = Calibration.model_validate(tree["calibration"])
        except unusable:
            continue
        short = shorten(name, 60)
        lines.append(draw_reliability(short, found.reliability))
        errors = [Cell(f"{error:.4f}", True) for error in (found.error_before, found.error_after)]
        numbers = [Cell(f"{value:.3g}", True) for value in (found.temperature, found.threshold)]
        rows.append([Cell(short), *numbers, *errors, Cell(f"{found.num_images:,}", True)])
    if not rows:
        return []
    intro = "How often pixels are foreground, by the probability that the checkpoint gives them, on validation images."
    head = ["checkpoint", "temperature", "threshold", "error before", "error after", "images"]
    note = "The error is the expected calibration error, without and with the temperature."
    return [Section("calibration", "Calibration", intro, tables=[Table(head, rows, note)], lines=lines)]
