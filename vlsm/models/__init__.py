"""The models by name."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vlsm.config import explain
from vlsm.errors import CheckpointError

if TYPE_CHECKING:
    from vlsm.models.contract import SegmentationModel

# where each model lives: transformers alone takes seconds to import, and only the process that runs a model needs it
MODELS = {"clipseg": "vlsm.models.clipseg:CLIPSeg", "unet_d": "vlsm.models.unet_d:UNetD"}


def build_model(name: str, **options: Any) -> "SegmentationModel":
    """A model of the table, in training mode.

    Args:
        name: a key of MODELS.
        options: fields of the model's Options.

    Raises:
        CheckpointError: the name or an option is unknown, or pretrained weights cannot be loaded.
    """
    return find_model(name).build(parse_options(name, options))


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
    settings = find_model(name).Options
    try:
        return settings.model_validate(options)
    except ValidationError as error:
        raise CheckpointError(f"options of {name}: {explain(error, settings)}") from error
