"""Scores of one part file of a segment run: its masks compared with the labels of the images."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from vlsm import storage
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.records import OWN, RECORD, Record
from vlsm.errors import ImageError, ResultError
from vlsm.evaluation.groups import OWN_GROUP, group_value
from vlsm.evaluation.lesions import score_lesions
from vlsm.evaluation.prompts import ROBUSTNESS, classify
from vlsm.evaluation.scoring import encoded_dice, score_mask
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.evaluation.systems import System, Target
from vlsm.runs.carried import CARRIED, carried_names
from vlsm.runs.plan import plan_of
from vlsm.runs.record import read_record
from vlsm.runs.results import decode_ok_row, part_name, read_part
from vlsm.segmentation.masks import encode_mask
from vlsm.segmentation.presence import judge_presence
from vlsm.shown import hide_secrets, public_uri

_SCORE_COLUMNS = ("dice", "iou", "precision", "recall", "hd95_px", "asd_px", "nsd", "nsd_mm")
_LESION_COUNTS = ("num_lesions", "num_components", "num_matched", "num_found", "num_right")

# One row per record, prompt and system.
SCORES_SCHEMA = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string()),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("record", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("selector", pa.string()),
        pa.field("mask_uri", pa.string(), nullable=False),
        pa.field("prompt_name", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_class", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        *(pa.field(name, pa.float64()) for name in _SCORE_COLUMNS),
        *(pa.field(name, pa.int32()) for name in _LESION_COUNTS),
        pa.field("matched_iou", pa.float64()),
        pa.field("lesion_dice", pa.float64()),
        pa.field("max_probability", pa.float64()),
        pa.field("presence_threshold", pa.float64()),
        pa.field("is_present", pa.bool_()),
        pa.field("reference_dice", pa.float64()),
        pa.field("area_fraction", pa.float64()),
        pa.field("target_fraction", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("review", pa.string()),
        pa.field("mask_rle", pa.string()),
        pa.field("target_rle", pa.string()),
    ]
)
_RUN_COLUMNS = ("height", "width", "area_fraction", "confidence", "agreement", "review", "mask_rle", "max_probability")


def score_columns(settings: EvaluateSettings) -> dict[str, str]:
    """Return the column of the scores for each column of a list that `groups` or `patient` names."""
    return {
        name: name if name == OWN_GROUP or name not in SCORES_SCHEMA.names else f"list_{name}"
        for name in settings.columns_of_groups
    }


def scores_schema(settings: EvaluateSettings) -> pa.Schema:
    """Return the columns of the scores: SCORES_SCHEMA, and those of groups."""
    schema = SCORES_SCHEMA
    for column in score_columns(settings).values():
        schema = schema if column == OWN_GROUP else schema.append(pa.field(column, pa.string()))
    return schema


@dataclass(frozen=True)
class PredictionSource:
    """A finished segment run and the records of its images.

    Attributes:
        system: name of the system that made the masks.
        output: OUTPUT of the segment run.
        run_id: id of the segment run.
        num_parts: number of part files of the segment run.
        targets: records to score, by image_id.
        settings: settings of the evaluation.
        presence_threshold: as in `System`.
    """

    system: str
    output: str
    run_id: str
    num_parts: int
    targets: dict[str, list[Target]]
    settings: EvaluateSettings
    presence_threshold: float | None = None

    def score_part(self, shard: int) -> pa.Table:
        """Return the scores of one part file, with the columns of `scores_schema`.

        Raises:
            ResultError: the part file is missing, is damaged, or belongs to another run.
        """
        part = read_part(self.output, shard, self.run_id, patience_s=self.settings.run.outage_patience_s)
        if part is None:
            raise ResultError(
                f"{part_name(shard)} in {self.output!r} is missing, is damaged, or belongs to another run; "
                "run that segment job again"
            )
        reader = ExampleReader(self.settings.data, self.settings.run)
        images: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        of_list = carried_names(part.schema)
        for row in part.to_pylist():
            row[CARRIED] = {name: row.pop(name) for name in of_list}
            if row["kind"] == "mask" and row["image_id"] in self.targets:
                images[row["image_id"]][row["prompt"]] = row
        rows = (
            row
            for image_id, rows_by_prompt in images.items()
            for target in self.targets[image_id]
            for row in _score_target(target, rows_by_prompt, self, reader)
        )
        return pa.Table.from_pylist(list(rows), schema=scores_schema(self.settings))


def open_source(system: System, settings: EvaluateSettings) -> PredictionSource:
    """Return the finished segment run of a system.

    Raises:
        ResultError: the segment run no longer exists.
    """
    record = read_record(system.output)
    if record is None:
        raise ResultError(f"the segment run in {system.output!r} no longer exists; run it again")
    targets: dict[str, list[Target]] = defaultdict(list)
    for target in system.targets:
        if target.image_id is not None:
            targets[target.image_id].append(target)
    num_parts = plan_of(record, system.output).num_shards
    if num_parts > (num_found := len(storage.list_names(storage.join(system.output, "masks")))):
        raise ResultError(
            f"{system.output!r} has {num_found:,} part files; its plan has {num_parts:,}; run that segment job again"
        )
    run_id, threshold = record["run_id"], system.presence_threshold
    return PredictionSource(system.name, system.output, run_id, num_parts, dict(targets), settings, threshold)


def missing_rows(system: System, settings: EvaluateSettings) -> pa.Table:
    """Return failed rows for the records whose image is not in the system's segment run."""
    rows = [
        _describe(system.name, target, name, settings) | _failed(f"missing: {system.output} has no such image")
        for target in system.targets
        if target.image_id is None
        for name in target.texts
    ]
    return pa.Table.from_pylist(rows, schema=scores_schema(settings))


def _describe(
    system: str, target: Target, name: str, settings: EvaluateSettings, of_run: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the columns that do not depend on the mask; `of_run`: columns of the list of the segment run."""
    record, columns = target.record, score_columns(settings)
    groups = {columns[key]: group_value(record, of_run, key) for key in columns if columns[key] != OWN_GROUP}
    return groups | {
        "system": system,
        "dataset": record.dataset,
        "split": record.split,
        "group": record.group or None,
        "record": record.where,
        "image_id": target.image_id,
        "image_uri": public_uri(record.image_uri),
        "selector": record.image_selector,
        "mask_uri": public_uri(record.mask_uri),
        "prompt_name": name,
        "prompt": target.texts[name],
        "prompt_class": classify(name, settings),
    }


def _failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "error": hide_secrets(error)}


def _score_target(
    target: Target, rows_by_prompt: dict[str, dict[str, Any]], source: PredictionSource, reader: ExampleReader
) -> Iterator[dict[str, Any]]:
    """Yield the scores of one record, one row per prompt.

    Args:
        target: the record.
        rows_by_prompt: the rows of the record's image in the segment run.
        source: the segment run.
        reader: reads the label.
    """
    settings = source.settings
    label = _read_label(target.record, rows_by_prompt, reader)
    label_columns: dict[str, Any] = {}
    if not isinstance(label, str):
        label_columns = {"target_fraction": float(label.mean()), "target_rle": encode_mask(label)}
    spacing = None if settings.nsd_tolerance_mm is None else _read_spacing(target.record, reader)
    reference = _find_row(rows_by_prompt, target, settings.prompts[0])
    scores_by_mask: dict[str | None, dict[str, Any]] = {}  # many prompts give the same mask
    of_run: Mapping[str, Any] = next((row[CARRIED] for row in rows_by_prompt.values()), {})
    for name in target.texts:
        row = _find_row(rows_by_prompt, target, name)
        scored = _describe(source.system, target, name, settings, of_run) | label_columns
        if isinstance(row, str):
            yield scored | _failed(row)
            continue
        scored |= {"checkpoint": row["model"], "prompt": row["prompt"]} | {key: row[key] for key in _RUN_COLUMNS}
        threshold = source.presence_threshold
        scored |= {"presence_threshold": threshold, "is_present": judge_presence(row, threshold)}
        if row["mask_rle"] not in scores_by_mask:
            scores_by_mask[row["mask_rle"]] = _score_row(row, label, target.record.mask_uri, settings, spacing)
        scored |= scores_by_mask[row["mask_rle"]]
        if scored["prompt_class"] == ROBUSTNESS and scored["status"] == "ok" and not isinstance(reference, str):
            with contextlib.suppress(ValueError, TypeError):  # the mask of the reference is damaged or absent
                size = (row["height"], row["width"])
                scored["reference_dice"] = encoded_dice(row["mask_rle"], reference["mask_rle"], size)
        yield scored


def _read_label(record: Record, rows_by_prompt: dict[str, dict[str, Any]], reader: ExampleReader) -> np.ndarray | str:
    """Return the target mask, (H, W) uint8 of 0 and 1, or the error message if it cannot be read."""
    sizes = {(row["height"], row["width"]) for row in rows_by_prompt.values() if row["status"] == "ok"}
    try:
        mask = reader.read_mask(record).mask
        # only the image itself can tell whether the label must be turned
        return reader.read(record).target.mask if sizes and mask.shape not in sizes else mask
    except ImageError as error:
        return str(error)


def _read_spacing(record: Record, reader: ExampleReader) -> tuple[float, float] | None:
    """Return the distances of rows and columns in mm, or None if they are unknown."""
    with contextlib.suppress(ImageError):  # an image that cannot be read is a failed row already
        return reader.read_spacing(record)
    return None


def _score_row(
    row: dict[str, Any],
    label: np.ndarray | str,
    mask_uri: str,
    settings: EvaluateSettings,
    spacing: tuple[float, float] | None,
) -> dict[str, Any]:
    """Return status, error and scores of one row of the segment run; a failed row has no scores."""
    if row["status"] != "ok":
        return _failed(row["error"] or row["status"])
    if isinstance(label, str):
        return _failed(label)
    size = (row["height"], row["width"])
    if label.shape != size:
        (height, width), (label_height, label_width) = size, label.shape
        return _failed(f"size: {mask_uri} is {label_width} x {label_height}, its image {width} x {height}")
    try:
        mask = decode_ok_row(row)
        scores = score_mask(mask, label, settings.nsd_tolerance_px, settings.nsd_tolerance_mm, spacing)
        return {"status": "ok", "error": None} | asdict(scores) | asdict(score_lesions(mask, label))
    except ImageError as error:
        return _failed(str(error))


def _find_row(rows_by_prompt: dict[str, dict[str, Any]], target: Target, name: str) -> dict[str, Any] | str:
    """Return an image's row for the prompt with this name, or the error message if there is none."""
    text = target.texts[name]
    is_stored = name == OWN or (name == RECORD and target.record.prompt is None)
    # The manifest of the segment run can give an image another prompt than the run's settings do.
    if is_stored and len(rows_by_prompt) == 1:
        return next(iter(rows_by_prompt.values()))
    return rows_by_prompt.get(text, f"missing: the segment run has no prompt {text!r}")
