"""The cost of each model in the table: parameters, and operations per image and per prompt."""

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlsm.errors import CheckpointError, ConfigError
from vlsm.models import MODELS, find_model, parse_options
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.cris import CRIS
from vlsm.models.decoder import PromptDecoder, initialize_decoder
from vlsm.models.options import STACK, Trainable
from vlsm.models.sam3 import CONTEXT, SAM3
from vlsm.models.stack import Stack
from vlsm.models.towers import Towers
from vlsm.models.untrained import (
    write_biomedclip,
    write_clip_resnet,
    write_clipseg,
    write_open_clip,
    write_sam3,
    write_siglip,
)

# members of the stack that is measured
_STACKED = ("clipseg", "unet_d")
LEARNING: tuple[Trainable, ...] = ("decoder", "lora", "dora", "adapters")  # with `all`, all parameters learn
# for models without default towers
_EXAMPLES = {"openclip_seg": "ViT-B-16", "transformers_seg": "google/medsiglip-448"}


@dataclass(frozen=True)
class Cost:
    """The cost of one model at its published size.

    Attributes:
        name: a key of MODELS.
        num_parameters: all parameters; models do not build parts that no output depends on.
        num_trainable: parameters that learn with each of LEARNING, at its default rank or width in the image towers;
            None if this model has no such adapters, or if peft is not installed.
        image_size: side of the input in pixels.
        image_gflop: 10^9 operations for an image with its first prompt, without the text tower. A multiplication and
            an addition count as two operations.
        prompt_gflop: 10^9 operations for each further prompt of the same image, without the text tower.
        source: default source of pretrained weights.
    """

    name: str
    num_parameters: int
    num_trainable: dict[Trainable, int | None]
    image_size: int
    image_gflop: float
    prompt_gflop: float
    source: str


def measure_costs() -> list[Cost]:
    """Return the costs of every model. They are counted on torch's meta device, without weights or downloads."""
    return [measure_cost(name) for name in MODELS]


def measure_cost(name: str, options: dict[str, Any] | None = None) -> Cost:
    """Return the cost of one model, with options that differ from the published ones, such as `unet`."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(name, build_architecture(name, Path(folder), options=options))


def build_architecture(
    name: str, folder: Path, device: str = "meta", options: dict[str, Any] | None = None
) -> SegmentationModel:
    """Build a model at its published size, with random weights, in eval mode.

    Args:
        name: a key of MODELS.
        folder: receives the files that describe the towers.
        device: torch device; "meta" allocates no memory for parameters.
        options: options of the model that differ from the published ones, such as image_size and width.

    Raises:
        CheckpointError: an option is unknown or has a wrong value.
    """
    if name == STACK:
        return _build_stack(folder / name, device, options or {})
    towers = folder / name
    write_clipseg(towers / "clipseg", weights=False)
    if name == "openclip_seg":
        write_open_clip(towers / "openclip", open_clip.get_model_config(_EXAMPLES[name]), weights=False)
    elif name == "transformers_seg":
        write_siglip(towers / "transformers", weights=False)
    elif name == "sam3":
        write_sam3(towers / "transformers", weights=False)
    elif name == "cris":
        write_clip_resnet(towers / "openclip", weights=False)
    else:
        write_biomedclip(towers / "openclip", weights=False)
    example = {"source": _EXAMPLES[name]} if name in _EXAMPLES else {}
    checked = parse_options(name, example | (options or {}))
    with torch.device(device):
        model = find_model(name).restore(checked, towers).set_trainable("decoder").eval()
        for module in model.modules():
            if isinstance(module, PromptDecoder):
                initialize_decoder(module)
    return model


def _build_stack(folder: Path, device: str, options: dict[str, Any]) -> SegmentationModel:
    members = [build_architecture(name, folder, device) for name in _STACKED]
    parts = [
        {"model": name, "options": member.options.model_dump(mode="json"), "image": asdict(member.image_spec)}
        for name, member in zip(_STACKED, members, strict=True)
    ]
    checked = parse_options(STACK, {"members": _STACKED, "parts": parts} | options)
    with torch.device(device):
        return Stack(checked, members).eval()


def _measure(name: str, model: SegmentationModel) -> Cost:
    size = model.image_spec.size
    with torch.no_grad():
        with FlopCounterMode(display=False) as image_counter:
            features = model.encode_images(torch.empty(1, 3, size, size, device="meta"))
        with FlopCounterMode(display=False) as prompt_counter:
            model.decode_with_presence(features, _text_features(model))
    parameters = list(model.parameters())
    sources = [
        str(value) for key, value in model.options.model_dump().items() if key.endswith(("source", "weights")) and value
    ]
    if name == STACK:
        sources = [f"checkpoints; this row is {', '.join(_STACKED)}"]
    if name in _EXAMPLES:
        sources = [f"any; this row is {_EXAMPLES[name]}"]
    return Cost(
        name,
        sum(parameter.numel() for parameter in parameters),
        {trainable: _count_learning(model, trainable) for trainable in LEARNING},
        size,
        (image_counter.get_total_flops() + prompt_counter.get_total_flops()) / 1e9,
        prompt_counter.get_total_flops() / 1e9,
        ", ".join(sources) or "untrained",
    )


def _count_learning(model: SegmentationModel, trainable: Trainable) -> int | None:
    """Return the number of parameters that learn, counted in a copy of the model, or None if none can."""
    try:
        with torch.device("meta"):
            model = copy.deepcopy(model).set_trainable(trainable)
    except (CheckpointError, ConfigError):
        return None
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _text_features(model: SegmentationModel) -> Features:
    """Return text features of one prompt, by shape alone: transformers' text towers fail without values, as on meta."""
    if isinstance(model, Stack):
        return tuple(part for member in model.models for part in _text_features(member))
    if isinstance(model, SAM3):
        words = torch.empty(1, CONTEXT, model.towers.text_width, device="meta")
        return words, torch.empty(1, CONTEXT, dtype=torch.bool, device="meta")
    widths = [module.text_width for module in model.modules() if isinstance(module, Towers)] or [0]
    features = tuple(torch.empty(1, width, device="meta") for width in widths)
    if not isinstance(model, CRIS):
        return features
    text = model.towers.text
    words = torch.empty(1, text.context_length, text.width, device="meta")
    return (*features, words, torch.empty(1, text.context_length, dtype=torch.bool, device="meta"))
