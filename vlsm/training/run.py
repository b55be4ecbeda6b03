"""The folder of a training run: its files before, during and after the training. No cluster is needed here.

OUTPUT/config.yaml        resolved settings, digest of the data, versions, git revision, planned records and steps
OUTPUT/examples.parquet   every record with its split and the facts of its files; a list for --dataset, too
OUTPUT/known.parquet      images that start_from, or the members of a stack, learned from; absent if none are known
OUTPUT/last.safetensors   state of the run: trained weights, optimiser, all metrics; one file, so that it is consistent
OUTPUT/checkpoint/        checkpoint of the best epoch, for `jobs.segment`
OUTPUT/metrics.parquet    one row per epoch, split and dataset; curves.png and tensorboard/ show the same values
OUTPUT/summary.json       written last: if it exists, the run is complete
OUTPUT/lease/             while a job works on the run: who it is and how far it is (see vlsm.runs.lease)
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.checkpoints import build_model, check_members, load_checkpoint, read_settings
from vlsm.datasets.changes import Inspect, add_versions, list_versions, renew_signatures
from vlsm.datasets.inspection import check_facts, describe_findings, digest_examples, examples_table, good_records
from vlsm.datasets.mask_checks import describe_foreground
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.splits import MAKE, divide_val, make_splits, release_train, release_val
from vlsm.errors import ConfigError, VlsmError
from vlsm.images.preprocess import Square
from vlsm.models import parse_options
from vlsm.models.options import STACK
from vlsm.models.tower_files import MEMBER_FOLDERS, TOWER_FOLDERS
from vlsm.runs.lease import Lease
from vlsm.runs.record import SUMMARY_NAME, forget_run, make_record, read_record, write_record
from vlsm.training.checks import check_training, require_train_and_val
from vlsm.training.examples import EXAMPLES_NAME, read_examples_table
from vlsm.training.history import METRICS_NAME
from vlsm.training.missing import require_complete
from vlsm.training.origin import KNOWN_NAME, read_sources, warn_of_known, write_known
from vlsm.training.resume import digest_start, refuse_other_data, refuse_other_settings
from vlsm.training.sampling import ExampleOrder, choose_prompt
from vlsm.training.settings import TrainSettings
from vlsm.training.state import CHECKPOINT_NAME, CURVES_NAME, LAST_NAME
from vlsm.training.trackers import check_trackers

if TYPE_CHECKING:
    from vlsm.models.contract import SegmentationModel

logger = logging.getLogger("vlsm")

_NAMES = (LAST_NAME, EXAMPLES_NAME, KNOWN_NAME, METRICS_NAME, CURVES_NAME)
_FOLDERS = (CHECKPOINT_NAME, *(f"{CHECKPOINT_NAME}/{folder}" for folder in TOWER_FOLDERS), "tensorboard")
_STACK_FOLDERS = tuple(f"{CHECKPOINT_NAME}/{member}/{folder}" for member in MEMBER_FOLDERS for folder in TOWER_FOLDERS)


def read_all_records(settings: TrainSettings) -> list[Record]:
    """Return the records of all datasets. The test records of the external datasets come last.

    All records of an external dataset without splits are test records.

    Raises:
        ConfigError: a dataset does not exist, or its records lack splits or prompts.
        ManifestError: a record is invalid, or lacks the prompt that data.prompt asks for.
    """
    records: list[Record] = []
    data = settings.data.allowing(settings.run.allow)
    for name, uri in settings.datasets.items():
        with storage.name_errors(f"dataset {name}", uri):
            records += read_dataset(name, uri, data)
    records = release_train(records, settings.data.split)
    learns_val = settings.data.learn_from == "val"
    if learns_val:
        records = release_val(records)
    for name, uri in settings.external.items():
        with storage.name_errors(f"dataset {name}", uri):
            external = read_dataset(name, uri, data)
        records += [replace(record, split="test") for record in external if record.split in ("test", "")]
    data.refuse_unknown([*settings.datasets, *settings.external, *(record.dataset for record in records)])

    def require_two() -> None:
        if all(record.split for record in records):
            require_train_and_val(records, settings)

    advice = MAKE if settings.data.split.is_off and not learns_val else None
    require_complete(records, lambda record: choose_prompt(record, settings.data, None), advice, require_two)
    return records


def check_examples(
    settings: TrainSettings, inspect: Inspect, num_shown: int | None = 20, begin: Callable[[], None] = lambda: None
) -> tuple[pa.Table, list[str], list[VlsmError]]:
    """Read all examples, make splits where data.split asks for them, and check all.

    Args:
        settings: settings of the run.
        inspect: returns the facts of records.
        num_shown: findings of each kind that the lines list; None for all.
        begin: called as soon as all paths are checked, as in `prepare_training`.

    Returns:
        The table of all examples, lines that describe the splits and the findings, and the errors that forbid this
        training.
    """
    records = read_all_records(settings)
    begin()
    model = build_learning_model(settings)  # before all files are read, since its weights may be missing
    versions = list_versions(records)  # before the files are read: a file that changes now is read again later
    facts = inspect(records)
    lines: list[str] = []
    if settings.data.skip_broken or not any(fact.error for fact in facts):  # else the run ends, and says why
        divide = divide_val if settings.data.learn_from == "val" else make_splits
        records, lines = divide(records, facts, settings.data.split)
    findings = check_facts(records, facts)
    warnings, errors = check_training(settings, records, facts, model)
    lines += describe_findings(records, findings, num_shown)
    lines += describe_foreground(records, facts, settings.data.mask_threshold)
    table = add_versions(examples_table(records, facts), versions)
    return table, lines + warnings + warn_of_known(settings, table), errors


def prepare_training(
    settings: TrainSettings, inspect: Inspect, begin: Callable[[], None] = lambda: None, lease: Lease | None = None
) -> list[Record]:
    """Plan a run, or resume it if OUTPUT already holds its plan. All errors of settings and data are raised here.

    Args:
        settings: settings of the run.
        inspect: returns the facts of records.
        begin: called if there is work to do, as soon as all paths and settings are checked. The model is built after
            that, so that something slow, such as a cluster, can start at the same time.
        lease: the lease of OUTPUT. It is taken before anything is written, unless the run is finished.

    Returns:
        The examples of the run. A run that is resumed has the stored ones, with their splits.

    Raises:
        LeaseError: another job works on OUTPUT.
        ConfigError: a setting or a path is wrong, or OUTPUT belongs to a run with other settings or other data.
        CheckpointError: the model's options are invalid, or its weights or the checkpoint start_from cannot be loaded.
        ManifestError: a record is invalid or its files are broken.
        VlsmError: the data cannot teach; see `check_training`.
    """
    check_model(settings)
    output = settings.output
    with storage.name_errors("OUTPUT", output):
        record = None if settings.start_over else read_record(output)
        if record is not None:
            return _resume(settings, record, inspect, begin, lease)
        if lease is not None:
            lease.wait_until_free()  # inspecting the data may take minutes: a second job is refused before it
        table, lines, errors = check_examples(settings, inspect, begin=begin)
        for line in lines:
            logger.info("%s", line)
        if errors:
            raise errors[0]
        _take(lease, settings)
        if settings.start_over:
            forget_run(output, _NAMES, [(folder, "") for folder in (*_FOLDERS, *_STACK_FOLDERS)])
        elif read_record(output) is not None:  # another job has planned this run during the inspection, and has ended
            return prepare_training(settings, inspect, begin, lease)
        records = good_records(table)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        storage.write_bytes(storage.join(output, EXAMPLES_NAME), sink.getvalue().to_pybytes())
        write_known(output, read_sources(settings))
        facts = {"data_digest": digest_examples(table.filter(pc.is_null(table["error"])))} | digest_start(settings)
        write_record(output, make_record(settings, facts, _plan(settings, records)))
    return records


def check_finished(settings: TrainSettings) -> None:
    """Raise a ConfigError if the finished run in OUTPUT has other settings or other data; read no images."""
    refuse_other_settings(read_record(settings.output) or {"config": {}}, settings)
    refuse_other_data(settings, _read_table(settings.output), partial(read_all_records, settings), None)


def _resume(
    settings: TrainSettings, record: dict[str, Any], inspect: Inspect, begin: Callable[[], None], lease: Lease | None
) -> list[Record]:
    """Return the examples of a run that has its plan, finished or not."""
    output = settings.output
    refuse_other_settings(record, settings)
    is_finished = storage.exists(storage.join(output, SUMMARY_NAME))
    if not is_finished:
        _take(lease, settings)
        begin()
    examples = _read_table(output)
    current = refuse_other_data(
        settings, examples, partial(read_all_records, settings), None if is_finished else inspect
    )
    return renew_signatures(good_records(examples), current)


def _take(lease: Lease | None, settings: TrainSettings) -> None:
    """Take the lease, and remove the temporary files that killed processes left in the folders of the run."""
    if lease is not None:
        lease.take()
        for folder in (*_FOLDERS, *(_STACK_FOLDERS if settings.model == STACK else ())):
            storage.remove_leftovers(storage.join(settings.output, folder))


def check_model(settings: TrainSettings, planned: Collection[str] = ()) -> None:
    """Check the settings of the model and of the trackers without building the model.

    Args:
        settings: settings of the run.
        planned: checkpoints that do not exist yet: other trainings will write them before this one begins.

    Raises:
        ConfigError: a tracker's package is missing, or options are given together with start_from.
        CheckpointError: the model does not have such options, or there is no checkpoint at start_from, or none that can
            be the member of a stack.
    """
    check_trackers(settings)
    if settings.start_from is not None:
        with storage.name_errors("start_from", settings.start_from):
            read_settings(settings.start_from)
        if settings.options:
            raise ConfigError(
                "options are set, and start_from too; a checkpoint already has its options, so leave them out"
            )
        return
    options = parse_options(str(settings.model), settings.options)
    if settings.model == STACK:
        members = []
        for uri in options.members:
            with storage.name_errors("options.members", uri):
                members += [] if uri in planned else [read_settings(uri)]
        check_members(options, members)


def input_square(settings: TrainSettings) -> Square:
    """The input of the model that learns."""
    if settings.start_from is not None:
        return read_settings(settings.start_from).image.spec.square
    options = parse_options(str(settings.model), settings.options)
    if options.image_size is None or settings.model == STACK:  # the tower or the members decide
        return build_learning_model(settings).image_spec.square
    return Square(options.image_size, options.resize)


def build_learning_model(settings: TrainSettings) -> "SegmentationModel":
    """Return the model to train, in training mode on the CPU, with equal weights in every process.

    Raises:
        CheckpointError: pretrained weights cannot be loaded.
    """
    import torch

    torch.manual_seed(settings.seed)
    if settings.start_from is None:
        model = build_model(str(settings.model), **settings.options)
    else:
        model = load_checkpoint(settings.start_from).model
    return model.set_trainable(settings.trainable, settings.lora_rank, settings.adapt, settings.adapter_width).train()


def _plan(settings: TrainSettings, records: list[Record]) -> dict[str, Any]:
    counts = Counter((record.split, record.dataset) for record in records)
    return {
        "records": {f"{split} {dataset}": count for (split, dataset), count in sorted(counts.items())},
        "steps_per_epoch": ExampleOrder(records, settings).num_steps,
        "epochs": settings.optim.epochs,
    }


def read_examples(output: str) -> list[Record]:
    """Return the examples of a planned run."""
    return good_records(_read_table(output))


def read_negatives(output: str) -> list[bool]:
    """Return for each record of `read_examples` whether its mask is empty."""
    table = _read_table(output)
    areas: list[float | None] = table.filter(pc.is_null(table["error"]))["area_fraction"].to_pylist()
    return [area == 0 for area in areas]


def _read_table(output: str) -> pa.Table:
    return read_examples_table(storage.join(output, EXAMPLES_NAME))


def default_prompt(records: Sequence[Record], settings: TrainSettings) -> str:
    """Return the default prompt of the checkpoint: the most frequent prompt of the train records."""
    texts = Counter(choose_prompt(record, settings.data, None) for record in records if record.split == "train")
    return texts.most_common(1)[0][0]
