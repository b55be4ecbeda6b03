"""The report of a training run, finished or not."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlsm import storage
from vlsm.archive.places import lies_outside
from vlsm.checkpoints import SETTINGS_NAME, Calibration
from vlsm.commands import call
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import good_records
from vlsm.datasets.records import Record, locations_of
from vlsm.datasets.settings import DatasetSettings
from vlsm.documents import read_yaml
from vlsm.errors import ConfigError, ImageError
from vlsm.images.reader import Reader
from vlsm.report import parts
from vlsm.report.charts import draw_lines
from vlsm.report.page import Page, Section, Stat, Table, as_table, provenance
from vlsm.report.pictures import Painter, shorten
from vlsm.report.survey import Survey, file_names, scan
from vlsm.report.twins import compare_splits
from vlsm.report.validation import predict_examples
from vlsm.runs.locations import Locations
from vlsm.runs.reading import SHORT_WAIT
from vlsm.runs.record import read_summary, settings_of
from vlsm.runs.tables import Tables
from vlsm.training.examples import EXAMPLES_NAME, read_examples_table
from vlsm.training.history import MEAN, History, read_history
from vlsm.training.state import CHECKPOINT_NAME
from vlsm.words import count

_READ = DatasetSettings.model_fields  # settings that decide what the masks are
_TEXTS = "image_id dataset split where image_uri mask_uri image_selector error".split()
_SCANNED = pa.schema(
    [pa.field(name, pa.string()) for name in _TEXTS]
    + [pa.field(name, pa.int64()) for name in ("height", "width")]
    + [pa.field("area_fraction", pa.float64())]
)


def training_page(output: str, title: str, allow: tuple[str, ...] = ()) -> Page:
    """Return the report page of a training run.

    Raises:
        ConfigError: there is no run at OUTPUT.
    """
    record, summary = parts.read_config(output), read_summary(output)
    config, history = record["config"], read_history(output)
    uri = storage.join(output, EXAMPLES_NAME)
    survey = Survey(metric="area_fraction", group="dataset")
    for table in scan(Tables([uri], _SCANNED), pc.field("error").is_null(), _compute):
        survey.add(table)
    examples = read_examples_table(uri)
    records = {record.where: record for record in good_records(examples) if not _lies_outside(record, output, allow)}
    data = settings_of({name: config["data"][name] for name in _READ if name in config["data"]}, DatasetSettings)
    masks = ExampleReader(data, SHORT_WAIT)
    reader = Reader(data.reading(SHORT_WAIT), Locations(output, allow))

    def read_target(row: dict[str, Any]) -> tuple[None, np.ndarray]:
        if row["where"] not in records:
            raise ImageError("forbidden", "its files lie outside of the bucket of OUTPUT; --allow FOLDER lets it")
        return None, masks.read(records[row["where"]]).target.mask

    painter = Painter(reader, read_target)
    _, cards = parts.show([], survey.sample, painter, (), None)
    checkpoint = storage.join(output, CHECKPOINT_NAME)
    known = parts.read_calibrations({CHECKPOINT_NAME: checkpoint}, output)
    checkpoint_facts = _checkpoint_facts(output)
    metrics = history.table()
    best = history.best_epoch(config["optim"]["monitor"])
    banner = (
        f"This run is not complete: {len(history.monitored('dice')):,} of {count(config['optim']['epochs'], 'epoch')}."
    )
    return Page(
        kind="Training run",
        title=title,
        banner="" if summary else banner,
        stats=_stats(config, history, best, survey),
        sections=[
            *([_curves(metrics, best)] if len(metrics) else []),
            *_scores(history, best),
            predict_examples(checkpoint, list(records.values()), masks, config["data"].get("prompt"), bool(best)),
            *parts.calibrations(known),
            Section("data", "Data", tables=[_counts(record)]),
            *compare_splits(examples, reader),
            *parts.distributions(survey, "examples"),
        ],
        cards=cards,
        gallery_note=parts.gallery_note(len(cards), survey.num_rows, "datasets, splits and areas"),
        outlines=["target"],
        record=record,
        facts=[*provenance(record), *checkpoint_facts],
        about=[
            ("Model", shorten(_model(config), 60), ""),
            *((label, shorten(text, 60), "") for label, text in checkpoint_facts),
            ("Datasets", parts.name_some(survey.values["dataset"]), ""),
            ("Date", parts.format_date(record), ""),
            *([("Calibration", *_calibration(known))] if known else []),
        ],
    )


def _lies_outside(record: Record, output: str, allow: tuple[str, ...]) -> bool:
    """Return whether an OUTPUT in a store may not name the files of a record; other people may have written it."""
    return any(lies_outside(place, output, allow) for place in locations_of(record) if place)


def _model(config: dict[str, Any]) -> str:
    return str(config.get("model") or "a checkpoint's")


def _calibration(known: dict[str, Calibration | None]) -> tuple[str, str]:
    words, is_calibrated = parts.describe_calibrations(1, known)
    return (words, "") if is_calibrated else (f"{words} yet: {call('vlsm.calibration')} does it", "warn")


def _compute(table: pa.Table) -> pa.Table:
    """Return a table of examples with the columns of a survey that it lacks."""
    return (
        table.set_column(0, "image_id", file_names(table["image_uri"]))
        .append_column("status", pa.repeat("ok", len(table)))
        .rename_columns({"image_selector": "selector"})
    )


def _stats(config: dict[str, Any], history: History, best: int, survey: Survey) -> list[Stat]:
    stats = []
    for split, label in (("val", "Validation Dice"), ("test", "Test Dice")):
        rows = [row for row in history.rows if (row.split, row.dataset) == (split, MEAN)]
        rows = [row for row in rows if row.epoch == best] or (rows if split == "test" else [])
        if rows:
            stats.append(Stat(label, f"{rows[-1].dice:.3f}", "mean over datasets, best epoch", "lead"))
    epochs = max((row.epoch for row in history.rows), default=0)
    stats += [
        Stat("Model", _model(config), f"trainable: {config.get('trainable', 'all')}"),
        Stat("Best epoch", f"{best}" if best else "–", f"of {epochs} done, {config['optim']['epochs']} planned"),
        Stat("Examples", f"{survey.num_rows:,}", "in all splits"),
    ]
    return stats


def _curves(metrics: pa.Table, best: int) -> Section:
    lines = [
        draw_lines(metrics, "loss", "Loss", best),
        draw_lines(metrics, "dice", "Dice at the model's size", best),
    ]
    return Section("curves", "Curves", lines=lines)


def _scores(history: History, best: int) -> list[Section]:
    """Return a section with loss and Dice of the best epoch, and of the test, or no section before the first epoch."""
    rows = [row for row in history.rows if row.split == "test" or row.epoch == best]
    named = [
        {"split": row.split, "dataset": row.dataset, "examples": row.num_examples, "Dice": row.dice, "loss": row.loss}
        for row in rows
    ]
    note = "The values of train are measured during the epoch, on augmented images, while the weights change."
    return [Section("scores", "The best epoch", tables=[as_table(named, note)])] if named else []


def _counts(record: dict[str, Any]) -> Table:
    counts = {tuple(name.split(" ", 1)): count for name, count in record["plan"]["records"].items()}
    splits = [split for split in ("train", "val", "test") if any(key[0] == split for key in counts)]
    external = record["config"].get("external") or {}
    rows = [
        {"dataset": name, "used for training": "no" if name in external else "yes"}
        | {split: counts.get((split, name), 0) for split in splits}
        for name in dict.fromkeys(name for _, name in counts)
    ]
    return as_table(rows)


def _checkpoint_facts(output: str) -> list[tuple[str, str]]:
    """Return prompt and threshold from checkpoint.yaml of the run's checkpoint."""
    uri = storage.join(output, CHECKPOINT_NAME, SETTINGS_NAME)
    if not storage.exists(uri):
        return []
    settings = read_yaml(uri, uri, ConfigError)
    return [(f"Checkpoint's {name}", str(settings[name])) for name in ("prompt", "threshold") if name in settings]
