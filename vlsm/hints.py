"""What was probably meant by a location that is no checkpoint: the folder below or above it, or a hub id."""

import os
import re
from collections.abc import Mapping
from typing import Any

from vlsm.locations import absolute

_FOLDER = "checkpoint"  # of a checkpoint in the output of a training
_CONFIGS = {
    "config.json": "clipseg",
    "open_clip_config.json": "biomedclipseg",
}  # of published models, and a model for each
_HUB_ID = re.compile(r"(?:hf-hub:)?[\w-][\w.-]*/[\w-][\w.-]*")  # OWNER/NAME


def hint_at_checkpoint(fs: Any, uri: str, path: str, settings_name: str, models: Mapping[str, bool]) -> str:
    """Return a sentence about a location without a checkpoint, with "; " before it, or "".

    Args:
        fs: the file system of the location.
        uri: the location, absolute; the message names it.
        path: its path in the file system.
        settings_name: the name of the file that every checkpoint has.
        models: all models by name, and whether they have pretrained weights.
    """
    if fs.exists(f"{path}/{_FOLDER}/{settings_name}"):
        return f"; its checkpoint is one folder below: {uri}/{_FOLDER}"
    above, _, name = uri.rpartition("/")
    if name and "." in name and fs.exists(f"{path.rpartition('/')[0]}/{settings_name}"):
        return f"; the checkpoint is the folder of this file: {above}"
    for config, model in _CONFIGS.items():
        if fs.exists(f"{path}/{config}"):
            return f"; it is a published model, of which a checkpoint is made first: {_command(model, uri)}"
    given = os.path.relpath(uri) if "://" not in uri else uri  # a hub id became a path below the current folder
    if given in models:
        words = f"vlsm train OUTPUT --dataset NAME=URI --set model={given}"
        weights = f", or {_command(given)} makes one from pretrained weights" if models[given] else ""
        return f"; {given} is the name of a model, of which a training makes a checkpoint: {words}{weights}"
    if is_hub_id(given):
        model = "clipseg" if "clipseg" in given.lower() else "NAME"
        return f"; if it is a hub id, make a checkpoint of it first: {_command(model, given)} (`vlsm models` has names)"
    return ""


def is_hub_id(name: str) -> bool:
    """Return whether a text is OWNER/NAME, and no folder or file here."""
    return _HUB_ID.fullmatch(name) is not None and not os.path.exists(absolute(name))


def _command(model: str, source: str = "") -> str:
    return f"vlsm checkpoints DIR --model {model}" + (f" --set source={source}" if source else "")
