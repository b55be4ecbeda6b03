"""Weights of SAM 3 in the names of Meta's public code, as fine-tuned ones are published."""

import re

import torch
from torch import Tensor, nn

from vlsm.models.public_weights import Names, load_state, read_state, rename_start

_VISION, _TEXT = r"backbone\.vision_backbone\.", r"backbone\.language_backbone\."
_PREFIX = re.compile(r"^(detector|sam3_model)\.")  # a file with the tracker of videos has it
# the start of a name in the public code, and of the same name here; no result depends on any other weights
_STARTS: Names = {
    rf"{_VISION}trunk\.blocks\.": "towers.vision.backbone.layers.",
    rf"{_VISION}trunk\.patch_embed\.proj\.": "towers.vision.backbone.embeddings.patch_embeddings.projection.",
    rf"{_VISION}trunk\.pos_embed$": "towers.vision.backbone.embeddings.position_embeddings",
    rf"{_VISION}trunk\.ln_pre\.": "towers.vision.backbone.layer_norm.",
    rf"{_VISION}convs\.": "towers.vision.neck.fpn_layers.",
    rf"{_TEXT}resizer\.": "towers.text_projection.",
    rf"{_TEXT}encoder\.transformer\.resblocks\.": "towers.text.text_model.encoder.layers.",
    rf"{_TEXT}encoder\.token_embedding\.": "towers.text.text_model.embeddings.token_embedding.",
    rf"{_TEXT}encoder\.positional_embedding$": "towers.text.text_model.embeddings.position_embedding.weight",
    rf"{_TEXT}encoder\.ln_final\.": "towers.text.text_model.final_layer_norm.",
    r"transformer\.encoder\.layers\.": "detr_encoder.layers.",
    r"transformer\.decoder\.presence_token_head\.": "detr_decoder.presence_head.",
    r"transformer\.decoder\.presence_token_out_norm\.": "detr_decoder.presence_layer_norm.",
    r"transformer\.decoder\.norm\.": "detr_decoder.output_layer_norm.",
    r"transformer\.decoder\.bbox_embed\.": "detr_decoder.box_head.",
    r"transformer\.decoder\.boxRPB_embed_([xy])\.": r"detr_decoder.box_rpb_embed_\1.",
    r"transformer\.decoder\.": "detr_decoder.",
    r"segmentation_head\.pixel_decoder\.": "mask_decoder.pixel_decoder.",
    r"segmentation_head\.semantic_seg_head\.": "mask_decoder.semantic_projection.",
    r"segmentation_head\.cross_attend_prompt\.": "mask_decoder.prompt_cross_attn.",
    r"segmentation_head\.cross_attn_norm\.": "mask_decoder.prompt_cross_attn_norm.",
}
# and of its parts
_PARTS: Names = {
    r"^(detr_decoder\.\w+)\.layers\.(\d)\.": lambda match: f"{match[1]}.layer{int(match[2]) + 1}.",
    r"^(detr_decoder\.layers\.\d+)\.cross_attn\.": r"\1.vision_cross_attn.",
    r"^(detr_decoder\.layers\.\d+)\.ca_text\.": r"\1.text_cross_attn.",
    r"^(detr_decoder\.layers\.\d+)\.norm1\.": r"\1.vision_cross_attn_layer_norm.",
    r"^(detr_decoder\.layers\.\d+)\.catext_norm\.": r"\1.text_cross_attn_layer_norm.",
    r"^(detr_decoder\.layers\.\d+)\.norm2\.": r"\1.self_attn_layer_norm.",
    r"^(detr_decoder\.layers\.\d+)\.norm3\.": r"\1.mlp_layer_norm.",
    r"\.attn\.(qkv)\.": r".attention.\1.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.(in_proj_|out_proj\.)": r".self_attn.\1",
    r"\.cross_attn_image\.": ".cross_attn.",
    r"^((?:detr_encoder|detr_decoder|mask_decoder)\..*attn)\.out_proj\.": r"\1.o_proj.",
    r"\.(?:ln_|norm)([123])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.linear([12])\.": r".mlp.fc\1.",
    r"\.dconv_2x2(?:_0)?\.": ".scale_layers.0.",
    r"\.dconv_2x2_1\.": ".scale_layers.2.",
    r"\.conv_1x1\.": ".proj1.",
    r"\.conv_3x3\.": ".proj2.",
}
_JOINED = re.compile(r"\.(?:qkv\.|in_proj_)(weight|bias)$")  # of queries, keys and values, one after the other


def load_meta_weights(model: nn.Module, path: str) -> None:
    """Load a file of Meta's public code into a SAM3, its towers included. The file cannot run code.

    Args:
        model: a SAM3 of the same sizes.
        path: a local .pt file (a state_dict, or a dict that has one), or .safetensors with the same names.

    Raises:
        CheckpointError: the file cannot be read, lacks weights, or has tensors of other sizes.

    Source: names of github.com/facebookresearch/sam3, as transformers' conversion script lists them.
    """
    state: dict[str, Tensor] = {}
    for name, value in read_state(path, "SAM 3").items():
        state |= rename_weight(name, value)
    needed = model.state_dict()
    used = {name: value for name, value in state.items() if name in needed}
    load_state(model, used, path, "SAM 3", "give a file of Meta's code, and a source with its configuration")


def rename_weight(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a weight of the public code in this project's names: none, one, or three."""
    renamed = rename_start(_PREFIX.sub("", name), _STARTS)
    if renamed is None:
        return {}
    for pattern, replacement in _PARTS.items():
        renamed = re.sub(pattern, replacement, renamed)
    if renamed.endswith("backbone.embeddings.position_embeddings"):
        value = value[:, 1:]  # without the class token's, which the image tower does not have
    if not _JOINED.search(renamed):
        return {renamed: value}
    parts = zip("qkv", torch.chunk(value, 3), strict=True)
    return {_JOINED.sub(rf".{letter}_proj.\1", renamed): part.clone() for letter, part in parts}
