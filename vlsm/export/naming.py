"""Safe and unique file names for rows with arbitrary image ids and prompts."""

import hashlib
import re
from pathlib import Path
from typing import Any

_MAX_NAME_BYTES = 180


def file_path(directory: str | Path, row: dict[str, Any], suffix: str = ".png") -> Path:
    """Return the path of a row's file: always below the directory, and different for each row.

    Args:
        directory: a local folder.
        row: a row with `image_id` and `prompt`, and with `kind` if it is not "mask". An empty prompt is left out.
        suffix: end of the file name.
    """
    parts = [part for part in row["image_id"].split("/") if part not in ("", ".", "..")]
    return Path(directory, *(_safe_name(part) for part in parts[:-1]), _file_name(row, "/".join(parts)) + suffix)


def _file_name(row: dict[str, Any], safe_id: str) -> str:
    """Return the name without its suffix, from the image id, the prompt and the kind."""
    name = _safe_name(safe_id.rsplit("/", 1)[-1])
    if safe_id != row["image_id"]:  # "a" and "../a" are different images
        name += "~" + _digest(row["image_id"])
    prompt = re.sub(r"[^\w-]+", "_", row["prompt"])[:40]
    if prompt != row["prompt"]:  # "a b" and "a_b" are different prompts
        prompt += "~" + _digest(row["prompt"])
    kind = row.get("kind") or "mask"
    return ".".join(part for part in (name, prompt, "" if kind == "mask" else kind.replace(" ", "_")) if part)


def _safe_name(name: str) -> str:
    safe = re.sub(r"[\x00-\x1f\x7f\\:]", "_", name)
    short = safe.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return short if short == name else f"{short}~{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
