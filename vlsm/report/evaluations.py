"""The report of an evaluation."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds

from vlsm import storage
from vlsm.report import parts
from vlsm.report.page import Page, Section, Stat, as_table, provenance
from vlsm.report.pictures import Painter, read_rle_masks, shorten
from vlsm.report.survey import Extremes, Survey, scan

_SCORES_NAME, _TABLE_NAME = "scores.parquet", "table.csv"
_SHORT = {"mean": "dice_mean", "ci_low": "dice_low", "ci_high": "dice_high"}  # names that a table may have as well


def evaluation_page(output: str, title: str) -> Page:
    """All that is told of an evaluation.

    Raises:
        ConfigError: OUTPUT has no config.yaml of a run.
    """
    record, summary = parts.read_config(output), parts.read_finished_summary(output)
    fs, path = storage.open_uri(storage.join(output, _SCORES_NAME))

    def open_files(paths: list[str]) -> ds.Dataset:
        return ds.dataset(paths, filesystem=fs, format="parquet")

    dataset, table = open_files([path]), _read_table(output)
    survey = Survey(metric="dice", group="system")
    for rows in scan(dataset):
        survey.add(rows)
    leader = _leader(table)
    own, ends = _ends(dataset, leader)
    painter = Painter(parts.open_reader(record["config"]), read_rle_masks)
    columns = ["mask_rle", "target_rle", "height", "width"]
    groups, cards = parts.show(ends, survey.sample, painter, columns, open_files)
    of = f"Of {leader['system']} with prompt {leader['prompt_name']}." if leader else ""
    return Page(
        kind="Evaluation",
        title=title,
        banner="" if summary else "This evaluation is not complete.",
        stats=_stats(table, leader, survey, own),
        sections=[
            *_scores(table),
            *parts.distributions(survey, "scored rows, whatever the prompt"),
            *parts.calibrations(_checkpoints(record["config"])),
            Section("cases", "Cases to look at", shorten(of, 300), groups=groups, has_legend=True),
            *parts.failures(survey),
        ],
        cards=cards,
        gallery_note=parts.gallery_note(
            len(cards), survey.num_rows, "datasets, systems, prompts, statuses and ranges of Dice"
        ),
        outlines=["prediction", "target"],
        record=record,
        facts=provenance(record),
    )


def _checkpoints(config: dict[str, Any]) -> dict[str, str]:
    """Where those of the systems are, by name."""
    members = [member for own in config.get("systems", {}).values() for member in own]
    uris = [*config.get("checkpoints", ()), *(member["checkpoint"] for member in members)]
    return {"/".join(uri.rstrip("/").split("/")[-2:]): uri for uri in uris}


def _read_table(output: str) -> list[dict[str, Any]]:
    """The rows of table.csv, whatever columns it has; none where it is not written yet."""
    uri = storage.join(output, _TABLE_NAME)
    if not storage.exists(uri):
        return []
    options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in ("dataset", "prompt_name", "system")}
    )
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(io.BytesIO(storage.read_bytes(uri)), None, lines, options)
    return list(table.rename_columns([_SHORT.get(name, name) for name in table.column_names]).to_pylist())


def _scores(table: list[dict[str, Any]]) -> list[Section]:
    """The table; what is the same in all of its rows is told once."""
    if not table:
        return []
    same = {
        name: value
        for name, value in table[0].items()
        if len(table) > 1 and isinstance(value, str) and all(row[name] == value for row in table)
    }
    told = "; ".join(f"{name.replace('_', ' ')}: {shorten(value)}" for name, value in same.items())
    note = "The line beside a mean of Dice is its interval, on an axis from 0 to 1."
    rows = [{name: value for name, value in row.items() if name not in same} for row in table]
    return [Section("scores", "Scores", told, tables=[as_table(rows, note)])]


def _leader(table: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The system and prompt with the highest mean Dice over datasets, of prompts that tell nothing of the target."""
    wanted = {"system", "prompt_name", "dice_mean"}
    rows = [row for row in table if wanted <= row.keys() and isinstance(row["dice_mean"], float)]
    rows = [row for row in rows if row.get("prompt_class") in (None, "honest")] or rows
    means: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        means.setdefault((row["system"], row["prompt_name"]), []).append(row["dice_mean"])
    if not means:
        return None
    # a system that was not scored on all datasets cannot be compared with those that were
    most = max(map(len, means.values()))
    system, prompt_name = max((key for key in means if len(means[key]) == most), key=lambda key: sum(means[key]))
    own = [row for row in rows if (row["system"], row["prompt_name"]) == (system, prompt_name)]
    return {"system": system, "prompt_name": prompt_name, "rows": own}


def _ends(dataset: ds.Dataset, leader: dict[str, Any] | None) -> tuple[Survey, parts.Ends]:
    """Of the leader's rows, or all where there is none: what they say, and those at the ends of Dice and certainty."""
    condition = None
    if leader:
        condition = pc.field("system") == leader["system"]
        condition &= pc.field("prompt_name") == leader["prompt_name"]
    own = Survey(metric="dice", group="system")
    for table in scan(dataset, condition):
        own.add(table)
    dice = own.total("dice")
    ends = [
        ("Best", "highest Dice", Extremes("dice", is_highest=True)),
        ("Median", "nearest to the median of Dice", Extremes("dice", around=dice.median if dice else 0.5)),
        ("Worst", "lowest Dice", Extremes("dice")),
        ("Least confident", "by the mean probability inside the mask", Extremes("confidence")),
        ("Least agreement", "of the ensemble's members", Extremes("agreement")),
    ]
    for table in scan(dataset, condition):
        for *_, each in ends:
            each.add(table)
    return own, ends


def _stats(table: list[dict[str, Any]], leader: dict[str, Any] | None, survey: Survey, own: Survey) -> list[Stat]:
    stats = (
        [_lead(row, len(table) > 1) for row in leader["rows"][:3]] if leader else parts.metric_stats(survey, ("dice",))
    )
    if leader:
        stats.append(Stat("Images", f"{own.num_rows:,}"))
    counts = [(len(survey.values[name]), name) for name in ("system", "dataset")]
    several = ", ".join(f"{count:,} {name}s" for count, name in counts if count > 1)
    stats.append(Stat("Scores", f"{survey.num_rows:,}", several))
    stats.append(Stat("Failed", f"{survey.values['status']['failed']:,}", tone="warn" if survey.reasons else ""))
    return stats


def _lead(row: dict[str, Any], is_best: bool) -> Stat:
    low, high = row.get("dice_low"), row.get("dice_high")
    interval = f"interval {low:.3f} to {high:.3f}; " if isinstance(low, float) and isinstance(high, float) else ""
    what = " · ".join(str(row[name]) for name in ("dataset", "system", "prompt_name") if row.get(name))
    label = "Mean Dice, the best of the table" if is_best else "Mean Dice"
    return Stat(label, f"{row['dice_mean']:.3f}", interval + shorten(what), "lead")
