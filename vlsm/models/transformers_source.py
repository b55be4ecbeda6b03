"""Models of transformers from folders and hub ids: configuration, weights, tokenizer, mean and std."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlsm.documents import read_json
from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.tower_files import clean_config
from vlsm.models.towers import LOAD_ERRORS, explain_source

FOLDER = "transformers"
_CONFIG_NAME = "config.json"


def read_config(source: str, kinds: Collection[str]) -> Any:
    """Return the configuration of a folder or hub id, with the keys that the library knows.

    Args:
        source: folder with config.json, or hub id.
        kinds: values of model_type that are allowed.

    Raises:
        CheckpointError: the source has no such configuration.
    """
    where = f"{_CONFIG_NAME} of {source!r}"
    if Path(source).is_dir():
        path = Path(source, _CONFIG_NAME)
        if not path.is_file():
            raise CheckpointError(f"weights {source!r} cannot be loaded: the folder has no {_CONFIG_NAME}")
        tree = read_json(str(path), where, CheckpointError)
    else:
        try:
            tree, _ = PreTrainedConfig.get_config_dict(source)
        except LOAD_ERRORS as error:
            raise CheckpointError(f"weights {source!r} cannot be loaded: {explain_source(error)}") from error
    if isinstance(tree, dict) and isinstance(tree.get("detector_config"), dict):  # SAM 3 with its tracker of videos
        tree = {"model_type": str(tree.get("model_type")).removesuffix("_video")} | tree["detector_config"]
    cleaned = clean_config(tree, where, kinds)
    try:
        return CONFIG_MAPPING[cleaned["model_type"]].from_dict(cleaned)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{where} describes no model: {explain_source(error)}") from error


def load_weights(model_class: Any, source: str, kind: str, **options: Any) -> Any:
    """Return a model of transformers with pretrained weights, float32.

    Args:
        model_class: the model's class, or one of transformers' Auto classes.
        source: folder or hub id.
        kind: what the source should be, for messages.
        options: further options of from_pretrained.

    Raises:
        CheckpointError: the source is not complete, or cannot be reached.
    """
    try:
        # transformers prefers safetensors; without them it reads a pickle with weights_only
        # a configuration may name an attention whose code transformers would fetch from the hub
        model, report = model_class.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, attn_implementation="sdpa", **options
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{kind} weights {source!r} cannot be loaded: {explain_source(error)}") from error
    if report["missing_keys"]:  # transformers would continue with random weights
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{kind} weights {source!r} lack {len(missing)} tensors, such as {', '.join(missing[:3])}; "
            f"give a complete {kind} model"
        )
    return model.float()


def build_untrained(config: Any) -> Any:
    """Return the model of a configuration with random weights, float32."""
    return AutoModel.from_config(config, trust_remote_code=False, attn_implementation="sdpa", dtype=torch.float32)


def load_tokenizer(source: str, local_files_only: bool = False) -> Any:
    """Return the tokenizer of a folder or hub id. No code of the source runs.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"the tokenizer of {source!r} cannot be loaded: {explain_source(error)}") from error


def read_image_spec(source: str, size: int) -> ImageSpec:
    """Return the mean and std of a source's image processor, for levels from 0 to 1, with an input of `size` pixels.

    Raises:
        CheckpointError: the source has no image processor.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"the mean and std of {source!r} are unknown, since its preprocessor_config.json cannot be read: "
            f"{explain_source(error)}"
        ) from error
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255
    red, green, blue = (value / scale for value in mean)
    red_spread, green_spread, blue_spread = (value / scale for value in std)
    return ImageSpec(size, (red, green, blue), (red_spread, green_spread, blue_spread))
