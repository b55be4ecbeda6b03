"""Files of weights in the names of a model's public code: reading, renaming, and loading into the model here."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vlsm.errors import CheckpointError
from vlsm.models.towers import LOAD_ERRORS, explain_source

Names = Mapping[str, str | Callable[[re.Match[str]], str]]  # patterns, and what replaces them


def read_state(path: str, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a file by their names. The file cannot run code.

    Args:
        path: a local .pt file (a state_dict, or a dict that has one), or .safetensors with the same names.
        kind: name of the model, for messages.

    Raises:
        CheckpointError: the file cannot be read, or is something else.
    """
    try:
        if path.endswith(".safetensors"):
            tree: Any = safetensors.torch.load_file(path)
        else:
            tree = torch.load(Path(path), map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{kind} weights {path!r} cannot be loaded: {explain_source(error)}") from error
    for key in ("state_dict", "model"):
        tree = tree[key] if isinstance(tree, dict) and isinstance(tree.get(key), dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError(f"{kind} weights {path!r} are no dict of tensors; give the state_dict of the public code")
    return {name.removeprefix("module."): value for name, value in tree.items()}  # DataParallel's


def rename_start(name: str, names: Names) -> str | None:
    """Return a name whose start is replaced as the first matching pattern says, or None if none matches."""
    for pattern, replacement in names.items():
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return None


def load_state(model: nn.Module, state: dict[str, Tensor], path: str, kind: str, advice: str) -> None:
    """Load tensors into a model that has the same names and sizes. A CNN that the option `unet` adds stays untrained.

    Raises:
        CheckpointError: a name or a size differs; the message ends with the advice.
    """
    own = model.state_dict()
    state |= {name: value for name, value in own.items() if name.startswith("fusion.")}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    known = {name: tuple(value.shape) for name, value in own.items()}
    wrong = [
        f"{name}: {shapes.get(name, 'none')} instead of {known.get(name, 'none')}"
        for name in sorted(known.keys() | shapes.keys())
        if known.get(name) != shapes.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{kind} weights {path!r} do not fit the model in {len(wrong)} places: {'; '.join(wrong[:3])}; {advice}"
        )
    model.load_state_dict(state)
