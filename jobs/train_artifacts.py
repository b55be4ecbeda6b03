"""The files of a finished training that its trackers get."""

import tempfile
from pathlib import Path
from typing import Literal

from vlsm import storage
from vlsm.checkpoints import read_checkpoint
from vlsm.runs.record import RECORD_NAME, SUMMARY_NAME
from vlsm.shown import hide_secrets
from vlsm.training.state import CHECKPOINT_NAME

_NAMES = (RECORD_NAME, SUMMARY_NAME, "metrics.parquet", "curves.png")


def copy_artifacts(output: str, kind: Literal["checkpoint", "report"]) -> "tempfile.TemporaryDirectory[str]":
    """Copy the checkpoint, the settings, the metrics and the curves of a training into a temporary folder.

    Args:
        output: OUTPUT of the training.
        kind: "report" adds the report of the run, which shows images of patients.
    """
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    for name, data in read_checkpoint(storage.join(output, CHECKPOINT_NAME)).items():
        target = root / CHECKPOINT_NAME / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for name in _NAMES:
        data = storage.read_bytes(storage.join(output, name))
        if name == RECORD_NAME:  # an earlier version recorded passwords and signatures
            data = hide_secrets(data.decode()).encode()
        (root / name).write_bytes(data)
    if kind == "report":
        from vlsm.report.write import write_report  # here: it imports what draws

        write_report(output, root / "report.html")
    return folder
