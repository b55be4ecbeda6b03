"""Parses YAML and JSON that other people have written, within bounds.

Everything that reads such a file calls these functions. A document ends in one sentence if it is too large, too deep, a
bomb of aliases, or says one key twice: libraries disagree on which of the two counts.
"""

import json
import re
from collections import Counter
from itertools import accumulate
from typing import Any

import yaml

from vlsm import storage
from vlsm.errors import VlsmError
from vlsm.limits import MAX_JSON_BYTES

MAX_YAML_BYTES = 1 << 21
_MAX_DEPTH = 100  # far below Python's limit, so that whoever walks through the values needs no guard
_MAX_VALUES = 500_000  # of a YAML file, with every alias written out
_MAX_DIGITS = 100  # tokenizers write 10^30 for "no limit"

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml: 10 times faster, and bounds its own recursion
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_OTHER_BYTES = bytes(byte for byte in range(256) if byte not in b'[]{}"')
# what the constructors of YAML raise, for values such as 2001-13-45, `!!int ''` and `!!bool x`
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


def parse_yaml(data: bytes | str, name: str, error: type[VlsmError] = VlsmError) -> Any:
    """Return the value of a YAML document.

    Args:
        data: the whole document.
        name: what the document is, for the message.
        error: class of the error.

    Raises:
        VlsmError: of the class `error`: it is not YAML, or exceeds a bound, or says a key twice.
    """
    if len(data) > MAX_YAML_BYTES:
        raise error(f"{name} is longer than {MAX_YAML_BYTES:,} bytes; no file of settings is")
    try:
        loader = _Loader(data)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weigh(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _YAML_ERRORS as problem:
        raise error(f"{name} is not YAML: {_explain(problem)}") from problem


def parse_json(data: bytes | str, name: str, error: type[VlsmError] = VlsmError, advice: str = "") -> Any:
    """Return the value of a JSON document in UTF-8, UTF-16 or UTF-32. It may have NaN and Infinity.

    Args:
        data: the whole document. Its caller bounds its length.
        name: what the document is, for the message.
        error: class of the error.
        advice: end of the message.

    Raises:
        VlsmError: of the class `error`: it is not JSON, is too deep, has a number of many digits, or says a key twice.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        _check_depth(text)
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique, parse_int=_whole)
    except (ValueError, RecursionError) as problem:
        raise error(f"{name} is not JSON: {_explain(problem)}{advice}") from problem


def read_yaml(uri: str, name: str, error: type[VlsmError] = VlsmError) -> Any:
    """Return the value of a YAML file. Of a file that is too long, only the beginning is read.

    Raises:
        VlsmError: as for `parse_yaml`.
        OSError: the file cannot be read.
    """
    return parse_yaml(storage.read_bytes(uri, max_bytes=MAX_YAML_BYTES), name, error)


def read_json(
    uri: str,
    name: str,
    error: type[VlsmError] = VlsmError,
    advice: str = "",
    max_bytes: int = MAX_JSON_BYTES,
    too_long: str = "",
) -> Any:
    """Return the value of a JSON file. Of a file that is too long, only the beginning is read.

    `too_long` is the advice for such a file, `advice` for any other.

    Raises:
        VlsmError: as for `parse_json`, or the file has more than `max_bytes`.
        OSError: the file cannot be read.
    """
    data = storage.read_bytes(uri, max_bytes=max_bytes)
    if len(data) > max_bytes:
        raise error(f"{name} is longer than {max_bytes:,} bytes{too_long or advice}")
    return parse_json(data, name, error, advice)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int] | None], level: int = 0) -> tuple[int, int]:
    """Return the number of values below a node, every alias written out, and its height.

    Args:
        node: a node of a document, in which an alias is the same object as its anchor.
        known: results by the id of the node; None while it is computed, so that a node inside of itself is seen.
        level: number of nodes around it.
    """
    if id(node) not in known:
        known[id(node)] = None
        weights = [_weigh(child, known, level + 1) for child in _children(node, level)]
        known[id(node)] = (
            1 + sum(weight for weight, _ in weights),
            1 + max((height for _, height in weights), default=0),
        )
    result = known[id(node)]
    if result is None:
        raise ValueError("an alias stands inside of its own anchor")
    if result[0] > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES:,} values with its aliases written out")
    if result[1] > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} times")
    return result


def _children(node: yaml.Node, level: int) -> list[yaml.Node]:
    if level >= _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} times")
    if isinstance(node, yaml.MappingNode):
        _check_unique([(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return [child for pair in node.value for child in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} digits in line {node.start_mark.line + 1}")
    return []


def _check_depth(text: str) -> None:
    """Raise a ValueError if brackets outside of texts are nested too deeply."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:  # nearly always, and the rest takes time
        return
    marks = re.sub(r"\\.", "", text, flags=re.DOTALL) if "\\" in text else text
    brackets = re.sub(rb'"[^"]*"', b"", marks.encode("utf-8", "surrogatepass").translate(None, _OTHER_BYTES))
    if max(accumulate(map(_STEPS.__getitem__, brackets.replace(b'"', b""))), default=0) > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} times")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        _check_unique([("", key) for key, _ in pairs])
    return record


def _check_unique(keys: list[tuple[str, str]]) -> None:
    """Raise a ValueError if a key, a pair of its type and its text, stands twice."""
    if len(set(keys)) < len(keys):
        (_, twice), _ = Counter(keys).most_common(1)[0]
        raise ValueError(f"a key stands twice in an object: {twice[:80]!r}")


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _explain(problem: Exception) -> str:
    """Return the reason on one short line."""
    if isinstance(problem, json.JSONDecodeError):
        line = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        return f"{problem.msg} at {line}column {problem.colno}"
    if isinstance(problem, yaml.YAMLError | ValueError):
        return " ".join(str(problem).split())[:300]
    return "a value is not of the type that stands before it"
