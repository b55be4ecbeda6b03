"""What each model of the table costs: parameters, operations per image and per prompt."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlsm.models import MODELS, find_model, parse_options
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.cris import CRIS
from vlsm.models.decoder import PromptDecoder, initialize_decoder
from vlsm.models.towers import Towers
from vlsm.models.untrained import write_biomedclip, write_clip_resnet, write_clipseg, write_open_clip

_EXAMPLE = "ViT-B-16"  # for openclip_seg, which has no tower of its own


@dataclass(frozen=True)
class Cost:
    """Of one model at its published size.

    Attributes:
        name: as in MODELS.
        num_parameters: all of them; what no output depends on is not there.
        num_trainable: with `trainable: decoder`.
        image_size: side of the input in pixels.
        image_gflop: an image with its first prompt, that prompt's text features at hand; 10^9 operations, a
            multiplication and an addition counted apart.
        prompt_gflop: each further prompt of the same image.
        source: where pretrained weights come from by default.
    """

    name: str
    num_parameters: int
    num_trainable: int
    image_size: int
    image_gflop: float
    prompt_gflop: float
    source: str


def measure_costs() -> list[Cost]:
    """The costs of every model, counted on networks without memory; needs no network and no weights."""
    return [measure_cost(name) for name in MODELS]


def measure_cost(name: str) -> Cost:
    """Those of one model."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(name, build_architecture(name, Path(folder)))


def build_architecture(name: str, folder: Path, device: str = "meta") -> SegmentationModel:
    """A model at its published size, with random weights, in eval mode.

    Args:
        name: as in MODELS.
        folder: for the files that describe the towers.
        device: "meta" for parameters without memory.
    """
    towers = folder / name
    write_clipseg(towers / "clipseg", weights=False)
    if name == "openclip_seg":
        write_open_clip(towers / "openclip", open_clip.get_model_config(_EXAMPLE), weights=False)
    elif name == "cris":
        write_clip_resnet(towers / "openclip", weights=False)
    else:
        write_biomedclip(towers / "openclip", weights=False)
    options = parse_options(name, {"source": _EXAMPLE} if name == "openclip_seg" else {})
    with torch.device(device):
        model = find_model(name).restore(options, towers).set_trainable("decoder").eval()
        for part in model.modules():
            if isinstance(part, PromptDecoder):
                initialize_decoder(part)
    return model


def _measure(name: str, model: SegmentationModel) -> Cost:
    size = model.image_spec.size
    with torch.no_grad():
        with FlopCounterMode(display=False) as image:
            features = model.encode_images(torch.empty(1, 3, size, size, device="meta"))
        with FlopCounterMode(display=False) as prompt:
            model.decode(features, _text_features(model))
    parameters = list(model.parameters())
    sources = [
        str(value) for key, value in model.options.model_dump().items() if key.endswith(("source", "weights")) and value
    ]
    if name == "openclip_seg":
        sources = [f"any of open_clip; here {_EXAMPLE}"]
    return Cost(
        name,
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        size,
        (image.get_total_flops() + prompt.get_total_flops()) / 1e9,
        prompt.get_total_flops() / 1e9,
        ", ".join(sources) or "untrained",
    )


def _text_features(model: SegmentationModel) -> Features:
    """Those of one prompt, by their shapes: transformers' text towers look at values, and there are none here."""
    widths = [part.text_width for part in model.modules() if isinstance(part, Towers)] or [0]
    features = tuple(torch.empty(1, width, device="meta") for width in widths)
    if not isinstance(model, CRIS):
        return features
    text = model.towers.text
    words = torch.empty(1, text.context_length, text.width, device="meta")
    return (*features, words, torch.empty(1, text.context_length, dtype=torch.bool, device="meta"))
