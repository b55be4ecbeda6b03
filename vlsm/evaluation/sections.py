"""Further sections of table.md: images without the finding, and lesions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlsm.cells import markdown_cell
from vlsm.datasets.records import LABELS

if TYPE_CHECKING:
    from vlsm.evaluation.groups import GroupRow
    from vlsm.evaluation.tables import TableRow

_LESIONS = """\
## Lesions

A lesion is a connected component of the label; a component is one of the mask (pixels that touch at a side or a
corner). All figures are of all lesions of a dataset together, not means over images. **Matched**: a component and a
lesion with an IoU above 0.5. Precision is the share of components that are matched, recall the share of lesions, F1
their harmonic mean. **Touched**: the same for components that touch any lesion, and lesions that any component touches.
PQ is the panoptic quality: F1 of the matches times their mean IoU. Dice per lesion compares a lesion with all
components that touch it; a lesion that none touches has 0. An empty cell has no lesion or component to count."""
_LESION_COLUMNS = (
    "Dataset|Prompt|System|Lesions|Components|Matched: precision|recall|F1|Touched: precision|recall|F1|PQ"
    "|Dice per lesion"
)

_PRESENCE = """\
## Images without the finding

Some labels are empty: these records are negative. Their Dice is 1 if the mask is empty, else 0, so that **the mean Dice
above depends on their number**; `Dice with finding` is the mean over the other records. A system says that an image
shows the finding if its highest probability reaches `Threshold` (any: if the mask has a foreground pixel). Sensitivity
is the share of images with the finding for which it says so, specificity the share of images without for which it does
not. AUROC is that of the highest probability. False area is the mean share of an image without the finding that is
marked."""
_PRESENCE_COLUMNS = (
    "Dataset|Prompt|System|n|negative|Dice with finding|Threshold|Sensitivity|Specificity|AUROC|False area"
)


def format_presence(rows: Sequence["TableRow"]) -> list[str]:
    """Return the section about images without the finding, or none if all images show it."""
    cells = [
        [
            *name_cells(row),
            *map(str, (row.n, one.negatives_n)),
            format_number(one.positive_dice_mean),
            format_number(one.presence_threshold, ".3g") or "any",
            *map(format_number, (one.sensitivity, one.specificity, one.presence_auroc)),
            format_number(one.false_area_mean, ".2%"),
        ]
        for row in rows
        if (one := row.presence).negatives_n
    ]
    return [_PRESENCE, format_grid(_PRESENCE_COLUMNS, cells)] if cells else []


def format_lesions(rows: Sequence["TableRow"]) -> list[str]:
    """Return the section about lesions, or none if the scores are of an earlier version, which had no lesions."""
    cells = [
        [
            *name_cells(row),
            *map(str, (one.lesions_n, one.components_n)),
            *map(format_number, (one.lesion_precision, one.lesion_recall, one.lesion_f1)),
            *map(format_number, (one.touch_precision, one.touch_recall, one.touch_f1)),
            *map(format_number, (one.panoptic_quality, one.lesion_dice_mean)),
        ]
        for row in rows
        if (one := row.lesions).lesions_n + one.components_n
    ]
    return [_LESIONS, format_grid(_LESION_COLUMNS, cells)] if cells else []


def format_grid(columns: str, cells: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown. The heads of the columns are one text, with a bar between two."""
    heads = columns.split("|")
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *cells])


def name_cells(row: "TableRow | GroupRow") -> list[str]:
    """Return the cells that tell what a row is about."""
    return [markdown_cell(name) for name in (row.dataset, LABELS.get(row.prompt_name, row.prompt_name), row.system)]


def format_number(value: float | None, form: str = ".3f") -> str:
    """Return a number as text, and "" for None."""
    return "" if value is None else format(value, form)
