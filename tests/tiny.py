"""Tiny weights in the formats of their libraries, and options to build every model with them."""

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlsm.checkpoints import build_model, save_checkpoint
from vlsm.models.untrained import (
    write_biomedclip,
    write_clip_resnet,
    write_clipseg,
    write_open_clip,
    write_sam3,
    write_siglip,
)

_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_BYTE_PAIR_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TINY_CLIPSEG = {
    "text_config": {**_LAYERS, "num_hidden_layers": 5, "vocab_size": 500, "max_position_embeddings": 16},
    "vision_config": {**_LAYERS, "num_hidden_layers": 5, "image_size": 64},
    "projection_dim": 24,
    "reduce_dim": 16,
    "extract_layers": [0, 1, 3],
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def save_tiny_clipseg(folder):
    """Write a CLIPSeg with five layers of width 32 and 16 text tokens."""
    write_clipseg(folder, **TINY_CLIPSEG)
    return stir(folder)


def save_tiny_biomedclip(folder):
    """Write a BiomedCLIP with the six-block vision transformer of timm, width 64, and a BERT of two layers."""
    write_biomedclip(folder, image_tower=("test_vit", 160), num_hidden_layers=2, vocab_size=500, **_LAYERS)
    return stir(folder)


def save_tiny_clip_resnet(folder):
    """Write a CLIP ResNet with one block per stage and eight channels."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    write_clip_resnet(folder, embed_dim=32, vision_cfg=vision, text_cfg=_BYTE_PAIR_TEXT)
    return stir(folder)


def save_tiny_open_clip(folder):
    """Write an open_clip model with a vision transformer of four blocks and patches of 8 pixels."""
    vision = {"image_size": 64, "layers": 4, "width": 32, "patch_size": 8, "head_width": 8}
    write_open_clip(folder, {"embed_dim": 32, "vision_cfg": vision, "text_cfg": _BYTE_PAIR_TEXT})
    return stir(folder)


def save_tiny_siglip(folder):
    """Write a SigLIP with four layers of width 32, patches of 8 pixels and 64 text tokens."""
    layers = {**_LAYERS, "num_hidden_layers": 4}
    text = {**layers, "num_hidden_layers": 2, "vocab_size": 500, "projection_size": 24}
    write_siglip(folder, text_config=text, vision_config={**layers, "image_size": 64, "patch_size": 8})
    return stir(folder)


TINY_SAM3 = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            **_LAYERS, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8, "pretrain_image_size": 32,
            "window_size": 4, "global_attn_indexes": [1, 3],
        },
        "fpn_hidden_size": 16,
    },
    "text_config": {**_LAYERS, "num_hidden_layers": 2, "vocab_size": 500, "max_position_embeddings": 32},
    **{
        f"{part}_config": {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "intermediate_size": 24}
        | {"dropout": 0.0}  # which differs from process to process: two could not learn what one learns
        for part in ("geometry_encoder", "detr_encoder", "detr_decoder")
    },
    "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2},
}  # fmt: skip


def save_tiny_sam3(folder):
    """Write a SAM 3 with four layers of width 32, two of them in windows, and patches of 8 pixels."""
    write_sam3(folder, **TINY_SAM3)
    return stir(folder)


def save_tiny_sources(folder):
    """Write one folder per kind of weights, which are the same in each call."""
    shutil.copytree(_sources().name, folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _sources():
    """The folders, made once in each process, since that takes seconds."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    torch.manual_seed(0)
    save_tiny_clipseg(path / "clipseg")
    save_tiny_biomedclip(path / "biomedclip")
    save_tiny_clip_resnet(path / "clip_resnet")
    save_tiny_open_clip(path / "open_clip")
    save_tiny_siglip(path / "siglip")
    save_tiny_sam3(path / "sam3")
    save_tiny_members(path)
    return folder


def save_tiny_members(folder):
    """Write two checkpoints: a CLIPSeg of 64 pixels, whose weights are at `clipseg`, and a UNet-D of 32 pixels."""
    torch.manual_seed(3)
    clipseg = build_model("clipseg", source=str(folder / "clipseg"), image_size=64)
    save_checkpoint(clipseg, folder / "member_clipseg", prompt="polyp")
    save_checkpoint(build_model("unet_d", image_size=32, width=4), folder / "member_unet_d", prompt="polyp")


def tiny_options(folder):
    """Return options that make every model tiny; `+unet` is the model before it with a UNet-D, `+presence` likewise."""
    clipseg = {"source": str(folder / "clipseg"), "image_size": 64}
    biomedclip = {"source": str(folder / "biomedclip"), "image_size": 64, "taps": [1, 2, 4]}
    both = {"biomedclip_source": biomedclip["source"], "clipseg_source": clipseg["source"]}
    sam3 = {"source": str(folder / "sam3"), "image_size": 64}
    cris = {"source": str(folder / "clip_resnet"), "image_size": 64, "width": 32}
    cnn = {"encoder": "resnet18", "encoder_weights": None, "image_size": 64}
    return {
        "clipseg": clipseg,
        "biomedclipseg": biomedclip,
        "biomedclipseg_d": biomedclip | {"decoder_source": None},
        "openclip_seg": {"source": str(folder / "open_clip")},
        "openclip_seg+unet": {"source": str(folder / "open_clip"), "unet": True, "width": 4},
        "transformers_seg": {"source": str(folder / "siglip")},
        "transformers_seg+unet": {"source": str(folder / "siglip"), "unet": True, "width": 4},
        "sam3": sam3,
        "sam3+unet": sam3 | {"unet": True, "width": 4},
        "sam3+presence": sam3 | {"presence": True},
        "cris": cris,
        "cris+unet": cris | {"unet": True, "unet_width": 4},
        "unet_d": {"image_size": 64, "width": 4},
        "unet": cnn,
        "unetplusplus": cnn,
        "deeplabv3plus": cnn,
        "pixel": {"image_size": 64},
        "vlsm_a": biomedclip | {"width": 4},
        "vlsm_b": clipseg | {"width": 4},
        "vlsm_c": both | {"image_size": 64, "taps": [1, 2, 4], "width": 4},
        "stack": {"members": [str(folder / "member_clipseg"), str(folder / "member_unet_d")]},
    }


def stir(folder):
    """Add noise to all weights, so that logits depend on images and prompts, and to the batch-norm statistics."""
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(7)
    state = load_file(path)
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) * 0.15
            if key.startswith("decoder.") and value.ndim > 1:
                value = torch.zeros_like(value)  # transformers initialises these with a standard deviation of 1
            state[key] = value + (noise.abs() if key.endswith("running_var") else noise)
    save_file(state, path, metadata={"format": "pt"})
    return folder
