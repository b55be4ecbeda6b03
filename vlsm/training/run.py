"""A training run's folder: what stands in it before, during and after the work, without a cluster.

OUTPUT/config.yaml        resolved settings, digest of the data, versions, git revision, what is planned
OUTPUT/examples.parquet   every record with what is known of its files
OUTPUT/last.safetensors   where the run is: learned weights, the optimiser, all metrics; one file, so that it is whole
OUTPUT/checkpoint/        the best epoch's, for `jobs.segment`
OUTPUT/metrics.parquet    a row per epoch, split and dataset; curves.png and tensorboard/ show the same
OUTPUT/summary.json       written last: its presence means complete
"""

import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, load_checkpoint, read_settings, save_checkpoint
from vlsm.errors import ConfigError, ManifestError
from vlsm.models import build_model, parse_options
from vlsm.runs.record import SUMMARY_NAME, describe_differences, forget_run, make_record, read_record, write_record
from vlsm.training.datasets import Record, read_dataset
from vlsm.training.history import History, Row
from vlsm.training.inspection import (
    Facts,
    check_facts,
    describe_findings,
    digest_examples,
    examples_table,
    records_from_table,
)
from vlsm.training.sampling import ExampleOrder, choose_prompt
from vlsm.training.settings import TrainSettings
from vlsm.training.trackers import check_trackers

if TYPE_CHECKING:
    from torch import Tensor

    from vlsm.models.contract import SegmentationModel

logger = logging.getLogger("vlsm")

CHECKPOINT_NAME = "checkpoint"
_EXAMPLES_NAME, _LAST_NAME, _METRICS_NAME = "examples.parquet", "last.safetensors", "metrics.parquet"
_NAMES = (_LAST_NAME, _EXAMPLES_NAME, _METRICS_NAME, "curves.png")

Inspect = Callable[[Sequence[Record]], list[Facts]]


@dataclass
class State:
    """Where a run is.

    Attributes:
        epoch: that is under way, from 0.
        step: the next one of it.
        steps: optimiser steps of the run so far.
        scores: example, loss and Dice of the epoch's steps until then.
        history: of the epochs before.
        weights, optimizer: what a Learner's `state` gives.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    history: History = field(default_factory=History)
    weights: "dict[str, Tensor] | None" = None
    optimizer: dict[str, Any] | None = None


def read_all_records(settings: TrainSettings) -> list[Record]:
    """The records of all datasets, the external ones' test splits last.

    Raises:
        ConfigError: a dataset is not there, or nothing is there to train on or to judge by.
        ManifestError: a record is wrong, or lacks the prompt that is asked for.
    """
    records: list[Record] = []
    for name, uri in settings.datasets.items():
        with storage.name_errors(f"dataset {name}", uri):
            records += read_dataset(name, uri)
    for name, uri in settings.external.items():
        with storage.name_errors(f"dataset {name}", uri):
            records += [record for record in read_dataset(name, uri) if record.split == "test"]
    for split, what in (("train", "train on"), ("val", "tell a good epoch by")):
        if not any(record.split == split for record in records):
            found = ", ".join(f"{count} {name}" for name, count in Counter(record.split for record in records).items())
            names = ", ".join(settings.datasets)
            raise ConfigError(f"no {split} records in {names} (there are {found or 'none at all'}): nothing to {what}")
    for record in records:
        choose_prompt(record, settings.data, None)
    return records


def check_examples(
    settings: TrainSettings, inspect: Inspect, num_shown: int | None = 20, begin: Callable[[], None] = lambda: None
) -> tuple[pa.Table, list[str], int]:
    """All examples, looked through; lines that say what was found, so many of a kind; how many are broken.

    `begin` is called as soon as every path is known to be right, as by `prepare_training`.
    """
    records = read_all_records(settings)
    begin()
    build_learning_model(settings)  # before all files are read: its weights may be nowhere
    facts = inspect(records)
    findings = check_facts(records, facts)
    table = examples_table(records, facts)
    return table, describe_findings(records, findings, num_shown), sum(finding.is_broken for finding in findings)


def prepare_training(
    settings: TrainSettings, inspect: Inspect, begin: Callable[[], None] = lambda: None
) -> list[Record]:
    """Plan a run, or take it up again where OUTPUT already holds its plan; all that can be wrong is found here.

    Args:
        settings: of the run.
        inspect: looks through the files of records.
        begin: called where there is work to do, as soon as every path and setting is known to be right. The model is
            built after that, so that something slow, such as a cluster, starts meanwhile.

    Returns:
        The examples.

    Raises:
        ConfigError: a setting or a path is wrong, or OUTPUT belongs to a run with other settings.
        CheckpointError: the model's options or the checkpoint to start from are of no use.
        ManifestError: a record or its files are of no use.
    """
    check_model(settings)
    output = settings.output
    with storage.name_errors("OUTPUT", output):
        record = None if settings.start_over else read_record(output)
        if record is not None:
            if differences := describe_differences(record, settings, {}):
                raise ConfigError(
                    f"OUTPUT {output!r} belongs to a run with other settings: {'; '.join(differences)}; "
                    "choose another OUTPUT, or --set start_over=true to forget that run"
                )
            if not storage.exists(storage.join(output, SUMMARY_NAME)):
                begin()
            return read_examples(output)
        table, lines, num_broken = check_examples(settings, inspect, begin=begin)
        for line in lines:
            logger.info("%s", line)
        if num_broken and not settings.data.skip_broken:
            raise ManifestError(
                f"{num_broken:,} of {len(table):,} records are broken, as listed above; mend them, "
                "or --set data.skip_broken=true to do without"
            )
        if settings.start_over:
            folders = (CHECKPOINT_NAME, f"{CHECKPOINT_NAME}/clipseg", f"{CHECKPOINT_NAME}/openclip", "tensorboard")
            forget_run(output, _NAMES, [(folder, "") for folder in folders])
        table = table.filter(pc.is_null(table["error"]))
        records = records_from_table(table)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(storage.join(output, _EXAMPLES_NAME), sink.getvalue().to_pybytes())
        facts = {"data_digest": digest_examples(table)}
        write_record(output, make_record(settings, facts, _plan(settings, records)))
    return records


def check_model(settings: TrainSettings) -> None:
    """Nothing, or an error where the model or the trackers cannot be what is asked for, as far as is known at once."""
    check_trackers(settings)
    if settings.start_from is not None:
        with storage.name_errors("start_from", settings.start_from):
            read_settings(settings.start_from)
        if settings.options:
            raise ConfigError("options belong to a new model; start_from has a checkpoint's own")
    else:
        parse_options(str(settings.model), settings.options)


def image_size(settings: TrainSettings) -> int:
    """S of the model that is to learn, in pixels."""
    if settings.start_from is not None:
        return read_settings(settings.start_from).image.size
    size = parse_options(str(settings.model), settings.options).image_size
    return int(size) if size is not None else build_learning_model(settings).image_spec.size


def build_learning_model(settings: TrainSettings) -> "SegmentationModel":
    """The model that is to learn, in training mode on the CPU, equal in every process.

    Raises:
        CheckpointError: pretrained weights cannot be loaded.
    """
    import torch

    torch.manual_seed(settings.seed)
    if settings.start_from is None:
        model = build_model(str(settings.model), **settings.options)
    else:
        model = load_checkpoint(settings.start_from).model
    return model.set_trainable(settings.trainable, settings.lora_rank).train()


def _plan(settings: TrainSettings, records: list[Record]) -> dict[str, Any]:
    counts = Counter((record.split, record.dataset) for record in records)
    return {
        "records": {f"{split} {dataset}": count for (split, dataset), count in sorted(counts.items())},
        "steps_per_epoch": ExampleOrder(records, settings).num_steps,
        "epochs": settings.optim.epochs,
    }


def read_examples(output: str) -> list[Record]:
    """The examples of a planned run."""
    return records_from_table(pq.read_table(io.BytesIO(storage.read_bytes(storage.join(output, _EXAMPLES_NAME)))))


def default_prompt(records: Sequence[Record], settings: TrainSettings) -> str:
    """What a checkpoint is to segment where nobody says: the most frequent prompt of what it learned from."""
    texts = Counter(choose_prompt(record, settings.data, None) for record in records if record.split == "train")
    return texts.most_common(1)[0][0]


def pack_state(state: State) -> bytes:
    """What last.safetensors is to hold."""
    import safetensors.torch

    optimizer = dict(state.optimizer or {})
    tensors = {f"weights {name}": value.contiguous() for name, value in (state.weights or {}).items()}
    for name, values in optimizer.pop("state", {}).items():
        tensors |= {f"optimizer {name} {key}": value.contiguous() for key, value in values.items()}
    progress = {name: getattr(state, name) for name in ("epoch", "step", "steps", "scores")}
    progress |= {"history": [asdict(row) for row in state.history.rows], "optimizer": optimizer}
    return safetensors.torch.save(tensors, {"progress": json.dumps(progress)})


def read_state(output: str) -> State:
    """Where a run is, from last.safetensors; the beginning where there is none."""
    import safetensors.torch

    uri = storage.join(output, _LAST_NAME)
    if not storage.exists(uri):
        return State()
    data = storage.read_bytes(uri)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    progress = json.loads(header["__metadata__"]["progress"])
    state = State(**{name: progress[name] for name in ("epoch", "step", "steps")})
    state.scores = [(int(example), loss, dice) for example, loss, dice in progress["scores"]]
    state.history = History([Row(**row) for row in progress["history"]])
    state.weights, moments = {}, dict[str, dict[str, "Tensor"]]()
    for name, value in safetensors.torch.load(data).items():
        kind, _, rest = name.partition(" ")
        if kind == "weights":
            state.weights[rest] = value
        else:
            parameter, _, key = rest.rpartition(" ")
            moments.setdefault(parameter, {})[key] = value
    state.optimizer = progress["optimizer"] | {"state": moments}
    return state


def copy_best(
    model: "SegmentationModel", prompt: str, weights: "dict[str, Tensor] | None" = None
) -> "tempfile.TemporaryDirectory[str]":
    """The model as it is now, as a checkpoint in a folder of its own.

    Args:
        model: to copy.
        prompt: of the checkpoint.
        weights: all of the model's, where the model itself holds only shards of them.
    """
    folder = tempfile.TemporaryDirectory()
    save_checkpoint(model, folder.name, prompt, weights=weights)
    return folder


def put_progress(output: str, packed: bytes, best: "tempfile.TemporaryDirectory[str] | None") -> None:
    """Put a copy of the best model as OUTPUT/checkpoint, its checkpoint.yaml last, then last.safetensors.

    A run that dies in between does the epoch again and comes to the same.
    """
    if best is not None:
        with best as folder:
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == SETTINGS_NAME):
                target = storage.join(output, CHECKPOINT_NAME, *path.relative_to(folder).parts)
                storage.write_bytes(target, path.read_bytes())
    storage.write_bytes(storage.join(output, _LAST_NAME), packed)


def write_metrics(output: str, history: History) -> None:
    """Put metrics.parquet and the pictures of it."""
    from vlsm.training.curves import draw_curves
    from vlsm.training.trackers import tensorboard_events

    sink = pa.BufferOutputStream()
    pq.write_table(history.table(), sink, compression="zstd")
    storage.write_bytes(storage.join(output, _METRICS_NAME), sink.getvalue().to_pybytes())
    storage.write_bytes(storage.join(output, "curves.png"), draw_curves(history))
    storage.write_bytes(storage.join(output, "tensorboard", "events.out.tfevents.0.vlsm"), tensorboard_events(history))
