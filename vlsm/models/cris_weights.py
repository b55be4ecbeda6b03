"""Weights of CRIS in the names of its public code, such as a checkpoint that was trained on RefCOCO."""

from torch import nn

from vlsm.models.public_weights import Names, load_state, read_state, rename_start

# the start of a name in the public code, and of the same name here
_NAMES: Names = {
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
    state = {rename_weight(name): value for name, value in read_state(path, "CRIS").items() if name not in _UNUSED}
    advice = "give a file of the public code, and the source and width that it was trained with"
    load_state(model, state, path, "CRIS", advice)


def rename_weight(name: str) -> str:
    """Return this project's name of a weight of the public code. An unknown name stays as it is."""
    name = name.removeprefix("module.")  # DataParallel's
    return rename_start(name, _NAMES) or name
