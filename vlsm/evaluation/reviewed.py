"""Images that a reviewer has rejected, which an evaluation leaves out."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from vlsm import storage
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError
from vlsm.evaluation.matching import match_images
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.runs.marks import read_marks, rejected_images
from vlsm.runs.record import read_record
from vlsm.words import count

logger = logging.getLogger("vlsm")


def leave_out_rejected(records: Sequence[Record], settings: EvaluateSettings) -> tuple[list[Record], dict[str, Any]]:
    """Return the records whose image no reviewer has rejected, and the facts about the marks.

    A rejected image is left out for every prompt and every system, so that all systems are scored on the same images.
    The marks `accept` and `redo` leave out nothing: a score without the masks that a reviewer found bad would be too
    good.

    Args:
        records: all records to score.
        settings: settings of the evaluation. Without `marks`, all records stay and there are no facts.

    Raises:
        ConfigError: the marks cannot be read, are of no run of --masks, or leave no record.
    """
    if settings.marks is None:
        return list(records), {}
    marks = read_marks(settings.marks)
    run_id = marks["run_id"][0].as_py()
    name, output = _find_run(run_id, settings)
    with storage.name_errors(f"masks {name}", output):
        image_ids, _ = match_images(f"{name}, which is reviewed", output, records)
    rejected = rejected_images(marks)
    kept = [record for record, image_id in zip(records, image_ids, strict=True) if image_id not in rejected]
    num_left_out = len(records) - len(kept)
    logger.info(
        "marks %s: %s left out, because their images are rejected", settings.marks, count(num_left_out, "record")
    )
    if not kept:
        raise ConfigError(f"marks {settings.marks!r}: all images of the {count(len(records), 'record')} are rejected")
    digest = hashlib.sha256(json.dumps([run_id, sorted(rejected)]).encode()).hexdigest()
    return kept, {"rejected_digest": digest, "num_rejected": num_left_out}


def _find_run(run_id: str, settings: EvaluateSettings) -> tuple[str, str]:
    """Return name and OUTPUT of the run of --masks that was reviewed."""
    for name, output in settings.masks.items():
        with storage.name_errors(f"masks {name}", output):
            record = read_record(output)
        if record is not None and record.get("run_id") == run_id:
            return name, output
    raise ConfigError(
        f"marks {settings.marks!r} are of the segment run {run_id}, which is none of --masks; "
        "add the reviewed run: --masks NAME=OUTPUT"
    )
