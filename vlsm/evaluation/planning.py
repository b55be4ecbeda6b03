"""Plan an evaluation, and write its scores, tables and summary.

OUTPUT/config.yaml       resolved settings, checkpoint digests, versions, git revision, plan
OUTPUT/inputs/*.parquet  images and prompts to segment, one file per system
OUTPUT/runs/*/           segment runs, one folder per system
OUTPUT/scores.parquet    scores, one row per record, prompt and system
OUTPUT/table.csv, .md    summary tables of the scores
OUTPUT/groups.csv        scores of groups, with the setting groups
OUTPUT/summary.json      written last: its presence means that the evaluation is complete
OUTPUT/lease/            while a job works on the evaluation (see vlsm.runs.lease)
"""

import io
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.datasets.records import OWN
from vlsm.errors import ConfigError, ResultError
from vlsm.evaluation.groups import compare_groups, format_groups, format_groups_csv
from vlsm.evaluation.parts import score_columns, scores_schema
from vlsm.evaluation.prompts import HONEST, UPPER_BOUND, find_telling
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import System, list_images, name_systems, plan_systems
from vlsm.evaluation.tables import compare, format_csv, format_markdown
from vlsm.runs.lease import Lease
from vlsm.runs.record import SUMMARY_NAME, create_record, describe_differences, forget_run, make_record, read_record
from vlsm.runs.schema import with_format
from vlsm.words import count

logger = logging.getLogger("vlsm")

SCORES_NAME, CSV_NAME, MARKDOWN_NAME = "scores.parquet", "table.csv", "table.md"
GROUPS_NAME = "groups.csv"


@dataclass(frozen=True)
class Evaluation:
    """A planned evaluation: resolved settings, all systems to score, and how many records a reviewer rejected."""

    settings: EvaluateSettings
    systems: list[System]
    num_rejected: int = 0

    @property
    def num_rows(self) -> int:
        """Number of planned rows of scores."""
        return sum(system.num_rows for system in self.systems)


def plan_evaluation(settings: EvaluateSettings) -> tuple[Evaluation, dict[str, Any]]:
    """Return the plan, and the facts besides the settings that decide the scores; write nothing.

    Raises:
        VlsmError: a setting, path, dataset, checkpoint or segment run cannot be used.
    """
    settings = name_systems(_keep_earlier_prompts(settings))
    systems, facts = plan_systems(settings)
    return Evaluation(settings, systems, facts.get("num_rejected", 0)), facts


def _keep_earlier_prompts(settings: EvaluateSettings) -> EvaluateSettings:
    """Return the settings with the prompts of an evaluation that an earlier version began in OUTPUT, if none are given.

    Its default was the prompt that is stored in the checkpoint. Its record has no group `data`.
    """
    if "prompts" in settings.model_fields_set or settings.start_over:
        return settings
    with storage.name_errors("OUTPUT", settings.output):
        record = read_record(settings.output)
    if record is None or "data" in record["config"]:
        return settings
    prompts = record["config"].get("prompts", (OWN,))
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ResultError(f"config.yaml of {settings.output!r} is damaged: its prompts are {prompts!r}")
    prompts = tuple(prompts)
    logger.info("an earlier version began the evaluation in %s: it goes on with prompts=[%s]", settings.output,
                ", ".join(prompts))  # fmt: skip
    return settings.model_copy(update={"prompts": prompts})


def prepare_evaluation(settings: EvaluateSettings, lease: Lease | None = None) -> Evaluation:
    """Return the evaluation, and write its plan if OUTPUT has none yet.

    Args:
        settings: settings of the evaluation.
        lease: the lease of OUTPUT. It is taken before anything is written, unless the evaluation is finished.

    Raises:
        LeaseError: another job works on OUTPUT.
        ConfigError: OUTPUT belongs to an evaluation with other settings.
        VlsmError: see `plan_evaluation`.
    """
    evaluation, facts = plan_evaluation(settings)
    settings, output = evaluation.settings, evaluation.settings.output
    with storage.name_errors("OUTPUT", output):
        is_finished = storage.exists(storage.join(output, SUMMARY_NAME))
        if lease is not None and not (is_finished and not settings.start_over and not settings.retry_failed):
            _take(lease, settings, facts)
        record = read_record(output)
        if record is not None and settings.start_over:
            _remove_evaluation(output, record)
            record = None
        if record is None:
            _write_plan(evaluation, facts)
            record = read_record(output) or {}
    _check_record(record, settings, facts)
    return evaluation


def _take(lease: Lease, settings: EvaluateSettings, facts: dict[str, Any]) -> None:
    """Take the lease of a new evaluation, or of one with equal settings, and remove what killed processes left."""
    record = read_record(settings.output)
    if record is not None and not settings.start_over:
        _check_record(record, settings, facts)
    lease.take()
    storage.remove_leftovers(storage.join(settings.output, "inputs"))


def _check_record(record: dict[str, Any], settings: EvaluateSettings, facts: dict[str, Any]) -> None:
    if differences := describe_differences(record, settings, facts):
        raise ConfigError(
            f"OUTPUT {settings.output!r} belongs to an evaluation with other settings: {'; '.join(differences)}; "
            "choose another OUTPUT, or --set start_over=true to delete that evaluation"
        )


def _write_plan(evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Write the image lists, then config.yaml, unless another job has already written config.yaml."""
    output, runs = evaluation.settings.output, {}
    for system in evaluation.systems:
        if system.segment is not None:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(list_images(system.targets)), sink)
            storage.write_bytes(system.segment.input, sink.getvalue())
            runs[system.name] = system.output.removeprefix(output + "/")
    plan = {"runs": runs, "num_records": len(evaluation.systems[0].targets), "num_rows": evaluation.num_rows}
    create_record(output, make_record(evaluation.settings, facts, plan))


def _is_run(name: object) -> bool:
    """Return whether a name in config.yaml is that of a folder below runs/, as this module writes it."""
    return isinstance(name, str) and re.fullmatch(r"runs/\w[\w.-]*", name, re.ASCII) is not None


def _remove_evaluation(output: str, record: dict[str, Any]) -> None:
    """Remove only the files of an earlier evaluation. Its config.yaml names its segment runs, so it goes after them."""
    runs = record["plan"].get("runs")
    if runs is None:
        raise ConfigError(f"OUTPUT {output!r} belongs to another job; choose another OUTPUT")
    if not isinstance(runs, dict) or not all(map(_is_run, runs.values())):
        raise ResultError(f"config.yaml of {output!r} is damaged: its segment runs {runs!r} are not all below runs/")
    for run in runs.values():
        forget_run(storage.join(output, run), folders=(("masks", "part-"), ("manifest", "plan-")))
    forget_run(output, (SCORES_NAME, CSV_NAME, GROUPS_NAME, MARKDOWN_NAME), [("inputs", "")])


def finish_evaluation(evaluation: Evaluation, tables: Iterable[pa.Table], seconds: float) -> dict[str, Any]:
    """Write scores, tables and last summary.json, and return the summary.

    Args:
        evaluation: the evaluation.
        tables: the scores, with the columns of `scores_schema`, in any order.
        seconds: duration of the evaluation in seconds, for the summary.

    Raises:
        ResultError: a planned row is missing, or a row is repeated or not planned; nothing is written.
    """
    keys = [
        (system.name, target.record.dataset, target.record.where, name)
        for system in evaluation.systems
        for target in system.targets
        for name in target.texts
    ]
    rows = pa.concat_tables(tables).to_pylist()
    planned, received = Counter(keys), Counter(map(_key, rows))
    if planned != received:
        num_missing, num_extra = (planned - received).total(), (received - planned).total()
        raise ResultError(
            f"the evaluation has {len(rows):,} rows of scores; the plan has {len(keys):,}: {num_missing:,} rows are "
            f"missing, {num_extra:,} rows are repeated or not planned"
        )
    positions = {key: position for position, key in enumerate(keys)}
    rows.sort(key=lambda row: positions[_key(row)])
    telling = find_telling(rows)
    for row in rows:
        if row["prompt_class"] == HONEST and (row["dataset"], row["prompt_name"]) in telling:
            row["prompt_class"] = UPPER_BOUND
    for (dataset, name), reason in telling.items():
        logger.info("dataset %s: prompt %s reveals the answer: %s", dataset, name, reason)
    _warn_of_empty(rows, evaluation.settings)
    return _write_results(evaluation, rows, telling, seconds)


def _warn_of_empty(rows: Iterable[dict[str, Any]], settings: EvaluateSettings) -> None:
    """Warn of datasets whose labels are all empty: a system that marks nothing has a Dice of 1 there."""
    fractions: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["target_fraction"] is not None:
            fractions[row["dataset"]][row["record"]] = row["target_fraction"]
    for dataset, by_record in fractions.items():
        if not any(by_record.values()):
            logger.warning(
                "dataset %s: all %d labels of split %s are empty with data.mask_threshold=%d; "
                "if their files hold smaller values than that, --set data.mask_threshold=0",
                *(dataset, len(by_record), settings.split, settings.data.mask_threshold),
            )


def _tell_patients(rows: Iterable[dict[str, Any]], settings: EvaluateSettings) -> None:
    """Log that intervals take images for samples, although several are of one patient or video."""
    groups = {(row["dataset"], row["record"]): row["group"] for row in rows if row["group"] is not None}
    if settings.patient is None and len(set(groups.values())) < len(groups):
        logger.info(
            "%s have %s in the column group: --set patient=group gives intervals and tests by patient",
            count(len(groups), "record"),
            count(len(set(groups.values())), "value"),
        )


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["system"], row["dataset"], row["record"], row["prompt_name"]


def _write_results(
    evaluation: Evaluation, rows: list[dict[str, Any]], telling: dict[tuple[str, str], str], seconds: float
) -> dict[str, Any]:
    settings, sink = evaluation.settings, io.BytesIO()
    output, columns = settings.output, score_columns(settings)
    baseline, patient = settings.baseline or rows[0]["system"], columns.get(settings.patient or "")
    pq.write_table(pa.Table.from_pylist(rows, schema=with_format(scores_schema(settings))), sink, compression="zstd")
    storage.write_bytes(storage.join(output, SCORES_NAME), sink.getvalue())
    table_rows = compare(rows, baseline, settings.resamples, settings.seed, patient)
    groups = compare_groups(rows, baseline, settings, columns)
    if groups:
        storage.write_bytes(storage.join(output, GROUPS_NAME), format_groups_csv(groups).encode())
    _tell_patients(rows, settings)
    storage.write_bytes(storage.join(output, CSV_NAME), format_csv(table_rows).encode())
    tolerances = (settings.nsd_tolerance_px, settings.nsd_tolerance_mm)
    known = [(system.name, system.num_known, len(system.targets)) for system in evaluation.systems if system.num_known]
    of_groups, num_rejected = format_groups(groups, settings), evaluation.num_rejected
    markdown = format_markdown(table_rows, baseline, telling, tolerances, known, of_groups, num_rejected)
    storage.write_bytes(storage.join(output, MARKDOWN_NAME), markdown.encode())
    statuses = Counter(row["status"] for row in rows)
    summary = {
        "rows": len(rows),
        **{status: statuses[status] for status in ("ok", "failed")},
        **({} if settings.marks is None else {"rejected": num_rejected}),
        "gives_answer_away": [" ".join(key) for key in telling],
        "dice": [
            {"dataset": row.dataset, "prompt": row.prompt_name, "system": row.system, "mean": row.dice_mean}
            for row in table_rows
            if row.prompt_class == HONEST
        ],
        "seconds": round(seconds, 1),
    }
    storage.write_bytes(storage.join(output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
    return summary
