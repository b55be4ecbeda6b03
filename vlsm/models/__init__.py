"""The table of models, and functions that build a model by its name."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vlsm.config import explain
from vlsm.errors import CheckpointError
from vlsm.models.options import OPTIONS, STACK, Trainable

if TYPE_CHECKING:
    from vlsm.models.contract import SegmentationModel

# The module and class of each model. A module is imported when its model is built: transformers alone takes seconds
# to import, and only the process that runs a model needs it.
MODELS = {
    "clipseg": "vlsm.models.clipseg:CLIPSeg",
    "biomedclipseg": "vlsm.models.openclip_seg:BiomedCLIPSeg",
    "biomedclipseg_d": "vlsm.models.openclip_seg:BiomedCLIPSegD",
    "openclip_seg": "vlsm.models.openclip_seg:OpenCLIPSeg",
    "transformers_seg": "vlsm.models.transformers_seg:TransformersSeg",
    "cris": "vlsm.models.cris:CRIS",
    "sam3": "vlsm.models.sam3:SAM3",
    "unet_d": "vlsm.models.unet_d:UNetD",
    "unet": "vlsm.models.cnn:UNet",
    "unetplusplus": "vlsm.models.cnn:UNetPlusPlus",
    "deeplabv3plus": "vlsm.models.cnn:DeepLabV3Plus",
    "pixel": "vlsm.models.pixel:Pixel",
    "vlsm_a": "vlsm.models.ensemble_a:EnsembleA",
    "vlsm_b": "vlsm.models.ensemble_b:EnsembleB",
    "vlsm_c": "vlsm.models.ensemble_c:EnsembleC",
    STACK: "vlsm.models.stack:Stack",
}

BLIND = frozenset(
    {"unet_d", "unet", "unetplusplus", "deeplabv3plus", "pixel"}
)  # models that ignore the text of prompts


def ignores_text(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a model ignores the text of prompts: one of BLIND, or a stack of such models.

    Args:
        name: a key of MODELS.
        options: the options in its checkpoint.
    """
    if name != STACK:
        return name in BLIND
    parts = parse_options(name, dict(options)).parts
    return bool(parts) and all(part.model in BLIND for part in parts)


def build_model(name: str, /, trainable: Trainable = "decoder", **options: Any) -> "SegmentationModel":
    """Build a model of the table, in training mode. `vlsm.checkpoints.build_model` builds stacks too.

    Args:
        name: a key of MODELS.
        trainable: the parts that learn besides the decoder; see `SegmentationModel.set_trainable`.
        options: fields of the model's option class in `vlsm.models.options`.

    Raises:
        CheckpointError: the name or an option is unknown, or pretrained weights cannot be loaded.
    """
    checked = parse_options(name, options)
    model = find_model(name).build(checked).add_adapters()
    model.image_spec = replace(model.image_spec, resize=checked.resize)
    return model.set_trainable(trainable)


def find_model(name: str) -> type["SegmentationModel"]:
    """Return the class of a model.

    Raises:
        CheckpointError: the name is unknown; the message names the closest known name.
    """
    module_name, _, class_name = check_name(name).partition(":")
    model_class: type[SegmentationModel] = getattr(import_module(module_name), class_name)
    return model_class


def check_name(name: str) -> str:
    """Return the module and class of a model as "module:class".

    Raises:
        CheckpointError: the name is unknown; the message names the closest known name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CheckpointError(f"unknown model {name!r}; {hint}known models: {', '.join(MODELS)}")
    return MODELS[name]


def parse_options(name: str, options: dict[str, Any]) -> Any:
    """Return a model's options, checked.

    Raises:
        CheckpointError: the model's name is unknown, or an option is unknown or has a wrong value.
    """
    check_name(name)
    settings = OPTIONS[name]
    try:
        checked: Any = settings.model_validate(options)
    except ValidationError as error:
        raise CheckpointError(f"options of {name}: {explain(error, settings)}") from error
    for part in checked.parts if name == STACK else ():
        parse_options(part.model, part.options)
    return checked
