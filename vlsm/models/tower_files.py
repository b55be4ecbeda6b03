"""The files of a checkpoint that libraries read: only known files, keys and values reach a library.

transformers, open_clip and timm take names of code, of hub repositories and of paths from such files. A checkpoint
comes from other people: everything that is not on a list here is left out, and what asks to run code is refused.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlsm.documents import parse_json
from vlsm.errors import CheckpointError
from vlsm.limits import MAX_JSON_BYTES
from vlsm.models.options import MOST_MEMBERS

TOWER_FOLDERS = ("clipseg", "openclip", "transformers")
# in the checkpoint of a stack, such as members/0/clipseg
MEMBER_FOLDERS = tuple(f"members/{number}" for number in range(MOST_MEMBERS))
PAIRS = (
    "siglip",
    "siglip2",
    "clip",
    "metaclip_2",
    "aimv2",
    "tipsv2",
)  # an image tower and a text tower of transformers
_RUNS_CODE = {"auto_map", "custom_pipelines", "trust_remote_code"}
SAMS = ("sam3", "sam3_lite_text")
# numbers and a word in a dictionary, the only one that configurations may have besides those of their parts
_ROPE = "rope_parameters"
_VOCABULARIES = {"vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"}
# text towers that open_clip can build, and CLIPSeg
_MODEL_TYPES = {"clipseg", "bert", "roberta", "xlm-roberta", "mt5", "m2m_100"}
_TOKENIZERS = {"CLIP", "Bert", "Roberta", "XLMRoberta", "T5", "MT5", "Nllb", "M2M100", "Gemma"}
_TOKENIZERS |= {"Siglip", "Siglip2", "Tipsv2"}
_TOKENIZER_CLASSES = {f"{name}Tokenizer" for name in _TOKENIZERS} | {"TokenizersBackend", "PreTrainedTokenizer"}
_TOKENIZER_KEYS = set(
    "add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens "
    "clean_up_tokenization_spaces do_basic_tokenize do_lower_case errors extra_ids extra_special_tokens "
    "language_codes legacy model_max_length never_split padding_side spaces_between_special_tokens "
    "split_special_tokens src_lang strip_accents tgt_lang tokenize_chinese_chars tokenizer_class trim_offsets "
    "truncation_side".split()
)
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token"}  # of open_clip; others name files, or download
_MAX_EXTRA_TOKENS = 10_000  # T5 adds `extra_ids` of them; published are 0 to 100
_NAME = re.compile(r"[\w.\-]{1,200}")  # no place: neither a path nor a hub id


def write_tower_files(files: Mapping[str, bytes], folder: Path, uri: str) -> None:
    """Write the known files of a checkpoint into a folder, as libraries may read them.

    Args:
        files: contents by the path within the checkpoint.
        folder: receives the folders of TOWER_FOLDERS, and those in MEMBER_FOLDERS.
        uri: location of the checkpoint, for messages.

    Raises:
        CheckpointError: a file is not JSON, asks to run code, or names a model or tokenizer that is not known here.
    """
    for name, where, tree in _read_documents(files, uri):
        room, _, base = name.rpartition("/")
        member, _, kind = room.rpartition("/")
        content = None
        if base == "config.json":
            content = json.dumps(clean_config(tree, where, _kinds_of(room))).encode()
        elif clean := _CLEANERS.get(base):
            content = json.dumps(clean(tree, where)).encode()
        elif base in _VOCABULARIES:
            content = files[name]
        if content is not None and kind in TOWER_FOLDERS and member in ("", *MEMBER_FOLDERS):
            (folder / room).mkdir(parents=True, exist_ok=True)
            (folder / room / base).write_bytes(content)


def check_tower_files(files: Mapping[str, bytes], uri: str) -> None:
    """Check files as `write_tower_files`, but for what needs transformers, whose import takes seconds.

    Raises:
        CheckpointError: as `write_tower_files`. Whether the installed transformers knows a model is not checked.
    """
    for name, where, tree in _read_documents(files, uri):
        room, _, base = name.rpartition("/")
        if base == "config.json":
            _check_kind(tree, where, _kinds_of(room))
        elif clean := _CLEANERS.get(base):
            clean(tree, where)


def _read_documents(files: Mapping[str, bytes], uri: str) -> Iterator[tuple[str, str, Any]]:
    """Yield each file's name, its name for messages, and its content if it is JSON; it asks to run no code."""
    for name, data in files.items():
        where, tree = f"{name} of checkpoint {uri!r}", None
        if name.endswith(".json"):
            if len(data) > MAX_JSON_BYTES:
                raise CheckpointError(f"{where} is longer than {MAX_JSON_BYTES:,} bytes")
            tree = parse_json(data, where, CheckpointError)
            _refuse_code(tree, where)
        yield name, where, tree


def _kinds_of(room: str) -> Collection[str]:
    """Return the values of model_type that the config.json of a folder may have."""
    return (*PAIRS, *SAMS) if room.rpartition("/")[2] == "transformers" else _MODEL_TYPES


def clean_config(tree: Any, where: str, kinds: Collection[str] = _MODEL_TYPES) -> dict[str, Any]:
    """Return the known keys of a config.json of transformers. Keys that name code, kernels or files are left out.

    Args:
        tree: its content.
        where: its name, for messages.
        kinds: the values of model_type that are allowed.

    Raises:
        CheckpointError: it describes none of the models that are known here.
    """
    kind = _check_kind(tree, where, kinds)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}: model_type is {kind!r}; a newer transformers is needed")
    return _known_keys(tree, CONFIG_MAPPING[kind]) | {"model_type": kind}


def _check_kind(tree: Any, where: str, kinds: Collection[str]) -> str:
    """Return the model_type of a configuration. Raise a CheckpointError if it is none of `kinds`."""
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{where}: model_type is {kind!r:.80}; it must be one of {', '.join(sorted(kinds))}")
    return kind


def _known_keys(tree: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the known keys of a configuration, and of its parts. A part's kind is its default, whatever it says."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    cleaned = {key: value for key, value in tree.items() if key in config.__annotations__ and _is_plain(value)}
    rope = tree.get(_ROPE)
    if _ROPE in config.__annotations__ and isinstance(rope, dict):
        cleaned[_ROPE] = {key: value for key, value in rope.items() if key.startswith("rope_") and _is_plain(value)}
    for key, part in config.sub_configs_defaults.items():
        if isinstance(tree.get(key), dict):
            part_class, kind = getattr(part, "config_class", part), {}
            if part_class is AutoConfig:  # it would read the kind from the file
                part_class, kind = CONFIG_MAPPING[part.model_type], {"model_type": part.model_type}
            cleaned[key] = _known_keys(tree[key], part_class) | kind
    return cleaned


def check_name(name: object, where: str) -> None:
    """Raise a CheckpointError if a name is a path, a hub id or a location, as `hf-hub:OWNER/NAME`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(f"{where} is {name!r:.80}; it must be a name of timm, such as vit_base_patch16_224")


def _refuse_code(tree: Any, where: str) -> None:
    """Raise a CheckpointError if any object of a document has a key that makes a library run code."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key in _RUNS_CODE & value.keys():
                if value[key] and type(value[key]) is not int:  # a vocabulary may have the word, with its number
                    raise CheckpointError(f"{where} has the key {key}, which asks to run code; remove it")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def check_open_clip(tree: Any, where: str) -> Any:
    """Return open_clip's configuration, checked. open_clip itself refuses unknown keys of towers.

    Raises:
        CheckpointError: the image tower is no name of timm, or the tokenizer has options that name files or download.
    """
    text, vision = (_part(_part(tree, "model_cfg"), key) for key in ("text_cfg", "vision_cfg"))
    if vision.get("timm_model_name"):
        check_name(vision["timm_model_name"], f"{where}: timm_model_name")
    if unknown := sorted(_part(text, "tokenizer_kwargs").keys() - _TOKENIZER_OPTIONS):
        raise CheckpointError(
            f"{where}: tokenizer_kwargs has {unknown[0]!r:.80}; known are {' and '.join(sorted(_TOKENIZER_OPTIONS))}"
        )
    return tree


def _clean_tokenizer_config(tree: Any, where: str) -> dict[str, Any]:
    tree = tree if isinstance(tree, dict) else {}
    kind = tree.get("tokenizer_class")
    if kind is not None and str(kind).removesuffix("Fast") not in _TOKENIZER_CLASSES:
        raise CheckpointError(
            f"{where}: tokenizer_class is {kind!r:.80}; it must be one of {', '.join(sorted(_TOKENIZER_CLASSES))}"
        )
    cleaned = {key: value for key, value in tree.items() if key in _TOKENIZER_KEYS or key.endswith("_token")}
    for key, value in cleaned.items():
        if key != "model_max_length" and type(value) in (int, float) and not abs(value) <= _MAX_EXTRA_TOKENS:
            raise CheckpointError(f"{where}: {key} is {value!r:.80}; it must be {_MAX_EXTRA_TOKENS:,} at most")
    return cleaned


def _check_tokenizer(tree: Any, where: str) -> Any:
    """Refuse a tokenizer.json whose rules could make a prompt grow without end, or search it for hours."""
    waiting, num_replacements = [_part(tree, "normalizer"), _part(tree, "pre_tokenizer")], 0
    while waiting:
        step = waiting.pop()
        waiting += [
            part for value in step.values() if isinstance(value, list) for part in value if isinstance(part, dict)
        ]
        pattern = _part(step, "pattern").get("Regex", "")
        if step.get("type") == "Replace":
            num_replacements += 1
            if len(str(step.get("content", ""))) > 1 or num_replacements > 8:
                raise CheckpointError(
                    f"{where}: a rule makes prompts longer; it may replace letters by one letter only"
                )
        if re.search(r"\)[*+{]|[*+}]\)[*+{?]", str(pattern)):
            raise CheckpointError(f"{where}: the pattern {pattern!r:.80} repeats a group; it may take hours")
    return tree


def _part(tree: Any, key: str) -> dict[str, Any]:
    value = tree.get(key) if isinstance(tree, dict) else None
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a short word, or a list of these."""
    if isinstance(value, list):
        return all(not isinstance(item, list) and _is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 100)


def _unchanged(tree: Any, where: str) -> Any:
    return tree


_CLEANERS = {
    "open_clip_config.json": check_open_clip,
    "tokenizer_config.json": _clean_tokenizer_config,
    "tokenizer.json": _check_tokenizer,
    "special_tokens_map.json": _unchanged,
    "added_tokens.json": _unchanged,
    "vocab.json": _unchanged,
}
