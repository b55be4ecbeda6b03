"""What scores say together: a line per dataset, prompt and system, as CSV and Markdown."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vlsm.evaluation.prompts import HONEST, ROBUSTNESS, UPPER_BOUND
from vlsm.segmentation.metrics import BAD_DICE

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        dataset, prompt_name, prompt_class, system: what it is of.
        n, n_failed: records that have scores, and those that have none, which no mean counts.
        dice_mean, dice_sd, dice_median: of the records; the standard deviation is the sample's.
        dice_low, dice_high: 95 % interval of the mean, by bootstrap over records.
        iou_mean, precision_mean, recall_mean: of the records.
        hd95_n, hd95_median, asd_n, asd_median: in pixels, of the records that have a distance.
        difference: mean Dice less the baseline's, over the records that both have.
        difference_n: how many these are.
        p: of Wilcoxon's signed-rank test of their pairs, two-sided, not corrected for the number of comparisons.
        review_n: of the records, whose masks the run says somebody should look at.
        bad_n, bad_found: masks of a Dice below 0.7, and how many of them are to be looked at.
        reference_dice_mean: of robustness prompts: between the masks for this prompt and those for the reference.
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


def compare(rows: Rows, baseline: str, resamples: int, seed: int) -> list[Line]:
    """The lines of a table, in the order of the rows.

    Args:
        rows: scores, with the columns of SCORES_SCHEMA.
        baseline: the system that others are compared with.
        resamples: of the bootstrap.
        seed: of the bootstrap; each line draws with it anew.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["dataset"], row["prompt_name"], row["system"]].append(row)
    datasets, prompts, systems = (list(dict.fromkeys(key[place] for key in groups)) for place in range(3))
    order = [(d, p, s) for d in datasets for p in prompts for s in systems if (d, p, s) in groups]
    return [_line(key, groups[key], groups.get((*key[:2], baseline), []), (resamples, seed)) for key in order]


def _line(key: tuple[str, str, str], rows: Rows, base: Rows, bootstrap: tuple[int, int]) -> Line:
    good = [row for row in rows if row["status"] == "ok"]
    dice = _values(good, "dice")
    hd95, asd, references = (_values(good, name) for name in ("hd95_px", "asd_px", "reference_dice"))
    low, high = _interval(dice, *bootstrap)
    difference, difference_n, p = _paired(good, base) if rows is not base else (None, None, None)
    dataset, prompt_name, system = key
    return Line(
        dataset=dataset,
        prompt_name=prompt_name,
        prompt_class=rows[0]["prompt_class"],
        system=system,
        n=len(good),
        n_failed=len(rows) - len(good),
        dice_mean=_mean(dice),
        dice_sd=float(dice.std(ddof=1)) if len(dice) > 1 else None,
        dice_median=_median(dice),
        dice_low=low,
        dice_high=high,
        **{f"{name}_mean": _mean(_values(good, name)) for name in ("iou", "precision", "recall")},
        hd95_n=len(hd95),
        hd95_median=_median(hd95),
        asd_n=len(asd),
        asd_median=_median(asd),
        difference=difference,
        difference_n=difference_n,
        p=p,
        review_n=sum(row["review"] is not None for row in good),
        bad_n=int((dice < BAD_DICE).sum()),
        bad_found=sum(row["review"] is not None and row["dice"] < BAD_DICE for row in good),
        reference_dice_mean=_mean(references),
    )


def _values(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if row[name] is not None], float)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of a mean; of less than two values there is none."""
    if len(values) < 2:
        return None, None
    from scipy import stats  # here and below, so that what is wrong with settings is said in a second

    found = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _paired(rows: Rows, base: Rows) -> tuple[float | None, int | None, float | None]:
    """Mean difference to the baseline, over how many records, and p."""
    theirs = {row["record"]: row["dice"] for row in base if row["status"] == "ok"}
    pairs = np.array([(row["dice"], theirs[row["record"]]) for row in rows if row["record"] in theirs], float)
    if not len(pairs):
        return None, None if not base else 0, None
    from scipy import stats

    differences = pairs[:, 0] - pairs[:, 1]
    # of pairs that are all equal nothing can be ranked, and nothing speaks for a difference
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return float(differences.mean()), len(pairs), p


def format_csv(lines: Iterable[Line]) -> str:
    """All lines with all columns; what there is not is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, lines))
    return file.getvalue()


_RULES = """\
Dice, IoU, precision and recall are means over records (an image and one of its labels) at the image's original size;
`±` is the standard deviation, brackets hold the 95 % bootstrap interval of the mean. HD95 and ASD (average symmetric
surface distance) are medians in pixels. Mask and label both empty: overlaps 1, distances 0. Just one of them empty:
overlaps 0, no distance, so that HD95 and ASD are of the n records beside them. Failed records are in no figure; their
number stands beside n. The difference is that of mean Dice to the baseline, `{baseline}`, over the records that both
have; p is Wilcoxon's signed-rank test of these pairs, two-sided and **not corrected** for the number of comparisons.
The best mean Dice of a dataset and prompt is bold. Review is how many masks the column `review` would have somebody
look at; brackets hold the share of them with a Dice below 0.7, and the share of all such masks that is among them.
"""
_HEADINGS = {
    HONEST: "## Prompts that an unlabelled archive has as well",
    UPPER_BOUND: "## Upper bound: prompts that tell of the answer\n\nNo unlabelled archive has these: they describe "
    "the label, or differ where it is empty. They say how well a model listens, not how well it would do.",
    ROBUSTNESS: "## Other words\n\nHow far masks move when the prompt is another: `Dice to reference` is the mean Dice "
    "between the masks for this prompt and those for the first of `prompts`, Dice that to the label. For a paraphrase "
    "1 is best; for no prompt, a generic or a wrong one 1 means that the model does not listen.",
}
_COLUMNS = "Dataset|Prompt|System|n (failed)|Dice|median|IoU|Precision|Recall|HD95 (n)|ASD (n)|Difference|p|Review"
_ROBUSTNESS_COLUMNS = "Dataset|Prompt|System|n (failed)|Dice to reference|Dice"


def format_markdown(lines: Sequence[Line], baseline: str, telling: Mapping[tuple[str, str], str]) -> str:
    """The table for people: honest prompts, then what is an upper bound, then robustness.

    Args:
        lines: from `compare`.
        baseline: the system that others are compared with.
        telling: the prompts that give the answer away, by dataset and name, and how.
    """
    sections = ["# Scores", _RULES.format(baseline=baseline).strip()]
    for prompt_class, heading in _HEADINGS.items():
        own = [line for line in lines if line.prompt_class == prompt_class]
        if not own:
            continue
        sections.append(heading)
        if prompt_class == UPPER_BOUND and telling:
            notes = [f"- {dataset}, {name}: {reason}" for (dataset, name), reason in telling.items()]
            sections.append(
                "Prompts that give the answer away though their names do not say so:\n\n" + "\n".join(notes)
            )
        columns = _ROBUSTNESS_COLUMNS if prompt_class == ROBUSTNESS else _COLUMNS
        cells = [columns.split("|"), ["---"] * len(columns.split("|")), *(_cells(line, own) for line in own)]
        sections.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(sections) + "\n"


def _cells(line: Line, lines: Sequence[Line]) -> list[str]:
    names = [_escape(name) for name in (line.dataset, line.prompt_name, line.system)]
    start = [*names, f"{line.n} ({line.n_failed})"]
    dice = _number(line.dice_mean)
    if _is_best(line, lines):
        dice = f"**{dice}**"
    if line.dice_sd is not None:
        dice += f" ± {_number(line.dice_sd)} [{_number(line.dice_low)}, {_number(line.dice_high)}]"
    if line.prompt_class == ROBUSTNESS:
        return [*start, _number(line.reference_dice_mean), dice]
    means = map(_number, (line.dice_median, line.iou_mean, line.precision_mean, line.recall_mean))
    distances = [
        f"{_number(median, '.1f')} ({count})"
        for median, count in ((line.hd95_median, line.hd95_n), (line.asd_median, line.asd_n))
    ]
    return [*start, dice, *means, *distances, _number(line.difference, "+.3f"), _number(line.p, ".2g"), _review(line)]


def _review(line: Line) -> str:
    """How many masks are to be looked at, the share of bad ones among them, and the share of bad ones that is found."""
    if not line.review_n:
        return "0"
    precision, recall = line.bad_found / line.review_n, line.bad_found / line.bad_n if line.bad_n else None
    return f"{line.review_n} ({_number(precision, '.2f')}, {_number(recall, '.2f')})"


def _is_best(line: Line, lines: Sequence[Line]) -> bool:
    """Whether no other system is better in the digits that are shown; what is alone is not compared."""
    rivals = [
        other
        for other in lines
        if (other.dataset, other.prompt_name) == (line.dataset, line.prompt_name) and other.dice_mean is not None
    ]
    if line.dice_mean is None or len(rivals) < 2 or line.prompt_class == ROBUSTNESS:
        return False
    return round(line.dice_mean, 3) == max(round(other.dice_mean or 0, 3) for other in rivals)


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
