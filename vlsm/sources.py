"""Which file a row's image came from, and that file's bytes, for exports that put masks back beside their source."""

import io
import itertools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.errors import ImageError
from vlsm.fetch import read_image_bytes
from vlsm.record import read_record

MAX_SOURCE_BYTES = 1 << 31  # of a file, and of the voxels that are written for one
_INNER = re.compile(r"(?:(?P<member>.*)#)?(?P<inner>frame=\d+|page=\d+|(?:volume=\d+,)?slice=\d+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A file, packed into another or not: `member` is its name in the tar or zip at `uri`, if it is in one."""

    uri: str
    member: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.uri if self.member is None else f"{self.uri}#{self.member}"

    def read(self) -> bytes:
        """The file's content.

        Raises:
            ImageError: it cannot be read, or is larger than MAX_SOURCE_BYTES.
        """
        data = read_image_bytes(self.uri, None, max_bytes=MAX_SOURCE_BYTES)
        if self.member is None:
            return data
        try:
            return _read_member(data, self.member)
        except (KeyError, OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise ImageError("corrupt", f"{self.name} cannot be unpacked ({type(error).__name__})") from error


def _read_member(data: bytes, member: str) -> bytes:
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(member) as packed:
            content = packed.read(MAX_SOURCE_BYTES + 1)
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            unpacked = tar.extractfile(member)
            content = unpacked.read(MAX_SOURCE_BYTES + 1) if unpacked else b""
    if len(content) > MAX_SOURCE_BYTES:
        raise ValueError("too large")
    return content


def source_of(row: dict[str, Any]) -> tuple[Source, str | None]:
    """The file that a row's image is in, and which image of it ("frame=3"); None where it has one."""
    selector = row.get("selector")
    if not selector:
        return Source(row["image_uri"], None), None
    if found := _INNER.fullmatch(selector):
        return Source(row["image_uri"], found["member"]), found["inner"]
    return Source(row["image_uri"], selector), None


def file_id(row: dict[str, Any]) -> str:
    """The image_id without what tells one image of a file from another."""
    inner = source_of(row)[1]
    return str(row["image_id"]).removesuffix(f"#{inner}") if inner else str(row["image_id"])


def group_by_source(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[Source, list[dict[str, Any]]]]:
    """Rows that follow each other and are of the same file, together: no more than one file's are held."""
    for source, same in itertools.groupby(rows, key=lambda row: source_of(row)[0]):
        yield source, list(same)


def read_settings(output: str) -> dict[str, Any]:
    """The settings of the run that wrote OUTPUT, as its config.yaml records them; empty where it tells none."""
    record = read_record(storage.absolute(output)) or {}
    return record.get("settings") or record.get("config") or {}


class Numbering:
    """Prompts as label values from 1: those of the settings first, in their order; others as they are met."""

    def __init__(self, settings: dict[str, Any]) -> None:
        prompts = list(settings.get("classes") or settings.get("prompts") or ())
        self.numbers = {str(prompt): number for number, prompt in enumerate(prompts, start=1)}

    def __getitem__(self, prompt: str) -> int:
        return self.numbers.setdefault(prompt, len(self.numbers) + 1)
