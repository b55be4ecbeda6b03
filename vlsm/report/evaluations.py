"""The report of an evaluation."""

import io
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vlsm import storage
from vlsm.cells import read_cell
from vlsm.checkpoints import Calibration
from vlsm.evaluation.groups import Gap, GroupRow, find_gaps, show_value
from vlsm.report import parts
from vlsm.report.glossary import label, name_value
from vlsm.report.page import Case, Page, Section, Stat, as_table, provenance
from vlsm.report.pictures import Painter, read_rle_masks, shorten
from vlsm.report.survey import FILE, ROW, Extremes, Survey, scan
from vlsm.runs.facts import recorded_calibrations
from vlsm.runs.reading import open_reader
from vlsm.runs.record import read_summary
from vlsm.runs.tables import Tables

_SCORES_NAME, _TABLE_NAME, _GROUPS_NAME = "scores.parquet", "table.csv", "groups.csv"
# earlier versions, and evaluations that have just begun, lack columns
_SCORES = pa.schema(
    [
        *(field for field in ROW if field.name not in (FILE, "priority")),
        *(pa.field(name, pa.string()) for name in ("mask_rle", "target_rle")),
    ]
)
_MOST_COLUMNS = 14  # of a table that fits a page of 1,400 pixels
_NAMES = ("dataset", "prompt_name", "prompt_class", "system")
_MAIN = {
    *_NAMES,
    "n",
    "patients_n",
    "n_failed",
    "negatives_n",
    "dice_mean",
    "dice_low",
    "dice_high",
    "dice_median",
    "iou_mean",
    "difference",
    "p",
}
_LESIONS = {
    *("lesions_n", "components_n", "lesion_precision", "lesion_recall", "lesion_f1", "lesion_dice_mean"),
    *("touch_precision", "touch_recall", "touch_f1", "panoptic_quality"),
}
_PRESENCE = {
    *("negatives_n", "positive_dice_mean", "sensitivity", "specificity", "presence_auroc", "false_area_mean"),
    "presence_threshold",
}
_GROUPS = (_PRESENCE, _LESIONS)  # columns of a table that form tables of their own
_SHORT = {"mean": "dice_mean", "ci_low": "dice_low", "ci_high": "dice_high"}  # table.csv may use either name


def evaluation_page(output: str, title: str, allow: tuple[str, ...] = ()) -> Page:
    """Return the report page of an evaluation.

    Raises:
        ConfigError: there is no run at OUTPUT.
    """
    record, summary = parts.read_config(output), read_summary(output)
    scores, table = Tables([storage.join(output, _SCORES_NAME)], _SCORES), _read_table(output)
    survey = Survey(metric="dice", group="system")
    for rows in scan(scores):
        survey.add(rows)
    leader = _leader(table)
    leader_survey, ends = _ends(scores, leader)
    painter = Painter(open_reader(record["config"], output, allow), read_rle_masks)
    columns = ["mask_rle", "target_rle", "height", "width"]
    checkpoints, recorded = _checkpoints(record)
    known = parts.read_calibrations(checkpoints, output, allow, recorded)
    groups, cards = parts.show(ends, survey.sample, painter, columns, scores)
    named = name_value("prompt_name", leader["prompt_name"]) if leader else ""
    intro = f"From {leader['system']}, prompt: {named}." if leader else ""
    return Page(
        kind="Evaluation",
        title=title,
        banner="" if summary else "This evaluation is not complete.",
        stats=_stats(table, leader, survey, leader_survey),
        sections=[
            *_scores(table),
            *_groups(_read_table(output, _GROUPS_NAME)),
            *parts.distributions(survey, "scored rows, of all prompts"),
            *parts.reviews(survey, {}),
            *parts.calibrations(known),
            *_cases(shorten(intro, 300), groups),
            *parts.failures(survey, "scores"),
        ],
        cards=cards,
        gallery_note=parts.gallery_note(
            len(cards), survey.num_rows, "datasets, systems, prompts, statuses, reasons for a review and ranges of Dice"
        ),
        outlines=["prediction", "target"],
        record=record,
        facts=provenance(record),
        about=_about(record, survey, len(checkpoints), known),
    )


def _about(
    record: dict[str, Any], survey: Survey, num_checkpoints: int, known: dict[str, Calibration | None]
) -> list[tuple[str, str, str]]:
    """Return systems, datasets, prompts, date and calibration of the evaluation."""
    names = {"system": "Models", "dataset": "Datasets", "prompt": "Prompts"}
    facts = [(title, parts.name_some(survey.values[name]), "") for name, title in names.items() if survey.values[name]]
    facts.append(("Date", parts.format_date(record), ""))
    if num_checkpoints:
        words, is_calibrated = parts.describe_calibrations(num_checkpoints, known)
        facts.append(("Calibration", words, "" if is_calibrated else "warn"))
    return facts


def _checkpoints(record: dict[str, Any]) -> tuple[dict[str, str], dict[str, Calibration | None]]:
    """Return the locations of the systems' checkpoints by a short name, and recorded calibrations by location."""
    config, facts = record["config"], record.get("checkpoints")
    uris = list(config.get("checkpoints", ()))
    recorded: dict[str, Calibration | None] = {}
    for name, members in config.get("systems", {}).items():
        own = [member["checkpoint"] for member in members]
        recorded |= recorded_calibrations(own, facts.get(name) if isinstance(facts, dict) else None)
        uris += own
    return parts.name_checkpoints(uris, 2), recorded


def _read_table(output: str, name: str = _TABLE_NAME) -> list[dict[str, Any]]:
    """Return the rows of table.csv with all of its columns, or an empty list if the file does not exist."""
    uri = storage.join(output, name)
    if not storage.exists(uri):
        return []
    options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in ("dataset", "prompt_name", "system", "column", "value")}
    )
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(io.BytesIO(storage.read_bytes(uri)), None, lines, options)
    rows = table.rename_columns([_SHORT.get(name, name) for name in table.column_names]).to_pylist()
    return [
        {name: read_cell(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    ]


def _scores(table: list[dict[str, Any]]) -> list[Section]:
    """Return the section with the table. Texts that are equal in all rows become one line above it."""
    if not table:
        return []
    same = {
        name: value
        for name, value in table[0].items()
        if len(table) > 1 and isinstance(value, str) and all(row[name] == value for row in table)
    }
    intro = "; ".join(f"{label(name)}: {shorten(name_value(name, value))}" for name, value in same.items())
    note = "The line beside a mean Dice shows its confidence interval on an axis from 0 to 1."
    left_out = {*same, *({"patients_n"} if all(row.get("patients_n") is None for row in table) else ())}
    rows = [{name: name_value(name, value) for name, value in row.items() if name not in left_out} for row in table]
    tables = [as_table(each, note * (not index)) for index, each in enumerate(_split_columns(rows))]
    return [Section("scores", "Scores", intro, tables=tables)]


def _groups(rows: list[dict[str, Any]]) -> list[Section]:
    """Return the section about groups of images: gaps, then groups, the lowest mean Dice first. None without groups."""
    if not rows:
        return []
    groups = [GroupRow(**{one.name: row[one.name] for one in fields(GroupRow)}) for row in rows]
    gaps = find_gaps([replace(row, value=row.value or None) for row in groups])
    intro = "Images with one value of a column of the list. Small groups, and those without a value, are in no gap."
    tables = [
        as_table([_name_group(gap.groups[0]) | _describe_gap(gap) for gap in gaps]),
        as_table([_name_group(row) | _describe_group(row) for gap in gaps for row in gap.groups]),
    ]
    return [Section("groups", "Groups", intro, tables=tables)]


def _name_group(row: GroupRow) -> dict[str, Any]:
    names = {name: name_value(name, getattr(row, name)) for name in ("dataset", "prompt_name", "system")}
    return names | {"column": row.column}


def _describe_gap(gap: Gap) -> dict[str, Any]:
    worst, best = (gap.rated[0], gap.rated[-1]) if gap.size is not None else (None, None)
    ends = {
        name: None if row is None else f"{row.value}: {row.dice_mean:.3f} (n {row.n:,})"
        for name, row in (("worst group", worst), ("best group", best))
    }
    counts = {"groups": len(gap.groups), "small groups": sum(row.is_small for row in gap.groups)}
    return counts | ends | {"gap": gap.size}


def _describe_group(row: GroupRow) -> dict[str, Any]:
    patients = {} if row.patients_n is None else {"patients_n": row.patients_n}
    counts = {"n": row.n, "n_failed": row.n_failed} | patients | {"small": "small" if row.is_small else ""}
    scores = {name: getattr(row, name) for name in ("dice_mean", "dice_low", "dice_high", "difference", "p")}
    return {"group": show_value(row.value)} | counts | scores


def _split_columns(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the rows as one table, or as several if they have too many columns for a page: the main ones come first.

    The other tables have only columns with values. Images without the finding, and lesions, have tables of their own.
    """
    if len(rows[0]) <= _MOST_COLUMNS:
        return [rows]
    names = [name for name in rows[0] if name in _NAMES]
    filled = [name for name in rows[0] if name not in _MAIN and any(row[name] not in (None, "") for row in rows)]
    groups = [[name for name in filled if name in group] for group in _GROUPS]
    more = [name for name in filled if not any(name in group for group in _GROUPS)]
    parts_of = ([name for name in rows[0] if name in _MAIN], *([*names, *group] for group in (more, *groups)))
    return [[{name: row[name] for name in part} for row in rows] for part in parts_of if len(part) > len(names)]


def _cases(intro: str, groups: list[tuple[str, str, list[Case]]]) -> list[Section]:
    """Return the section with the extreme cases, or no section if nothing has a score."""
    outlines = ["prediction", "target"]
    return [Section("cases", "Cases to look at", intro, groups=groups, outlines=outlines)] if groups else []


def _leader(table: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the system and prompt with the highest mean Dice over datasets; None if there is no table.

    Prompts that reveal the target are left out if there are others.
    """
    wanted = {"system", "prompt_name", "dice_mean"}
    rows = [row for row in table if wanted <= row.keys() and isinstance(row["dice_mean"], float)]
    rows = [row for row in rows if row.get("prompt_class") in (None, "honest")] or rows
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        means.setdefault((row["system"], row["prompt_name"]), []).append(row["dice_mean"])
    if not means:
        return None
    # a system that was not scored on all datasets cannot be compared with systems that were
    num_datasets = max(map(len, means.values()))
    complete = [key for key in means if len(means[key]) == num_datasets]
    system, prompt_name = max(complete, key=lambda key: sum(means[key]))
    leader_rows = [row for row in rows if (row["system"], row["prompt_name"]) == (system, prompt_name)]
    return {"system": system, "prompt_name": prompt_name, "rows": leader_rows}


def _ends(scores: Tables, leader: dict[str, Any] | None) -> tuple[Survey, parts.Ends]:
    """Return a survey and the extreme cases of the leader's rows, or of all rows if there is no leader.

    The cases have the highest, median and lowest Dice, and the lowest confidence and agreement.
    """
    condition = None
    if leader:
        condition = pc.field("system") == leader["system"]
        condition &= pc.field("prompt_name") == leader["prompt_name"]
    survey = Survey(metric="dice", group="system")
    for table in scan(scores, condition):
        survey.add(table)
    dice = survey.total("dice")
    ends = [
        ("Best", "highest Dice", Extremes("dice", is_highest=True)),
        ("Median", "nearest to the median Dice", Extremes("dice", around=dice.median if dice else 0.5)),
        ("Worst", "lowest Dice", Extremes("dice")),
        ("Least confident", "lowest mean probability inside the mask", Extremes("confidence")),
        ("Least agreement", "between the ensemble's members", Extremes("agreement")),
    ]
    for table in scan(scores, condition):
        for *_, extremes in ends:
            extremes.add(table)
    return survey, ends


def _stats(
    table: list[dict[str, Any]], leader: dict[str, Any] | None, survey: Survey, leader_survey: Survey
) -> list[Stat]:
    stats = (
        [_lead(row, len(table) > 1) for row in leader["rows"][:3]] if leader else parts.metric_stats(survey, ("dice",))
    )
    if leader:
        stats.append(Stat("Images", f"{leader_survey.num_rows:,}"))
    counts = [(len(survey.values[name]), name) for name in ("system", "dataset")]
    several = ", ".join(f"{number:,} {name}s" for number, name in counts if number > 1)
    stats.append(Stat("Scores", f"{survey.num_rows:,}", several))
    stats.append(Stat("Failed scores", f"{survey.values['status']['failed']:,}", tone="warn" if survey.reasons else ""))
    return stats


def _lead(row: dict[str, Any], is_best: bool) -> Stat:
    low, high = row.get("dice_low"), row.get("dice_high")
    interval = f"interval {low:.3f} to {high:.3f}; " if isinstance(low, float) and isinstance(high, float) else ""
    origin = " · ".join(
        str(name_value(name, row[name])) for name in ("dataset", "system", "prompt_name") if row.get(name)
    )
    label = "Mean Dice, the best of the table" if is_best else "Mean Dice"
    return Stat(label, f"{row['dice_mean']:.3f}", interval + shorten(origin), "lead")
