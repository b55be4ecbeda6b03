"""Sources of open_clip models (open_clip's names, the hub, local folders) and their configurations."""

import contextlib
import copy
import difflib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig

from vlsm.documents import read_json
from vlsm.errors import CheckpointError
from vlsm.models.tower_files import check_open_clip, clean_config

CONFIG_NAME = "open_clip_config.json"
TOWER_CONFIG_NAME = "config.json"  # of a text tower of transformers


def build_architecture(model_config: dict[str, Any], image_size: int | None = None) -> open_clip.CustomTextCLIP:
    """Build an open_clip model with random weights and a separate text tower, without any download.

    Args:
        model_config: `model_cfg` of open_clip_config.json.
        image_size: side of the input in pixels; None keeps the configuration's side.
    """
    config = copy.deepcopy({key: value for key, value in model_config.items() if key != "custom_text"})
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if image_size:
        vision["image_size"] = image_size
    model = open_clip.CustomTextCLIP(**config)
    if image_size and "timm_model_name" in vision:
        model.visual.set_input_size(image_size)
    return model


def resolve_source(source: str) -> tuple[str, str | None]:
    """Return open_clip's model name, with "hf-hub:" or "local-dir:" if it has one, and the tag of the weights.

    Raises:
        CheckpointError: the source resembles a name of open_clip but is unknown, or it has no tag.
    """
    if source.startswith(("hf-hub:", "local-dir:")):
        return source, None
    if Path(source).is_dir():
        return f"local-dir:{source}", None
    name, _, tag = source.partition("/")
    near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.7)
    if near and name != near[0]:
        raise CheckpointError(
            f"unknown open_clip model {name!r}; did you mean {near[0]}? write a hub id as hf-hub:OWNER/NAME"
        )
    if near:
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name) or ["TAG"]
            raise CheckpointError(f"open_clip weights {source!r} need a tag, such as {name}/{tags[0]}")
        return name, tag
    return f"hf-hub:{source}", None


def read_config(name: str) -> dict[str, Any]:
    """Return the content of a source's open_clip_config.json, or its equivalent for a name of open_clip.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the configuration describes a captioner.
        CheckpointError: it is not JSON, or names files or places.
    """
    schema, separator, identifier = name.partition(":")
    if not separator:
        config = {"model_cfg": open_clip.get_model_config(name)}
    else:
        path = Path(identifier, CONFIG_NAME)
        if schema == "hf-hub":
            path = Path(hf_hub_download(identifier, CONFIG_NAME))
        elif not path.is_file():
            raise FileNotFoundError(f"the folder has no {CONFIG_NAME}")
        config = read_json(str(path), CONFIG_NAME, CheckpointError)
    check_open_clip(config, CONFIG_NAME)
    if "multimodal_cfg" in config["model_cfg"]:
        raise ValueError(
            "it is a captioner (CoCa); choose a model whose text tower returns one embedding and nothing else"
        )
    return config


@contextlib.contextmanager
def text_tower(name: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield keywords that make open_clip read the configuration of a text tower of transformers from a folder.

    The folder holds known keys only. open_clip itself would read the configuration from the hub and, if it comes with
    code, let transformers ask on the terminal whether to run it. The configuration comes from the source's folder if it
    has one, else from the hub.

    Raises:
        CheckpointError: the configuration describes no known text tower.
        OSError: it cannot be read.
    """
    text = config["model_cfg"]["text_cfg"]
    if not text.get("hf_model_name"):
        yield {}
        return
    folder = name.removeprefix("local-dir:")
    is_local = folder != name and Path(folder, TOWER_CONFIG_NAME).is_file()
    source = folder if is_local else text["hf_model_name"]
    if is_local:
        tower = read_json(f"{folder}/{TOWER_CONFIG_NAME}", TOWER_CONFIG_NAME, CheckpointError)
    else:
        tower, _ = PreTrainedConfig.get_config_dict(source)
    with tempfile.TemporaryDirectory() as clean:
        Path(clean, TOWER_CONFIG_NAME).write_text(json.dumps(clean_config(tower, f"{TOWER_CONFIG_NAME} of {source!r}")))
        yield {"text_cfg": text | {"hf_model_name": clean, "hf_model_pretrained": False}}


def load_tokenizer(name: str, config: dict[str, Any], local_files_only: bool = False) -> Any:
    """Return the tokenizer of a source. No code of the source runs."""
    if not config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(name)
    return open_clip.get_tokenizer(name, trust_remote_code=False, local_files_only=local_files_only)


def explain_text_tower(name: str) -> str:
    """Return a hint for an error message if a local folder lacks the text tower's config.json, else "".

    Published folders do not contain the configuration of a transformers text tower; it is on the hub.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if not (folder / CONFIG_NAME).is_file() or (folder / "config.json").is_file():
        return ""
    text = read_json(str(folder / CONFIG_NAME), CONFIG_NAME, CheckpointError)["model_cfg"]["text_cfg"]
    return (
        f"; its text tower needs the config.json of {text['hf_model_name']}: put that file into the folder"
        if "hf_model_name" in text
        else ""
    )
