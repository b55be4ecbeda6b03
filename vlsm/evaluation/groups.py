"""Scores per group of images: per site, sex or patient, with the worst group and the gap between groups.

A group is a value of a column of the dataset's list, or of the list of the segment run that is scored (--masks); the
dataset's counts where both have it. A record without a value is of the group without a value, which is counted and is
neither the worst nor the best. Nor is a group with fewer patients, or images if none are named, than `small_group`.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlsm.archive.columns import normalize
from vlsm.cells import CsvWriter, markdown_cell
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError
from vlsm.evaluation.prompts import ROBUSTNESS
from vlsm.evaluation.sections import format_grid, format_number, name_cells
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.statistics import (
    Rows,
    compare_pairs,
    count_patients,
    interval,
    mean,
    patient_of,
    values_of,
)

OWN_GROUP = "group"  # the column of scores with the group of each record
_SHOWN = 20  # groups of a column in table.md; groups.csv has all


def check_groups(records: Iterable[Record], of_runs: Iterable[str], settings: EvaluateSettings) -> None:
    """Raise a ConfigError if no record and no segment run has a column that `groups` or `patient` names."""
    known = {name for record in records for name, _ in record.further} | set(of_runs)
    known |= {OWN_GROUP} if any(record.group for record in records) else set()
    for name in settings.columns_of_groups:
        if normalize(name) not in map(normalize, known):
            key = "patient" if name == settings.patient else "groups"
            raise ConfigError(
                f"{key} names {name!r}; no list of a dataset with records to score, and no segment run to score, has "
                "values in such a column"
            )


def group_value(record: Record, of_run: Mapping[str, Any], name: str) -> str | None:
    """Return the group of a record by a column, or None if it has none.

    Args:
        record: the record.
        of_run: columns of a list that the record's row in a segment run has.
        name: the column; names are compared as those of lists.
    """
    for values in (dict(record.further), of_run):
        same = [value for key, value in values.items() if normalize(key) == normalize(name)]
        if same and same[0] not in (None, ""):
            return str(same[0])
    return None


@dataclass(frozen=True)
class GroupRow:
    """Scores of one group; the attributes are the columns of groups.csv, and mean what those of `TableRow` mean.

    Attributes:
        column: name of the column of the list.
        value: its value; None: the records have none.
        is_small: whether the group has fewer patients, or images, than `small_group`.
    """

    dataset: str
    prompt_name: str
    prompt_class: str
    system: str
    column: str
    value: str | None
    n: int
    n_failed: int
    patients_n: int | None
    is_small: bool
    dice_mean: float | None
    dice_low: float | None
    dice_high: float | None
    iou_mean: float | None
    difference: float | None
    difference_n: int | None
    p: float | None


@dataclass(frozen=True)
class Gap:
    """What a system's groups of one column differ by.

    Attributes:
        groups: the groups, from the lowest mean Dice to the highest.
        rated: those that are not small and have a value.
    """

    groups: list[GroupRow]
    rated: list[GroupRow]

    @property
    def size(self) -> float | None:
        """The highest minus the lowest mean Dice of a rated group; None below two."""
        if len(self.rated) < 2:
            return None
        return (self.rated[-1].dice_mean or 0.0) - (self.rated[0].dice_mean or 0.0)


def compare_groups(rows: Rows, baseline: str, settings: EvaluateSettings, columns: Mapping[str, str]) -> list[GroupRow]:
    """Return the scores of each group, in the order of the scores; groups of a column by their names.

    Args:
        rows: scores.
        baseline: the system that the others are compared with, group by group.
        settings: of the evaluation.
        columns: the column of the scores for each column of a list.
    """
    by_key: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_key[row["dataset"], row["prompt_name"], row["system"]].append(row)
    found = []
    for (dataset, prompt, system), system_rows in by_key.items():
        others = [] if system == baseline else by_key.get((dataset, prompt, baseline), [])
        for name in settings.groups:
            by_value: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
            for row in system_rows:
                by_value[row.get(columns[name])].append(row)
            for value in sorted(by_value, key=lambda value: (value is None, value or "")):
                found.append(_summarize(name, value, by_value[value], others, settings, columns))
    return found


def _summarize(  # noqa: PLR0913 - all that makes a group
    name: str,
    value: str | None,
    rows: Rows,
    baseline_rows: Rows,
    settings: EvaluateSettings,
    columns: Mapping[str, str],
) -> GroupRow:
    scored = [row for row in rows if row["status"] == "ok"]
    patient = None if settings.patient is None else columns[settings.patient]
    dice = values_of(scored, "dice")
    low, high = interval(dice, [patient_of(row, patient) for row in scored], settings.resamples, settings.seed)
    number = count_patients(scored, patient)
    difference, difference_n, p = compare_pairs(scored, baseline_rows, patient)
    first = rows[0]
    return GroupRow(
        **{key: first[key] for key in ("dataset", "prompt_name", "prompt_class", "system")},
        column=name,
        value=value,
        n=len(scored),
        n_failed=len(rows) - len(scored),
        patients_n=None if patient is None else number,
        is_small=number < settings.small_group,
        dice_mean=mean(dice),
        dice_low=low,
        dice_high=high,
        iou_mean=mean(values_of(scored, "iou")),
        difference=difference,
        difference_n=difference_n,
        p=p,
    )


def find_gaps(rows: Iterable[GroupRow]) -> list[Gap]:
    """Return the gap of each dataset, prompt, system and column."""
    by_key: dict[tuple[str, ...], list[GroupRow]] = defaultdict(list)
    for row in rows:
        by_key[row.dataset, row.prompt_name, row.system, row.column].append(row)
    gaps = []
    for groups in by_key.values():
        ordered = sorted(groups, key=lambda row: (row.dice_mean is None, row.dice_mean or 0.0))
        rated = [row for row in ordered if not row.is_small and row.value is not None and row.dice_mean is not None]
        gaps.append(Gap(ordered, rated))
    return gaps


def format_groups_csv(rows: Iterable[GroupRow]) -> str:
    """Return the groups as CSV; None becomes an empty cell."""
    file = io.StringIO()
    CsvWriter(file, [field.name for field in fields(GroupRow)]).write_all(map(asdict, rows))
    return file.getvalue()


_GAPS = "Dataset|Prompt|System|Column|Groups (small)|Worst group|Best group|Gap"
_GROUPS = "Dataset|Prompt|System|Column|Group|n (failed)|Patients|Dice|IoU|Difference|p"
_RULES = """\
## Groups

Scores of the images with one value of a column of the list. **Gap** is the mean Dice of the best group minus that of
the worst. A group of fewer than {small} {unit} is marked `small`: its mean may be chance, so it is neither the worst
nor the best. Nor are images without a value. Difference and p compare with the baseline inside of the group; p is **not
corrected** for the number of groups."""


def format_groups(rows: Sequence[GroupRow], settings: EvaluateSettings) -> list[str]:
    """Return the section of table.md about groups, or none without groups. Other words for a prompt have none."""
    rows = [row for row in rows if row.prompt_class != ROBUSTNESS]
    if not rows:
        return []
    gaps = find_gaps(rows)
    rules = _RULES.format(small=settings.small_group, unit="images" if settings.patient is None else "patients")
    cells = [_cells(row) for gap in gaps for row in gap.groups[:_SHOWN]]
    notes = [
        f"{', '.join([*name_cells(gap.groups[0]), markdown_cell(gap.groups[0].column)])}: the {_SHOWN} lowest of "
        f"{len(gap.groups):,} groups are shown; groups.csv has all."
        for gap in gaps
        if len(gap.groups) > _SHOWN
    ]
    return [rules, format_grid(_GAPS, list(map(_gap_cells, gaps))), format_grid(_GROUPS, cells), *notes]


def show_value(value: str | None) -> str:
    """Return the name of a group for people."""
    return "no value" if value is None else value


def _gap_cells(gap: Gap) -> list[str]:
    ends = [
        f"{markdown_cell(show_value(row.value))}: {format_number(row.dice_mean)} (n {row.n})"
        for row in (gap.rated[:1] + gap.rated[-1:] if len(gap.rated) > 1 else [])
    ]
    numbers = f"{len(gap.groups)} ({sum(row.is_small for row in gap.groups)})"
    first = gap.groups[0]
    return [*name_cells(first), markdown_cell(first.column), numbers, *(ends or ["", ""]), format_number(gap.size)]


def _cells(row: GroupRow) -> list[str]:
    dice = format_number(row.dice_mean)
    if row.dice_low is not None:
        dice += f" [{format_number(row.dice_low)}, {format_number(row.dice_high)}]"
    return [
        *name_cells(row),
        *map(markdown_cell, (row.column, show_value(row.value))),
        f"{row.n} ({row.n_failed}){', small' if row.is_small else ''}",
        "" if row.patients_n is None else str(row.patients_n),
        dice,
        format_number(row.iou_mean),
        format_number(row.difference, "+.3f"),
        format_number(row.p, ".2g"),
    ]
