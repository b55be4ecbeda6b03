"""The files of a finished training that its trackers get."""

from pathlib import Path
from typing import Literal

from vlsm import storage
from vlsm.checkpoints import read_checkpoint
from vlsm.runs.record import RECORD_NAME, SUMMARY_NAME
from vlsm.shown import hide_secrets
from vlsm.temporary import PrivateFolder
from vlsm.training.state import CHECKPOINT_NAME

_NAMES = (RECORD_NAME, SUMMARY_NAME, "metrics.parquet", "curves.png")


def copy_artifacts(output: str, kind: Literal["checkpoint", "report"]) -> PrivateFolder:
    """Copy the checkpoint, the settings, the metrics and the curves of a training into a temporary folder.

    Args:
        output: OUTPUT of the training.
        kind: "report" adds the report of the run, which shows images of patients.
    """
    folder = PrivateFolder("artifacts")
    try:
        _copy(output, kind, folder.path)
    except BaseException:
        folder.remove()
        raise
    return folder


def _copy(output: str, kind: str, root: Path) -> None:
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
