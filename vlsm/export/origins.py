"""Which file a row's image came from, for exports that put masks back beside their source."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.images.formats import split_selector
from vlsm.images.reader import Reader
from vlsm.runs.record import read_record

Filters = list[tuple[str, str, Any]] | None
Row = dict[str, Any]

MAX_EXPORT_BYTES = 1 << 31  # of the voxels that are written for one file


@dataclass(frozen=True)
class Source:
    """A file, packed into another or not: `member` is its name in the tar or zip at `uri`, if it is in one."""

    uri: str
    member: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.uri if self.member is None else f"{self.uri}#{self.member}"

    def read(self, reader: Reader) -> bytes:
        """The file's content.

        Raises:
            ImageError: it cannot be read, or is larger than the run allowed.
        """
        return reader.open({"image_uri": self.uri, "selector": self.member})[0].data


def source_of(row: dict[str, Any]) -> tuple[Source, str | None]:
    """The file that a row's image is in, and which image of it ("frame=3"); None where it has one."""
    member, inner = split_selector(row["image_uri"], row["selector"])
    return Source(row["image_uri"], member), inner


def file_id(row: dict[str, Any]) -> str:
    """The image_id without what tells one image of a file from another."""
    inner = source_of(row)[1]
    return str(row["image_id"]).removesuffix(f"#{inner}") if inner else str(row["image_id"])


def group_by_source(rows: Callable[[Filters], Iterable[Row]], filters: Filters) -> Iterator[tuple[Source, list[Row]]]:
    """All rows of a file together, file by file; no more than one file's are held.

    Args:
        rows: those that filters choose, mostly file by file. Where a file comes again, as after an update of an archive
            that has grown, all of its rows are read anew.
        filters: which rows, as a list of (column, operator, value).
    """
    seen: set[Source] = set()
    again: set[Source] = set()
    for source, same in itertools.groupby(rows(filters), key=lambda row: source_of(row)[0]):
        if source in seen:
            again.add(source)
        else:
            seen.add(source)
            yield source, list(same)
    for source in sorted(again, key=lambda source: source.name):
        of_its_file = rows([*(filters or ()), ("image_uri", "==", source.uri)])
        yield source, [row for row in of_its_file if source_of(row)[0] == source]


def read_settings(output: str) -> SegmentSettings:
    """The settings of the run that wrote OUTPUT, as its config.yaml records them; the defaults where it tells none."""
    config = (read_record(storage.absolute(output)) or {}).get("config") or {}
    known = {key: value for key, value in config.items() if key in SegmentSettings.model_fields and key != "run"}
    return SegmentSettings.model_validate({"input": "", "output": output, "members": [{"checkpoint": ""}]} | known)


class Numbering:
    """Prompts as label values from 1: those of the settings first, in their order; others as they are met."""

    def __init__(self, settings: SegmentSettings) -> None:
        self.numbers = {prompt: number for number, prompt in enumerate(settings.prompts or settings.classes, start=1)}

    def __getitem__(self, prompt: str) -> int:
        return self.numbers.setdefault(prompt, len(self.numbers) + 1)
