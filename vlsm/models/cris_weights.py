"""Weights of CRIS in the names of its public code, such as a checkpoint that was trained on RefCOCO."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vlsm.errors import CheckpointError
from vlsm.models.towers import LOAD_ERRORS, explain_source

# the start of a name in the public code, and of the same name here
_NAMES: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"backbone\.visual\.attnpool\.connect\.": "neck.residual.",
    r"backbone\.visual\.": "towers.visual.",
    r"backbone\.": "towers.text.",
    r"neck\.txt_proj\.": "neck.text.",
    r"neck\.norm_layer\.": "neck.norm5.",
    r"neck\.f1_v_proj\.": "neck.project5.",
    r"neck\.f2_v_proj\.": "neck.project4.",
    r"neck\.f3_v_proj\.": "neck.project3.",
    r"neck\.f([23])_cat\.": lambda match: f"neck.merge{6 - int(match[1])}.",
    r"neck\.f4_proj([345])\.": r"neck.query\1.",
    r"neck\.aggr\.": "neck.gather.",
    r"neck\.coordconv\.0\.conv1\.": "neck.locate.0.",
    r"neck\.coordconv\.1\.": "neck.locate.1.",
    r"decoder\.layers\.(\d+)\.self_attn_norm\.": r"layers.\1.after.0.",
    r"decoder\.layers\.(\d+)\.cross_attn_norm\.": r"layers.\1.after.1.",
    r"decoder\.layers\.(\d+)\.self_attn\.": r"layers.\1.self_attention.",
    r"decoder\.layers\.(\d+)\.multihead_attn\.": r"layers.\1.cross_attention.",
    r"decoder\.layers\.(\d+)\.ffn\.": r"layers.\1.feed_forward.",
    r"decoder\.layers\.(\d+)\.norm([123])\.": lambda match: f"layers.{match[1]}.norms.{int(match[2]) - 1}.",
    r"decoder\.norm\.": "norm.",
    r"proj\.vis\.([13])\.": lambda match: f"projector.grow.{int(match[1]) // 2}.",
    r"proj\.vis\.4\.": "projector.last.",
    r"proj\.txt\.": "projector.text.",
}
_UNUSED = ("backbone.logit_scale",)  # no logit depends on it


def load_published(model: nn.Module, path: str) -> None:
    """Load a file of the public code into a CRIS, its towers included. The file cannot run code.

    Args:
        model: a CRIS of the same sizes.
        path: a local .pt file (a state_dict, or a dict that has one), or .safetensors with the same names.

    Raises:
        CheckpointError: the file cannot be read, has other names, or has tensors of other sizes.

    Source: the names are those of the public code of CRIS, CVPR 2022, arXiv 2111.15174.
    """
    try:
        if path.endswith(".safetensors"):
            tree: Any = safetensors.torch.load_file(path)
        else:
            tree = torch.load(Path(path), map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"CRIS weights {path!r} cannot be loaded: {explain_source(error)}") from error
    for key in ("state_dict", "model"):
        tree = tree[key] if isinstance(tree, dict) and isinstance(tree.get(key), dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError(f"CRIS weights {path!r} are no dict of tensors; give the state_dict of the public code")
    state = {rename_weight(name): value for name, value in tree.items() if _strip(name) not in _UNUSED}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    known = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [
        f"{name}: {shapes.get(name, 'none')} instead of {known.get(name, 'none')}"
        for name in sorted(known.keys() | shapes.keys())
        if known.get(name) != shapes.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"CRIS weights {path!r} do not fit the model in {len(wrong)} places: {'; '.join(wrong[:3])}; give a file "
            "of the public code, and the source and width that it was trained with"
        )
    model.load_state_dict(state)


def rename_weight(name: str) -> str:
    """Return this project's name of a weight of the public code. An unknown name stays as it is."""
    name = _strip(name)
    for pattern, replacement in _NAMES.items():
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _strip(name: str) -> str:
    """Return the name without the prefix of DataParallel."""
    return name.removeprefix("module.")
