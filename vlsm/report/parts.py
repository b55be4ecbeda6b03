"""Parts of a page that several kinds of runs share: distributions, failures, cases, and the readers of OUTPUT."""

import contextlib
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vlsm import storage
from vlsm.archive.places import lies_outside
from vlsm.checkpoints import SETTINGS_NAME, Calibration
from vlsm.documents import read_yaml
from vlsm.errors import ConfigError, VlsmError
from vlsm.report.charts import Ridge, draw_reliability, draw_ridge
from vlsm.report.page import Case, Cell, Section, Stat, Table, as_case
from vlsm.report.pictures import MAX_CARDS, MAX_CASES, Painter, describe_error, paint, shorten
from vlsm.report.survey import METRICS, Extremes, Sample, Survey, row_key
from vlsm.runs.extremes import WHOLE
from vlsm.runs.record import read_record
from vlsm.runs.tables import Tables
from vlsm.shown import public_uri

_MAX_GROUPS = 6
EMPTY, WHOLE_IMAGE = "empty mask", "mask of the whole image"

Ends = Sequence[tuple[str, str, Extremes]]


def read_config(output: str) -> dict[str, Any]:
    """Return the content of config.yaml of a run.

    Raises:
        ConfigError: there is no config.yaml of a run at OUTPUT.
    """
    record = read_record(output)
    if record is None:
        raise ConfigError(
            f"there is no run in {output!r}; a report needs the OUTPUT of a segment, train or evaluate run"
        )
    return record


def metric_stats(survey: Survey, metrics: tuple[str, ...], notes: dict[str, str] | None = None) -> list[Stat]:
    """Return a headline figure with the median of each metric that has values; `notes` warn about some metrics."""
    totals = [(name, survey.total(name), (notes or {}).get(name, "")) for name in metrics]
    return [
        Stat(f"{METRICS[name]}, median", f"{total.median:.3f}", note, "warn" if note else "")
        for name, total, note in totals
        if total
    ]


def format_date(record: dict[str, Any]) -> str:
    """Return when the run was planned, such as "2 January 2026, 03:04 UTC"; as the record has it if it is no date."""
    text = str(record.get("planned_at") or "unknown")
    try:
        date = datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return shorten(text, 60)
    return f"{date.day} {date:%B %Y, %H:%M} UTC"


def name_some(names: Iterable[str], number: int = 4) -> str:
    """Return the first names of many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - number:,} more" if len(names) > number else ""
    return ", ".join(shorten(name, 60) for name in names[:number]) + more


def distributions(survey: Survey, rows_name: str) -> list[Section]:
    """Return a section with one chart per metric and one histogram per group, or no section if no metric has values."""
    ridges: list[Ridge] = []
    has_names = len(survey.values[survey.group]) > 1
    for metric, title in METRICS.items():
        groups = survey.groups(metric, _MAX_GROUPS)
        if groups:
            labels = [(shorten(name, 28) if has_names else "", distribution) for name, distribution in groups]
            ridges.append(draw_ridge(title, labels))
    num_groups = max((len(survey.groups(metric, 10**6)) for metric in METRICS), default=0)
    intro = f"All {rows_name}. The numbers at the left count them in one bar; the dashed line is the median."
    if num_groups > _MAX_GROUPS:
        intro += f" The {_MAX_GROUPS} largest of {num_groups:,} {survey.group}s are shown."
    return [Section("distributions", "Distributions", intro, ridges=ridges)] if ridges else []


def reviews(survey: Survey, rules: dict[str, Any]) -> list[Section]:
    """Return a section with the reasons for a review and the empty and full masks, counted; no section if none.

    Args:
        survey: of all rows.
        rules: the settings `review` of the run, which say when a mask gets a reason; empty if they are unknown.
    """
    num_ok = max(1, survey.values["status"]["ok"])
    limits = {
        "low confidence": f"confidence below {rules.get('min_confidence')}",
        "low agreement": f"agreement below {rules.get('min_agreement')}",
        "low presence": f"presence below {rules.get('min_presence')}",
        "odd area": f"area fraction outside {rules.get('area_fraction')}",
    }
    counts = [
        (reason, count, limits.get(reason, "") if rules else "") for reason, count in survey.reviews.most_common()
    ]
    if survey.num_empty:
        counts.append((EMPTY, survey.num_empty, "no foreground: nothing found, or nothing to find"))
    if survey.num_whole:
        rule = f"covers {100 * WHOLE:.0f} % of the image or more; a reason for a review only by review.area_fraction"
        counts.append((WHOLE_IMAGE, survey.num_whole, rule))
    rows = [
        [Cell(reason), Cell(f"{count:,}", True), Cell(f"{100 * count / num_ok:.1f} %", True), Cell(shorten(rule, 100))]
        for reason, count, rule in counts
    ]
    intro = "A mask may have several reasons. The gallery below is filtered by them."
    return [Section("review", "To review", intro, tables=[Table(["reason", "masks", "share", "rule"], rows)])] * bool(
        rows
    )


def failures(survey: Survey, unit: str) -> list[Section]:
    """Return a section with the reasons of failures and some image ids, or no section if nothing failed.

    Args:
        survey: of all rows.
        unit: what is counted, in plural.
    """
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
    table = Table(["reason", unit, "examples", "first message"], rows)
    return [Section("failures", "Failures", tables=[table])]


def show(  # noqa: PLR0913 - all that decides the cards
    ends: Ends,
    sample: Sample,
    painter: Painter,
    columns: Sequence[str],
    tables: Tables | None,
    most_cards: int = MAX_CARDS,
) -> tuple[list[tuple[str, str, list[Case]]], list[Case]]:
    """Return the extreme rows as groups of large cases, and these rows and a sample as cards, with their pictures.

    Args:
        ends: name, note and rows of each group; a group without rows is left out.
        sample: rows for the gallery.
        painter: draws a row.
        columns: columns of the part files that the painter needs.
        tables: the files of the rows; None if the rows have all columns already.
        most_cards: the most cards.
    """
    most = MAX_CASES // max(5, len(ends))
    groups = [(name, note, extremes.rows(most)) for name, note, extremes in ends]
    images = {(row["dataset"], row["image_id"]) for *_, rows in groups for row in rows}
    most = max(2, len(images) // 3)  # of few images, the best are not the worst once more
    groups = [(name, note, rows[:most]) for name, note, rows in groups]
    extreme_rows = [row for *_, rows in groups for row in rows]
    cards = {row_key(row): row for row in (*extreme_rows, *sample.rows(most_cards))}
    cards = dict(itertools.islice(cards.items(), most_cards))
    pictures = paint(cards.values(), {row_key(row) for row in extreme_rows}, painter, columns, tables)
    large = [
        (name, note, [as_case(row, pictures, is_large=True) for row in rows]) for name, note, rows in groups if rows
    ]
    return large, [as_case(row, pictures) for row in cards.values()]


def gallery_note(num_cards: int, num_rows: int, spread: str) -> str:
    """Return a sentence that says which rows the gallery shows."""
    if num_cards >= num_rows:
        return "The only row." if num_rows == 1 else f"All {num_rows:,} rows."
    return f"{num_cards:,} of {num_rows:,} rows, spread over {spread}."


def read_calibrations(
    checkpoints: dict[str, str],
    output: str,
    allow: Sequence[str] = (),
    recorded: Mapping[str, Calibration | None] | None = None,
) -> dict[str, Calibration | None]:
    """Return the calibration of checkpoints (name and location), None for those that were not calibrated.

    Of a run, the recorded calibrations count: a checkpoint may have been calibrated afterwards. Its reliability is not
    recorded. It is read from the checkpoint, if that still has this calibration.

    Without a record, checkpoints that no longer exist, that cannot be read, or that OUTPUT may not name, are left out.

    Args:
        checkpoints: locations of the checkpoints by name.
        output: OUTPUT of the run.
        allow: places outside of OUTPUT's bucket that may be read.
        recorded: the calibrations in the run's record, by location; see `vlsm.runs.facts`.
    """
    found: dict[str, Calibration | None] = {}
    unusable: tuple[type[Exception], ...] = (OSError, VlsmError, *storage.store_errors())
    unusable += (ValidationError, KeyError, TypeError)
    for name, uri in checkpoints.items():
        if recorded and uri in recorded:
            found[name] = recorded[uri]
        if lies_outside(uri, output, allow) or (name in found and found[name] is None):
            continue
        with contextlib.suppress(*unusable):
            tree = read_yaml(storage.join(uri, SETTINGS_NAME), SETTINGS_NAME)
            stated = tree.get("calibration") if isinstance(tree, dict) else None
            now = None if stated is None else Calibration.model_validate(stated)
            if name not in found or (now and now.model_copy(update={"reliability": []}) == found[name]):
                found[name] = now
    return found


def name_checkpoints(uris: Iterable[str], num_parts: int) -> dict[str, str]:
    """Return locations of checkpoints by the last num_parts parts of their paths, or more if names were equal."""
    unique = list(dict.fromkeys(uris))
    parts = [public_uri(uri).rstrip("/").split("/") for uri in unique]
    for length in range(num_parts, max([num_parts, *map(len, parts)]) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, unique, strict=True))
    return {f"{each[-1]} {number}": uri for number, (each, uri) in enumerate(zip(parts, unique, strict=True), start=1)}


def describe_calibrations(num_checkpoints: int, known: dict[str, Calibration | None]) -> tuple[str, bool]:
    """Return in words whether checkpoints are calibrated, and whether all of them are known to be."""
    calibrated = [each for each in known.values() if each]
    if len(calibrated) == num_checkpoints:
        images = sorted({each.num_images for each in calibrated})
        return f"calibrated on {', '.join(f'{count:,}' for count in images)} validation images", True
    if not known:
        return "unknown: the run did not record it, and the checkpoint cannot be read any more", False
    if len(known) == 1 == num_checkpoints:
        return "not calibrated", False
    return f"{len(calibrated):,} of {num_checkpoints:,} checkpoints are calibrated", False


def calibrations(known: dict[str, Calibration | None]) -> list[Section]:
    """Return a section with calibrations, as from `read_calibrations`, or no section if there is none."""
    lines, rows = [], []
    for name, calibration in known.items():
        if calibration is None:
            continue
        short = shorten(name, 60)
        if calibration.reliability:
            lines.append(draw_reliability(short, calibration.reliability))
        errors = [Cell(f"{error:.4f}", True) for error in (calibration.error_before, calibration.error_after)]
        numbers = [Cell(f"{value:.3g}", True) for value in (calibration.temperature, calibration.threshold)]
        rows.append([Cell(short), *numbers, *errors, Cell(f"{calibration.num_images:,}", True)])
    if not rows:
        return []
    intro = "Share of foreground pixels by predicted probability, on validation images." if lines else ""
    head = ["checkpoint", "temperature", "threshold", "error before", "error after", "images"]
    note = "The error is the expected calibration error, without and with the temperature."
    return [Section("calibration", "Calibration", intro, tables=[Table(head, rows, note)], lines=lines)]
