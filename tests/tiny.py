"""Tiny pretrained weights in their libraries' own formats, and every model of the table built on them."""

import torch
from safetensors.torch import load_file, save_file

from vlsm.models.untrained import write_biomedclip, write_clip_resnet, write_clipseg, write_open_clip

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
    """Five layers of width 32; 16 tokens of text."""
    write_clipseg(folder, **TINY_CLIPSEG)
    return _stir(folder)


def save_tiny_biomedclip(folder):
    """timm's six-block vision transformer of width 64, and a BERT of two layers."""
    write_biomedclip(folder, image_tower=("test_vit", 160), num_hidden_layers=2, vocab_size=500, **_LAYERS)
    return _stir(folder)


def save_tiny_clip_resnet(folder):
    """One block a stage, eight channels wide."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    write_clip_resnet(folder, embed_dim=32, vision_cfg=vision, text_cfg=_BYTE_PAIR_TEXT)
    return _stir(folder)


def save_tiny_open_clip(folder):
    """open_clip's own vision transformer of four blocks, with patches of 8 pixels."""
    vision = {"image_size": 64, "layers": 4, "width": 32, "patch_size": 8, "head_width": 8}
    write_open_clip(folder, {"embed_dim": 32, "vision_cfg": vision, "text_cfg": _BYTE_PAIR_TEXT})
    return _stir(folder)


def save_tiny_sources(folder):
    """One folder of each kind."""
    save_tiny_clipseg(folder / "clipseg")
    save_tiny_biomedclip(folder / "biomedclip")
    save_tiny_clip_resnet(folder / "clip_resnet")
    save_tiny_open_clip(folder / "open_clip")
    return folder


def tiny_options(folder):
    """For every model of the table, options that make it tiny; openclip_seg stands there with UNet-D as well."""
    clipseg = {"source": str(folder / "clipseg"), "image_size": 64}
    biomedclip = {"source": str(folder / "biomedclip"), "image_size": 64, "taps": [1, 2, 4]}
    both = {"biomedclip_source": biomedclip["source"], "clipseg_source": clipseg["source"]}
    cnn = {"encoder": "resnet18", "encoder_weights": None, "image_size": 64}
    return {
        "clipseg": clipseg,
        "biomedclipseg": biomedclip,
        "biomedclipseg_d": biomedclip | {"decoder_source": None},
        "openclip_seg": {"source": str(folder / "open_clip")},
        "openclip_seg+unet": {"source": str(folder / "open_clip"), "unet": True, "width": 4},
        "cris": {"source": str(folder / "clip_resnet"), "image_size": 64, "width": 32},
        "unet_d": {"image_size": 64, "width": 4},
        "unet": cnn,
        "unetplusplus": cnn,
        "deeplabv3plus": cnn,
        "pixel": {"image_size": 64},
        "vlsm_a": biomedclip | {"width": 4},
        "vlsm_b": clipseg | {"width": 4},
        "vlsm_c": both | {"image_size": 64, "taps": [1, 2, 4], "width": 4},
    }


def _stir(folder):
    """Weights larger than the usual initial ones, so that images and prompts matter, and statistics as if learned."""
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(7)
    state = load_file(path)
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) * 0.15
            if key.startswith("decoder.") and value.ndim > 1:
                value = torch.zeros_like(value)  # transformers draws these with a standard deviation of 1
            state[key] = value + (noise.abs() if key.endswith("running_var") else noise)
    save_file(state, path, metadata={"format": "pt"})
    return folder
