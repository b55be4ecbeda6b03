"""Summary tables of scores: one row per dataset, prompt and system, as CSV and Markdown."""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlsm.cells import CsvWriter, markdown_cell
from vlsm.datasets.records import LABELS
from vlsm.evaluation.lesions import LesionTotals, add_lesions
from vlsm.evaluation.presence import PresenceTotals, add_presence
from vlsm.evaluation.prompts import HONEST, ROBUSTNESS, UPPER_BOUND
from vlsm.evaluation.sections import format_grid, format_lesions, format_number, format_presence, name_cells
from vlsm.evaluation.settings import TOLERANCE_PX
from vlsm.evaluation.statistics import (
    Rows,
    compare_pairs,
    count_patients,
    interval,
    mean,
    median,
    patient_of,
    values_of,
)
from vlsm.segmentation.metrics import BAD_DICE
from vlsm.words import count


@dataclass(frozen=True)
class TableRow:
    """A row of the table: one system on one dataset with one prompt.

    Attributes:
        dataset, prompt_name, prompt_class, system: identify the row.
        n, n_failed: number of records with scores, and of failed records. Failed records are in no other number.
        dice_mean, dice_sd, dice_median: over records; dice_sd is the sample standard deviation (n - 1).
        dice_low, dice_high: 95 % interval of the mean, by bootstrap over records.
        iou_mean, precision_mean, recall_mean: over records.
        hd95_n, asd_n: number of records that have the distance.
        hd95_median, asd_median: in pixels, over those records.
        difference: mean Dice minus the baseline's mean Dice, over the records that both systems have scored.
        difference_n: number of these records.
        p: Wilcoxon's signed-rank test of these pairs, two-sided, not corrected for the number of comparisons.
        review_n: number of masks that the column `review` marks for review.
        bad_n: number of masks with a Dice below 0.7.
        bad_found: number of these masks that are marked for review.
        reference_dice_mean: for robustness prompts only: mean Dice between the masks for this prompt and the masks for
            the reference prompt.
        nsd_mean: normalised surface distance, over records.
        nsd_mm_n, nsd_mm_mean: the same with a tolerance in millimetres, and the number of records that have it.
        patients_n: number of patients of the records with scores, which intervals and p count; None if none are named.
        lesions, presence: scores of all lesions, and of images; their attributes are columns of their own in the CSV.
    """

    dataset: str
    prompt_name: str
    prompt_class: str
    system: str
    n: int
    n_failed: int
    dice_mean: float | None
    dice_sd: float | None
    dice_median: float | None
    dice_low: float | None
    dice_high: float | None
    iou_mean: float | None
    precision_mean: float | None
    recall_mean: float | None
    hd95_n: int
    hd95_median: float | None
    asd_n: int
    asd_median: float | None
    difference: float | None
    difference_n: int | None
    p: float | None
    review_n: int
    bad_n: int
    bad_found: int
    reference_dice_mean: float | None
    nsd_mean: float | None
    nsd_mm_n: int
    nsd_mm_mean: float | None
    patients_n: int | None
    lesions: LesionTotals
    presence: PresenceTotals


def compare(rows: Rows, baseline: str, resamples: int, seed: int, patient: str | None = None) -> list[TableRow]:
    """Return the rows of the table, in the order in which datasets, prompts and systems first occur in the scores.

    Args:
        rows: scores, with the columns of SCORES_SCHEMA.
        baseline: the system that the other systems are compared with.
        resamples: number of bootstrap samples.
        seed: random seed of the bootstrap; each table row starts with this seed.
        patient: column of the patient in the scores; see `vlsm.evaluation.statistics`. None: each image is a sample.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["dataset"], row["prompt_name"], row["system"]].append(row)
    datasets, prompts, systems = (list(dict.fromkeys(key[part] for key in groups)) for part in range(3))
    order = [(d, p, s) for d in datasets for p in prompts for s in systems if (d, p, s) in groups]
    sampling = resamples, seed, patient
    return [_summarize(key, groups[key], groups.get((*key[:2], baseline), []), sampling) for key in order]


def _summarize(
    key: tuple[str, str, str], rows: Rows, baseline_rows: Rows, sampling: tuple[int, int, str | None]
) -> TableRow:
    *bootstrap, patient = sampling
    scored = [row for row in rows if row["status"] == "ok"]
    dice = values_of(scored, "dice")
    hd95, asd, nsd_mm = (values_of(scored, name) for name in ("hd95_px", "asd_px", "nsd_mm"))
    low, high = interval(dice, [patient_of(row, patient) for row in scored], *bootstrap)
    is_baseline = rows is baseline_rows
    difference, difference_n, p = (None, None, None) if is_baseline else compare_pairs(scored, baseline_rows, patient)
    dataset, prompt_name, system = key
    return TableRow(
        dataset=dataset,
        prompt_name=prompt_name,
        prompt_class=rows[0]["prompt_class"],
        system=system,
        n=len(scored),
        n_failed=len(rows) - len(scored),
        dice_mean=mean(dice),
        dice_sd=float(dice.std(ddof=1)) if len(dice) > 1 else None,
        dice_median=median(dice),
        dice_low=low,
        dice_high=high,
        **{f"{name}_mean": mean(values_of(scored, name)) for name in ("iou", "precision", "recall")},
        hd95_n=len(hd95),
        hd95_median=median(hd95),
        asd_n=len(asd),
        asd_median=median(asd),
        difference=difference,
        difference_n=difference_n,
        p=p,
        review_n=sum(row["review"] is not None for row in scored),
        bad_n=int((dice < BAD_DICE).sum()),
        bad_found=sum(row["review"] is not None and row["dice"] < BAD_DICE for row in scored),
        reference_dice_mean=mean(values_of(scored, "reference_dice")),
        nsd_mean=mean(values_of(scored, "nsd")),
        nsd_mm_n=len(nsd_mm),
        nsd_mm_mean=mean(nsd_mm),
        patients_n=None if patient is None else count_patients(scored, patient),
        lesions=add_lesions(scored),
        presence=add_presence(scored),
    )


_GROUPS = {"lesions": LesionTotals, "presence": PresenceTotals}  # attributes of a TableRow that are several columns


def format_csv(rows: Iterable[TableRow]) -> str:
    """Return the table as CSV with all columns; None becomes an empty cell."""
    file = io.StringIO()
    names = [field.name for field in fields(TableRow) if field.name not in _GROUPS]
    names += [field.name for group in _GROUPS.values() for field in fields(group)]
    CsvWriter(file, names).write_all(map(_flatten, rows))
    return file.getvalue()


def _flatten(row: TableRow) -> dict[str, Any]:
    values = asdict(row)
    groups = [values.pop(name) for name in _GROUPS]
    return values | {name: value for group in groups for name, value in group.items()}


_RULES = """\
Dice, IoU, precision and recall are means over n labels, at the original size of the image. An image counts once for
each of its labels. `±` is the standard deviation. Square brackets hold the 95 % bootstrap interval of the mean. HD95
(95 % Hausdorff distance) and ASD (average symmetric surface distance) are medians in pixels, over the number of
labels in parentheses. NSD (normalised surface distance) is the share of both outlines within {tolerances} of each
other, as a mean over labels. If mask and label are both empty, overlaps and NSD are 1 and distances are 0. If exactly
one of them is empty, overlaps and NSD are 0 and there is no distance. Failed ones are counted beside n and are in no
other number. Empty labels (`negative`) are counted beside n too; their Dice is in the means. Difference is mean Dice
minus the mean Dice of the baseline, {baseline}, over the labels that both systems have scored. p is Wilcoxon's
signed-rank test of these pairs, two-sided and **not corrected** for the number of comparisons. The best mean Dice of a
dataset and prompt is bold. Review is the number of masks that the column `review` marks for review. The parentheses
hold two shares: marked masks with a Dice below 0.7, among all marked masks; and the same masks, among all masks with a
Dice below 0.7. Prompts are named by where their text is from: `each image's own` (`prompts=[record]`: the prompt p1 of
the image, or the checkpoint's if it has none), `the checkpoint's own` (`own`), p0, p1, ... of the dataset.
"""
_PATIENTS = (
    "**Patients**: several images may be of one patient. The bootstrap of the intervals draws patients with all their "
    "images, and p compares the mean difference of each patient. An image without a patient is one of its own. The "
    "means are over images."
)
_HEADINGS = {
    HONEST: "## Prompts that are also available for an unlabelled archive",
    UPPER_BOUND: "## Upper bound: prompts that reveal the answer\n\nThese prompts describe the label, or differ if the "
    "label is empty, so that an unlabelled archive does not have them. The scores show how well a model follows its "
    "prompt. They do not show how well it would segment an archive.",
    ROBUSTNESS: "## Other words\n\nEffect of a different prompt on the masks. `Dice to reference` is the mean Dice "
    "between the masks for this prompt and the masks for the first of `prompts`. Dice compares the masks with the "
    "label. For a paraphrase, the best `Dice to reference` is 1. For an empty, generic or wrong prompt, 1 means that "
    "the model ignores the prompt.",
}
_COLUMNS = "Dataset|Prompt|System|n (failed)|Dice|median|IoU|Precision|Recall|HD95 (n)|ASD (n)|NSD|Difference|p|Review"
_ROBUSTNESS_COLUMNS = "Dataset|Prompt|System|n (failed)|Dice to reference|Dice"

_KNOWN = """\
**Systems that have learned from images on which they are scored**, themselves or by their members. Their scores are too
good. The number of such labels, as far as the record of a training lies beside its checkpoint:"""


def format_markdown(  # noqa: PLR0913 - all that the file tells
    rows: Sequence[TableRow],
    baseline: str,
    telling: Mapping[tuple[str, str], str],
    tolerances: tuple[float, float | None] = (TOLERANCE_PX, None),
    known: Sequence[tuple[str, int, int]] = (),
    groups: Sequence[str] = (),
    num_rejected: int = 0,
) -> str:
    """Return the table as Markdown: prompts known beforehand, upper bounds, robustness; presence, lesions, groups.

    Args:
        rows: rows of the table, from `compare`.
        baseline: the system that the other systems are compared with.
        telling: prompts that reveal the answer, from `find_telling`.
        tolerances: of the normalised surface distance, in pixels and in mm.
        known: systems that have learned from images here: name, number of such images, number of all images.
        groups: the section about groups.
        num_rejected: number of records that are left out, because a reviewer rejected their images.
    """
    units = zip(tolerances, ("pixels", "mm"), strict=True)
    within = " or ".join(f"{value:g} {unit}" for value, unit in units if value is not None)
    rules = _RULES.format(baseline=markdown_cell(baseline), tolerances=within)
    sections = ["# Scores", rules.strip(), *([_PATIENTS] if any(row.patients_n is not None for row in rows) else [])]
    if num_rejected:
        sections.append(f"Left out, because a reviewer rejected their images: {count(num_rejected, 'record')}.")
    if known:
        notes = [f"- {markdown_cell(name)}: {number:,} of {total:,}" for name, number, total in known]
        sections.append(f"{_KNOWN}\n\n" + "\n".join(notes))
    for prompt_class, heading in _HEADINGS.items():
        section_rows = [row for row in rows if row.prompt_class == prompt_class]
        if not section_rows:
            continue
        sections.append(heading)
        if prompt_class == UPPER_BOUND and telling:
            notes = [
                f"- {markdown_cell(dataset)}, {markdown_cell(LABELS.get(name, name))}: {markdown_cell(reason)}"
                for (dataset, name), reason in telling.items()
            ]
            sections.append(
                "These prompts reveal the answer, although their names do not show it:\n\n" + "\n".join(notes)
            )
        columns = _ROBUSTNESS_COLUMNS if prompt_class == ROBUSTNESS else _COLUMNS
        sections.append(format_grid(columns, [_cells(row, section_rows) for row in section_rows]))
    main = [row for row in rows if row.prompt_class != ROBUSTNESS]
    sections += [*format_presence(main), *format_lesions(main), *groups]
    return "\n\n".join(sections) + "\n"


def _cells(row: TableRow, section_rows: Sequence[TableRow]) -> list[str]:
    negative = f", {row.presence.negatives_n} negative" if row.presence.negatives_n else ""
    patients = "" if row.patients_n is None else f", {row.patients_n} patients"
    start = [*name_cells(row), f"{row.n} ({row.n_failed}){negative}{patients}"]
    dice = format_number(row.dice_mean)
    if _is_best(row, section_rows):
        dice = f"**{dice}**"
    if row.dice_sd is not None:
        dice += f" ± {format_number(row.dice_sd)} [{format_number(row.dice_low)}, {format_number(row.dice_high)}]"
    if row.prompt_class == ROBUSTNESS:
        return [*start, format_number(row.reference_dice_mean), dice]
    means = map(format_number, (row.dice_median, row.iou_mean, row.precision_mean, row.recall_mean))
    distances = [
        f"{format_number(median, '.1f')} ({count})"
        for median, count in ((row.hd95_median, row.hd95_n), (row.asd_median, row.asd_n))
    ]
    nsd = format_number(row.nsd_mean) + (
        f"; {row.nsd_mm_mean:.3f} in mm ({row.nsd_mm_n})" if row.nsd_mm_mean is not None else ""
    )
    differences = [format_number(row.difference, "+.3f"), format_number(row.p, ".2g")]
    return [*start, dice, *means, *distances, nsd, *differences, _review(row)]


def _review(row: TableRow) -> str:
    """Return the number of masks marked for review, then precision and recall of the marks for bad masks."""
    if not row.review_n:
        return "0"
    precision, recall = row.bad_found / row.review_n, row.bad_found / row.bad_n if row.bad_n else None
    return f"{row.review_n} ({format_number(precision, '.2f')}, {format_number(recall, '.2f')})"


def _is_best(row: TableRow, section_rows: Sequence[TableRow]) -> bool:
    """Return whether no other system has a higher mean Dice, rounded as shown; a single system is never the best."""
    rivals = [
        other
        for other in section_rows
        if (other.dataset, other.prompt_name) == (row.dataset, row.prompt_name) and other.dice_mean is not None
    ]
    if row.dice_mean is None or len(rivals) < 2 or row.prompt_class == ROBUSTNESS:
        return False
    return round(row.dice_mean, 3) == max(round(other.dice_mean or 0, 3) for other in rivals)
