"""The lists of a sweep: the splits or folds that all of its models see, made once and stored in OUTPUT.

OUTPUT/splits/NAME.parquet             with train.data.split: the records of a dataset, with their splits
OUTPUT/folds/fold-1-of-5/NAME.parquet  with folds: the same, for each fold
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pyarrow.parquet as pq

from vlsm import storage
from vlsm.datasets.changes import Inspect
from vlsm.datasets.inspection import Facts, examples_table
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import Record
from vlsm.datasets.splits import make_folds, make_splits
from vlsm.errors import ConfigError, ManifestError
from vlsm.evaluation.sweep import SweepSettings, folds_of, list_uri
from vlsm.training.settings import DataSettings


def read_sources(settings: SweepSettings, data: DataSettings) -> dict[str, list[Record]]:
    """Return the records of each dataset; of external ones the test records, which are all if there are no splits."""
    sources = {name: read_dataset(name, uri, data) for name, uri in settings.datasets.items()}
    for name, uri in settings.external.items():
        records = read_dataset(name, uri, data)
        sources[name] = [replace(record, split="test") for record in records if record.split in ("test", "")]
    return sources


def write_lists(settings: SweepSettings, data: DataSettings, inspect: Inspect) -> list[str]:
    """Make the splits or folds of a sweep, write its lists, and return lines for the log.

    All datasets are divided together, so that images that look alike do not cross, in pooled sweeps neither.

    Args:
        settings: settings of the sweep.
        data: how the first model reads its data; data.split says which splits to make.
        inspect: returns the facts of records.

    Raises:
        ConfigError: as for `make_splits` and `make_folds`; or a dataset has no records to score.
        ManifestError: files of records are broken, and data.skip_broken is false.
    """
    sources = read_sources(settings, data)
    records = [record for source in sources.values() for record in source]
    facts = inspect(records)
    if not data.skip_broken and (broken := [fact.error for fact in facts if fact.error]):
        raise ManifestError(
            f"{len(broken):,} of {len(records):,} records are broken, such as {broken[0]}; repair them, "
            "or --set train.data.skip_broken=true to leave them out"
        )
    if settings.folds is None:
        made, lines = make_splits(records, facts, data.split)
        folds = [made]
    else:
        folds, lines = make_folds(records, facts, data.split, settings.folds)
    ends = list(itertools.accumulate(map(len, sources.values())))
    rows = {name: slice(end - len(sources[name]), end) for name, end in zip(sources, ends, strict=True)}
    scored = settings.evaluate.get("split", "test")
    for name, fold in itertools.product(sources, folds):
        if scored != "all" and not any(record.split == scored for record in fold[rows[name]]):
            raise ConfigError(
                f"dataset {name} has no {scored} records to score; --set train.data.split.test=0.1 takes some from "
                "records without a split, and --set evaluate.split=val scores the val records"
            )
    for number, fold in zip(folds_of(settings), folds, strict=True):
        for name, chosen in rows.items():
            _write_list(list_uri(settings, name, number), fold[chosen], facts[chosen])
    return lines


def _write_list(uri: str, records: Sequence[Record], facts: Sequence[Facts]) -> None:
    sink = io.BytesIO()
    pq.write_table(examples_table(records, facts), sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue())
