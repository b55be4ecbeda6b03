"""Whether a command may go on with the run in OUTPUT: with equal settings, an equal start_from, and equal data."""

import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from vlsm.checkpoints import digest_files, read_checkpoint
from vlsm.datasets.changes import Inspect, describe_changed_files, describe_changed_records
from vlsm.datasets.inspection import good_records
from vlsm.datasets.records import Record, locations_of
from vlsm.errors import ConfigError, VlsmError
from vlsm.locations import LOCAL, split_scheme
from vlsm.runs.record import describe_differences
from vlsm.training.settings import TrainSettings
from vlsm.words import count

logger = logging.getLogger("vlsm")


def digest_start(settings: TrainSettings) -> dict[str, str]:
    """Return the digest of the checkpoint in start_from, as a fact for `make_record`; nothing without start_from."""
    start = settings.start_from
    return {} if start is None else {"start_from_digest": digest_files(read_checkpoint(start))}


def refuse_other_settings(record: dict[str, Any], settings: TrainSettings) -> None:
    """Raise a ConfigError if the run has other settings, or if start_from had another content when the run began.

    The frozen weights of a resumed run come from start_from again. Earlier versions did not record its digest; then it
    is not compared.
    """
    differences = describe_differences(record, settings, {})
    if "start_from_digest" in record and not digest_start(settings).items() <= record.items():
        differences.append(f"the checkpoint in start_from {settings.start_from!r} has changed since the run began")
    _refuse(settings.output, "settings", differences)


def refuse_other_data(
    settings: TrainSettings, examples: pa.Table, read_records: Callable[[], list[Record]], inspect: Inspect | None
) -> list[Record]:
    """Raise a ConfigError that names what has changed in the data since the run began.

    Args:
        settings: settings of the run.
        examples: the examples of the run, with the versions of their files. Those of earlier versions are not compared.
        read_records: returns the records as they are now.
        inspect: returns the facts of records. None for a finished run: its files are not read again, and it does not
            need its datasets any more.

    Returns:
        The records as they are now; none if they are no longer there.
    """
    try:
        records = read_records()
    except VlsmError as error:
        if inspect is not None:
            raise
        logger.info("the data cannot be compared with the data of the finished run: %s", error)
        return []
    differences = describe_changed_records(examples, records) or _describe_strangers(settings.output, examples, records)
    if not differences and inspect is not None:
        differences = describe_changed_files(examples, inspect)
    _refuse(settings.output, "data", differences)
    return records


def _describe_strangers(output: str, examples: pa.Table, records: list[Record]) -> list[str]:
    """Return a phrase if the examples in a store name files that no dataset names: others may write there."""
    if split_scheme(output)[0] in LOCAL:
        return []
    named = {uri for record in records for uri in locations_of(record)}
    strangers = {uri for record in good_records(examples) for uri in locations_of(record)} - named
    return [f"{count(len(strangers), 'file')} that no dataset names ({min(strangers)}, ...)"] if strangers else []


def _refuse(output: str, kind: str, differences: list[str]) -> None:
    if differences:
        raise ConfigError(
            f"OUTPUT {output!r} belongs to a run with other {kind}: {'; '.join(differences)}; "
            "choose another OUTPUT, or --set start_over=true to delete that run"
        )
