"""Names of files that are written for rows, whose ids and prompts may be anything."""

import hashlib
import re
from pathlib import Path
from typing import Any

_MAX_NAME_BYTES = 180


def file_path(directory: str | Path, row: dict[str, Any], suffix: str = ".png") -> Path:
    """Where a row's file goes: below the directory, whatever the image_id says, and nowhere that another row's goes.

    Args:
        directory: a local folder.
        row: with `image_id` and `prompt`, and `kind` where it is not "mask". An empty prompt is left out.
        suffix: what the name ends with.
    """
    parts = [part for part in row["image_id"].split("/") if part not in ("", ".", "..")]
    return Path(directory, *(_safe_name(part) for part in parts[:-1]), _leaf(row, "/".join(parts)) + suffix)


def _leaf(row: dict[str, Any], safe_id: str) -> str:
    name = _safe_name(safe_id.rsplit("/", 1)[-1])
    if safe_id != row["image_id"]:  # "a" and "../a" are two images
        name += "~" + _digest(row["image_id"])
    prompt = re.sub(r"[^\w-]+", "_", row["prompt"])[:40]
    if prompt != row["prompt"]:  # "a b" and "a_b" are two prompts
        prompt += "~" + _digest(row["prompt"])
    kind = row.get("kind") or "mask"
    return ".".join(part for part in (name, prompt, "" if kind == "mask" else kind.replace(" ", "_")) if part)


def _safe_name(name: str) -> str:
    safe = re.sub(r"[\x00-\x1f\x7f\\:]", "_", name)
    short = safe.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return short if short == name else f"{short}~{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
