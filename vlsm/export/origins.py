"""Source files of a run's rows, for exports that write one file per source file."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.images.formats import split_selector
from vlsm.images.reader import Content, Reader
from vlsm.runs.record import read_record

Filters = list[tuple[str, str, Any]] | None
Row = dict[str, Any]

MAX_EXPORT_BYTES = 1 << 31  # maximum number of voxels in one exported file, at one byte per voxel


@dataclass(frozen=True)
class SourceFile:
    """A file that holds one or more images.

    Attributes:
        uri: location of the file, or of the tar or zip that contains it.
        member: name of the file in the tar or zip, or None if the file is not in a container.
    """

    uri: str
    member: str | None

    @property
    def name(self) -> str:
        """Name of the file in messages."""
        return self.uri if self.member is None else f"{self.uri}#{self.member}"

    def open(self, reader: Reader) -> Content:
        """Return the content of the file.

        Raises:
            ImageError: the file cannot be read, or is larger than the run's limit.
        """
        return reader.open({"image_uri": self.uri, "selector": self.member})[0]

    def read(self, reader: Reader) -> bytes:
        """Return the bytes of the file; errors as for `open`."""
        return self.open(reader).data


def source_of(row: dict[str, Any]) -> tuple[SourceFile, str | None]:
    """Return the source file of a row, and the selector of the image in it ("frame=3"), None for a single image."""
    member, image_selector = split_selector(row["image_uri"], row["selector"])
    return SourceFile(row["image_uri"], member), image_selector


def file_id(row: dict[str, Any]) -> str:
    """Return the image_id without the selector of the image in its file: one id for all images of a file."""
    image_selector = source_of(row)[1]
    return str(row["image_id"]).removesuffix(f"#{image_selector}") if image_selector else str(row["image_id"])


def group_by_source(
    read_rows: Callable[[Filters], Iterable[Row]], filters: Filters
) -> Iterator[tuple[SourceFile, list[Row]]]:
    """Yield each source file with its rows; only the rows of one file are in memory.

    Rows of a file usually follow each other. After an update of a grown archive, a file can occur a second time. The
    function then reads all rows of that file again, and yields the file a second time with all of its rows.

    Args:
        read_rows: function that returns the rows which meet the given filters.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
    """
    seen: set[SourceFile] = set()
    repeated: set[SourceFile] = set()
    for source, source_rows in itertools.groupby(read_rows(filters), key=lambda row: source_of(row)[0]):
        if source in seen:
            repeated.add(source)
        else:
            seen.add(source)
            yield source, list(source_rows)
    for source in sorted(repeated, key=lambda source: source.name):
        file_rows = read_rows([*(filters or ()), ("image_uri", "==", source.uri)])
        yield source, [row for row in file_rows if source_of(row)[0] == source]


def read_settings(output: str) -> SegmentSettings:
    """Return the settings in the config.yaml of the run at OUTPUT; settings that it lacks have their defaults."""
    config = (read_record(storage.absolute(output)) or {}).get("config") or {}
    known = {key: value for key, value in config.items() if key in SegmentSettings.model_fields and key != "run"}
    return SegmentSettings.model_validate({"input": "", "output": output, "members": [{"checkpoint": ""}]} | known)


class Numbering:
    """Label values of prompts, from 1: first the prompts of the settings, then other prompts as they occur."""

    def __init__(self, settings: SegmentSettings) -> None:
        self.numbers = {prompt: number for number, prompt in enumerate(settings.prompts or settings.classes, start=1)}

    def __getitem__(self, prompt: str) -> int:
        return self.numbers.setdefault(prompt, len(self.numbers) + 1)
