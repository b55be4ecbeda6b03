"""Checkpoints from anywhere: a folder or store, memory, or a published CLIPSeg."""

from pathlib import Path

from vlsm import storage
from vlsm.checkpoints import SETTINGS_NAME, Checkpoint, checkpoint_of, load_checkpoint
from vlsm.errors import CheckpointError
from vlsm.hints import is_hub_id
from vlsm.models import build_model

_CONFIG_NAME = "config.json"  # of a model of transformers


def find_checkpoint(source: Checkpoint | str | Path, has_prompt: bool) -> Checkpoint:
    """Return the checkpoint of a source, its model on the CPU in eval mode.

    A folder is a checkpoint, or the files of a published CLIPSeg (config.json). OWNER/NAME is a hub id if there is no
    such folder. Only CLIPSeg is published with a decoder: other weights must be trained before they segment.

    Args:
        source: a checkpoint in memory, its folder or URI, or the hub id or local folder of a CLIPSeg.
        has_prompt: whether the caller has a prompt; a published model has none of its own.

    Raises:
        CheckpointError: there is no usable model at the source, or there is no prompt for it.
    """
    if isinstance(source, Checkpoint):
        return source
    name = str(source)
    if not _is_published(name):
        return load_checkpoint(name)
    if not has_prompt:
        raise CheckpointError(f"{name!r} is a published model without a stored prompt; give a prompt, such as 'polyp'")
    try:
        source = name.removeprefix("hf-hub:") if is_hub_id(name) else storage.absolute(name)
        model = build_model("clipseg", source=source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; of published models only CLIPSeg segments without a training, such as CIDAS/clipseg-rd64-refined"
        ) from error
    return checkpoint_of(model, f"clipseg@{name}")


def _is_published(name: str) -> bool:
    if "://" in name:
        return False
    folder = Path(storage.absolute(name))
    if folder.is_dir():
        return (folder / _CONFIG_NAME).is_file() and not (folder / SETTINGS_NAME).exists()
    return is_hub_id(name)
