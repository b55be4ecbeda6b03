"""An evaluation before and after its work: settings to plan, rows of scores to files.

OUTPUT/config.yaml       resolved settings, checkpoint digests, versions, git revision, what is planned
OUTPUT/inputs/*.parquet  for each system the images and texts that it segments
OUTPUT/runs/*/           its segment run
OUTPUT/scores.parquet    the result, a row per record, prompt and system
OUTPUT/table.csv, .md    what the rows say together
OUTPUT/summary.json      written last: its presence means complete
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.errors import ConfigError, ResultError
from vlsm.evaluation.parts import SCORES_SCHEMA
from vlsm.evaluation.prompts import HONEST, UPPER_BOUND, find_telling
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import System, list_images, name_systems, plan_systems
from vlsm.evaluation.tables import compare, format_csv, format_markdown
from vlsm.runs.record import SUMMARY_NAME, create_record, describe_differences, forget_run, make_record, read_record

logger = logging.getLogger("vlsm")

SCORES_NAME, CSV_NAME, MARKDOWN_NAME = "scores.parquet", "table.csv", "table.md"


@dataclass(frozen=True)
class Evaluation:
    """A planned evaluation: resolved settings and all systems."""

    settings: EvaluateSettings
    systems: list[System]

    @property
    def num_rows(self) -> int:
        """Scores that are planned."""
        return sum(system.num_rows for system in self.systems)


def plan_evaluation(settings: EvaluateSettings) -> tuple[Evaluation, dict[str, Any]]:
    """What is to be done, and what decides it beside the settings; nothing is written.

    Raises:
        VlsmError: a setting, a path, a dataset, a checkpoint or a segment run is of no use.
    """
    settings = name_systems(settings)
    systems, facts = plan_systems(settings)
    return Evaluation(settings, systems), facts


def prepare_evaluation(settings: EvaluateSettings) -> Evaluation:
    """Plan an evaluation, or take it up again where OUTPUT holds its plan.

    Raises:
        ConfigError: OUTPUT belongs to an evaluation with other settings.
        VlsmError: as `plan_evaluation` raises it.
    """
    evaluation, facts = plan_evaluation(settings)
    settings, output = evaluation.settings, evaluation.settings.output
    with storage.name_errors("OUTPUT", output):
        record = read_record(output)
        if record is not None and settings.start_over:
            _forget(output, record)
            record = None
        if record is None:
            _plan(evaluation, facts)
            record = read_record(output) or {}
    if differences := describe_differences(record, settings, facts):
        raise ConfigError(
            f"OUTPUT {output!r} belongs to an evaluation with other settings: {'; '.join(differences)}; "
            "choose another OUTPUT, or --set start_over=true to forget that evaluation"
        )
    return evaluation


def _plan(evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Put the lists of images, then the record, unless another job has put one at the same time."""
    output, runs = evaluation.settings.output, {}
    for system in evaluation.systems:
        if system.segment is not None:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(list_images(system.targets)), sink)
            storage.write_bytes(system.segment.input, sink.getvalue())
            runs[system.name] = system.output.removeprefix(output + "/")
    plan = {"runs": runs, "num_records": len(evaluation.systems[0].targets), "num_rows": evaluation.num_rows}
    create_record(output, make_record(evaluation.settings, facts, plan))


def _forget(output: str, record: dict[str, Any]) -> None:
    """Remove an earlier evaluation's files, and nothing else; its record, which names its runs, at last."""
    runs = record["plan"].get("runs")
    if runs is None:
        raise ConfigError(f"OUTPUT {output!r} belongs to another job; choose another OUTPUT")
    for run in runs.values():
        forget_run(storage.join(output, run), folders=(("masks", "part-"), ("manifest", "plan-")))
    forget_run(output, (SCORES_NAME, CSV_NAME, MARKDOWN_NAME), [("inputs", "")])


def finish_evaluation(evaluation: Evaluation, tables: Iterable[pa.Table], seconds: float) -> dict[str, Any]:
    """Write scores, tables and at last summary.json, and return that, if every planned row is there once.

    Args:
        evaluation: the evaluation.
        tables: its scores, with the columns of SCORES_SCHEMA, in any order.
        seconds: how long it took.

    Raises:
        ResultError: the rows are not those planned.
    """
    keys = [
        (system.name, target.record.dataset, target.record.where, name)
        for system in evaluation.systems
        for target in system.targets
        for name in target.texts
    ]
    rows = pa.concat_tables(tables).to_pylist()
    planned, found = Counter(keys), Counter(map(_key, rows))
    if planned != found:
        num_missing, num_extra = (planned - found).total(), (found - planned).total()
        raise ResultError(
            f"{len(rows):,} scores are there, planned were {len(keys):,}: {num_missing:,} are missing, and "
            f"{num_extra:,} are there twice or were not planned"
        )
    places = {key: place for place, key in enumerate(keys)}
    rows.sort(key=lambda row: places[_key(row)])
    telling = find_telling(rows)
    for row in rows:
        if row["prompt_class"] == HONEST and (row["dataset"], row["prompt_name"]) in telling:
            row["prompt_class"] = UPPER_BOUND
    for (dataset, name), reason in telling.items():
        logger.info("dataset %s, prompt %s gives the answer away: %s", dataset, name, reason)
    return _write(evaluation.settings, rows, telling, seconds)


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["system"], row["dataset"], row["record"], row["prompt_name"]


def _write(
    settings: EvaluateSettings, rows: list[dict[str, Any]], telling: dict[tuple[str, str], str], seconds: float
) -> dict[str, Any]:
    output, sink = settings.output, io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCORES_SCHEMA), sink, compression="zstd")
    storage.write_bytes(storage.join(output, SCORES_NAME), sink.getvalue())
    lines = compare(rows, settings.baseline or rows[0]["system"], settings.resamples, settings.seed)
    storage.write_bytes(storage.join(output, CSV_NAME), format_csv(lines).encode())
    table = format_markdown(lines, settings.baseline or rows[0]["system"], telling)
    storage.write_bytes(storage.join(output, MARKDOWN_NAME), table.encode())
    statuses = Counter(row["status"] for row in rows)
    summary = {
        "rows": len(rows),
        **{status: statuses[status] for status in ("ok", "failed")},
        "gives_answer_away": [" ".join(key) for key in telling],
        "dice": [
            {"dataset": line.dataset, "prompt": line.prompt_name, "system": line.system, "mean": line.dice_mean}
            for line in lines
            if line.prompt_class == HONEST
        ],
        "seconds": round(seconds, 1),
    }
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary
