"""The models by name."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vlsm.config import explain
from vlsm.errors import CheckpointError
from vlsm.models.options import OPTIONS

if TYPE_CHECKING:
    from vlsm.models.contract import SegmentationModel
    from vlsm.models.towers import Trainable

# where each model lives: transformers alone takes seconds to import, and only the process that runs a model needs it
MODELS = {
    "clipseg": "vlsm.models.clipseg:CLIPSeg",
    "biomedclipseg": "vlsm.models.openclip_seg:BiomedCLIPSeg",
    "biomedclipseg_d": "vlsm.models.openclip_seg:BiomedCLIPSegD",
    "openclip_seg": "vlsm.models.openclip_seg:OpenCLIPSeg",
    "cris": "vlsm.models.cris:CRIS",
    "unet_d": "vlsm.models.unet_d:UNetD",
    "unet": "vlsm.models.cnn:UNet",
    "unetplusplus": "vlsm.models.cnn:UNetPlusPlus",
    "deeplabv3plus": "vlsm.models.cnn:DeepLabV3Plus",
    "pixel": "vlsm.models.pixel:Pixel",
    "vlsm_a": "vlsm.models.ensemble_a:EnsembleA",
    "vlsm_b": "vlsm.models.ensemble_b:EnsembleB",
    "vlsm_c": "vlsm.models.ensembles:EnsembleC",
}


def build_model(name: str, /, trainable: "Trainable" = "decoder", **options: Any) -> "SegmentationModel":
    """A model of the table, in training mode.

    Args:
        name: a key of MODELS.
        trainable: what learns beside the decoder; see `SegmentationModel.set_trainable`.
        options: fields of the model's class in `vlsm.models.options`.

    Raises:
        CheckpointError: the name or an option is unknown, or pretrained weights cannot be loaded.
    """
    return find_model(name).build(parse_options(name, options)).set_trainable(trainable)


def find_model(name: str) -> type["SegmentationModel"]:
    """The class of a model's name, or a CheckpointError that names the nearest."""
    module, _, model = check_name(name).partition(":")
    found: type[SegmentationModel] = getattr(import_module(module), model)
    return found


def check_name(name: str) -> str:
    """Where a model lives, or a CheckpointError that names the nearest."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CheckpointError(f"unknown model {name!r}; {hint}known models: {', '.join(MODELS)}")
    return MODELS[name]


def parse_options(name: str, options: dict[str, Any]) -> Any:
    """A model's options, checked; a CheckpointError names what is wrong."""
    check_name(name)
    settings = OPTIONS[name]
    try:
        return settings.model_validate(options)
    except ValidationError as error:
        raise CheckpointError(f"options of {name}: {explain(error, settings)}") from error
