"""How the training of a checkpoint read its data, from the record of the training beside the checkpoint."""

from collections.abc import Sequence
from typing import Any

from vlsm import storage
from vlsm.datasets.records import RECORD
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import VlsmError
from vlsm.runs.record import read_record
from vlsm.training.state import CHECKPOINT_NAME

_COMPARED = ("mask_threshold", "slices", "window")  # settings that change what a mask or an image is


def describe_differences_to_training(checkpoint: str, data: DatasetSettings, prompts: Sequence[str]) -> str | None:
    """Return a sentence if a checkpoint is judged on data that is read or prompted otherwise than in its training.

    A checkpoint that does not lie in the OUTPUT of its training has no record; then there is nothing to say.

    Args:
        checkpoint: location of the checkpoint.
        data: how the datasets are read now.
        prompts: choices of prompts, as in the setting `prompts` of an evaluation.
    """
    trained = _read_data(checkpoint)
    pairs = [(name, trained[name], getattr(data, name)) for name in _COMPARED if name in trained]
    phrases = [f"data.{name}={was!r} (here {now!r})" for name, was, now in pairs if was != _plain(now)]
    prompt = trained.get("prompt", "p1")
    if RECORD in prompts and prompt not in ("p1", "random", *prompts):
        phrases.append(f"data.prompt={prompt!r} (here each record's p1)")
    return f"checkpoint {checkpoint} was trained with {', '.join(phrases)}" if phrases else None


def _read_data(checkpoint: str) -> dict[str, Any]:
    """Return the settings `data` of a checkpoint's training, as its config.yaml has them; empty if there is none."""
    folder, _, name = storage.absolute(checkpoint).rstrip("/").rpartition("/")
    if name != CHECKPOINT_NAME:
        return {}
    unreadable: tuple[type[Exception], ...] = (VlsmError, OSError, *storage.store_errors())
    try:
        record = read_record(folder)
    except unreadable:
        return {}
    data = record["config"].get("data") if record else None
    return data if isinstance(data, dict) else {}


def _plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return list(value) if isinstance(value, tuple) else value
