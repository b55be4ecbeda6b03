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
from vlsm.models.options import STACK
from vlsm.runs.record import describe_differences
from vlsm.training.settings import TrainSettings
from vlsm.words import count

logger = logging.getLogger("vlsm")


def digest_start(settings: TrainSettings) -> dict[str, Any]:
    """Return the digest of the checkpoint in start_from, or those of a stack's members, as facts for `make_record`."""
    if settings.start_from is not None:
        return {"start_from_digest": digest_files(read_checkpoint(settings.start_from))}
    if settings.model == STACK:
        return {"member_digests": [digest_files(read_checkpoint(uri)) for uri in settings.options["members"]]}
    return {}


def refuse_other_settings(record: dict[str, Any], settings: TrainSettings) -> None:
    """Raise a ConfigError if the run has other settings, or if its checkpoints had another content when it began.

    The frozen weights of a resumed run come from start_from, or from the members of a stack, again. Earlier versions
    did not record the digest of start_from; then it is not compared.
    """
    differences = describe_differences(record, settings, {})
    if not differences and record.keys() & {"start_from_digest", "member_digests"}:
        now, which = digest_start(settings), f"the checkpoint in start_from {settings.start_from!r} has"
        if settings.model == STACK:
            which = "checkpoints in options.members have"
        if not now.items() <= record.items():
            differences.append(f"{which} changed since the run began")
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
