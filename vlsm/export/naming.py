"""Safe and different file names for rows with arbitrary image ids and prompts.

A name is the image_id, the prompt and the kind, joined by dots: "a/b.png" and "polyp" become "a/b.png.polyp.png". A
text that cannot be part of a file name everywhere is escaped: its bad characters become "_", and "~" and a digest of
the whole text follow. So different texts have different names, and a plain name never looks like an escaped one.
"""

import hashlib
import re
import unicodedata
from typing import Any

MAX_NAME_BYTES = 255  # of Linux; macOS and Windows count UTF-16 units, which are never more
_MAX_PROMPT_BYTES = 60  # the image id shall have room too
_MAX_FOLDERS_BYTES = 700  # a whole path may have 1,024 bytes on macOS
_DIGEST_LENGTH = 17  # "~" and 64 bits: two of a billion texts share it with a probability of 3 %

_BAD_CHARACTERS = re.compile(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|]')
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])[ ]*(\.|$)", re.IGNORECASE)  # names of devices on Windows
_ESCAPED = re.compile(r"~[0-9a-f]{16}$")
_FILE_ENDINGS = (".png", ".gz", ".dcm", ".csv", ".json")  # of exported files: no folder has them
_KIND = re.compile(r"member_\d+|labels")


def relative_path(row: dict[str, Any], suffix: str, twin: int = 0) -> str:
    """Return the path of a row's file below the export folder, with "/" between folders: different for each row.

    No part of it has more than MAX_NAME_BYTES bytes. Paths of different rows can be equal on a file system that ignores
    case. `ExportFolder.path` prevents it.

    Args:
        row: a row with `image_id` and `prompt`, and with `kind` if it is the row of one mask or label map. Without a
            kind, or with the kind "labels", an empty prompt is left out.
        suffix: end of the file name.
        twin: 0, or the number of an alternative name, which has a digest of the whole row.
    """
    image_id, prompt, kind = row["image_id"], row["prompt"], row.get("kind") or ""
    parts = [part for part in image_id.split("/") if part not in ("", ".", "..")]
    folders = "/".join(_escape(part, _safe_folder(part), MAX_NAME_BYTES) for part in parts[:-1])
    if len(folders.encode()) > _MAX_FOLDERS_BYTES:
        folders = _digest(folders)
    is_whole = not prompt and kind in ("", "labels")  # a file of all prompts
    ends = [] if is_whole else [_escape(prompt, _safe_prompt(prompt), _MAX_PROMPT_BYTES)]
    if kind not in ("", "mask"):
        ends.append(re.sub(r"[^\w-]+", "_", kind))
    end = ".".join(["", *ends])
    room = MAX_NAME_BYTES - len(end.encode()) - len(suffix) - _DIGEST_LENGTH
    image = parts[-1] if parts else ""
    # "a" and "../a" are different images
    name = _escape(image if "/".join(parts) == image_id else image_id, _safe_name(image), room)
    unique = _digest(image_id, prompt, kind, str(twin)) if twin else ""
    return "/".join(part for part in (folders, name + end + unique + suffix) if part)


def path_key(path: str) -> str:
    """Return a text that is equal for paths that a file system may take for one: it ignores case and normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _escape(text: str, safe: str, max_bytes: int) -> str:
    """Return the text if it is safe and short, else a safe and short text that is different for each text."""
    if text == safe and len(text.encode()) <= max_bytes and not _ESCAPED.search(text):
        return text
    return safe.encode()[: max_bytes - _DIGEST_LENGTH].decode(errors="ignore") + _digest(text)


def _safe_name(name: str) -> str:
    """Return a name that every file system accepts, but for its length."""
    safe = _BAD_CHARACTERS.sub("_", unicodedata.normalize("NFC", name))
    safe = re.sub(r"[. ]+$", "_", safe) or "_"  # Windows drops them
    return f"_{safe}" if _RESERVED.match(safe) else safe


def _safe_folder(name: str) -> str:
    safe = _safe_name(name)
    return f"{safe}_" if safe.lower().endswith(_FILE_ENDINGS) else safe


def _safe_prompt(prompt: str) -> str:
    """Return a prompt without dots, which separate it from the image id and the kind."""
    safe = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", prompt)) or "_"
    return f"{safe}_" if _KIND.fullmatch(safe.lower()) else safe


def _digest(*texts: str) -> str:
    return "~" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[: _DIGEST_LENGTH - 1]
