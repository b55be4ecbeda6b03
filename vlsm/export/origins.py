"""Source files of a run's rows, for exports that write one file per source file."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.images.fetch import image_errors, read_patiently
from vlsm.images.formats import HEAD_BYTES, split_selector
from vlsm.images.reader import Content, Reader
from vlsm.runs.record import read_record, settings_of
from vlsm.runs.results import choose_rows, read_ok_rows, read_rows

Filters = list[tuple[str, str, Any]] | None
Row = dict[str, Any]

MAX_EXPORT_BYTES = 1 << 31  # maximum size of the masks of one exported file in memory
_ROWS_AT_ONCE = 1000  # of scattered files


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

    def read_head(self, reader: Reader) -> bytes:
        """Return at least the first HEAD_BYTES bytes of the file, if it has so many. Errors are as for `open`.

        A member of a tar or zip is read whole.
        """
        if self.member is not None:
            return self.read(reader)
        uri = reader.locate(self.uri)

        def read() -> bytes:
            with image_errors(uri):
                fs, path = storage.open_uri(uri)
                return bytes(
                    storage.with_retries(lambda: fs.cat_file(path, start=0, end=HEAD_BYTES), uri, storage.QUICK_S)
                )

        return read_patiently(read, uri, storage.PATIENT_S)


def source_of(row: dict[str, Any]) -> tuple[SourceFile, str | None]:
    """Return the source file of a row, and the selector of the image in it ("frame=3"), None for a single image."""
    member, image_selector = split_selector(row["image_uri"], row["selector"])
    return SourceFile(row["image_uri"], member), image_selector


def file_id(row: dict[str, Any]) -> str:
    """Return the image_id without the selector of the image in its file: one id for all images of a file."""
    image_selector = source_of(row)[1]
    return str(row["image_id"]).removesuffix(f"#{image_selector}") if image_selector else str(row["image_id"])


class SourceRows:
    """The rows of an export, by source file: an iterable of (file, its rows). Each file occurs once.

    Rows of a file usually follow each other. If they do not, as after an update of a grown archive, the rows of the
    file are read again at the end. The use of memory is the rows of one file, or about 1,000 rows of such files, and
    about 100 bytes per file.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows; None for no limit.
        columns, kinds: as for `read_ok_rows`.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """

    def __init__(
        self, output: str, filters: Filters, limit: int | None, columns: Sequence[str], kinds: Sequence[str] | None
    ) -> None:
        self._filters, self._limit = filters, limit
        self._read = functools.partial(read_ok_rows, output, columns=columns, kinds=kinds)
        places = read_rows(output, choose_rows(filters, kinds), ["image_uri", "selector"])
        self._counts = Counter(hash(source_of(row)[0]) for row in itertools.islice(places, limit))

    def __iter__(self) -> Iterator[tuple[SourceFile, list[Row]]]:
        scattered: dict[SourceFile, None] = {}
        rows = self._read(filters=self._filters, limit=self._limit)
        for source, group in itertools.groupby(rows, key=lambda row: source_of(row)[0]):
            source_rows = list(group)
            if len(source_rows) == self._counts[hash(source)]:
                yield source, source_rows
            else:
                scattered[source] = None
        yield from self.read_again(scattered)

    def read_again(self, sources: Iterable[SourceFile]) -> Iterator[tuple[SourceFile, list[Row]]]:
        """Yield some of the files with their rows, in the given order."""
        batch: dict[SourceFile, int] = {}  # with the numbers of their rows
        for source in sources:
            batch[source] = self._counts[hash(source)]
            if sum(batch.values()) >= _ROWS_AT_ONCE:
                yield from self._read_batch(batch)
                batch = {}
        if batch:
            yield from self._read_batch(batch)

    def _read_batch(self, counts: dict[SourceFile, int]) -> Iterator[tuple[SourceFile, list[Row]]]:
        found: dict[SourceFile, list[Row]] = {source: [] for source in counts}
        uris = sorted({source.uri for source in counts})
        for row in self._read(filters=[*(self._filters or ()), ("image_uri", "in", uris)], limit=None):
            source = source_of(row)[0]
            # the rows come in the same order as before: the rows behind the limit are the last ones
            if len(found.get(source, ())) < counts.get(source, 0):
                found[source].append(row)
        yield from found.items()


def read_settings(output: str) -> SegmentSettings:
    """Return the settings in the config.yaml of the run at OUTPUT; settings that it lacks have their defaults."""
    config = (read_record(storage.absolute(output)) or {}).get("config") or {}
    known = {key: value for key, value in config.items() if key in SegmentSettings.model_fields and key != "run"}
    return settings_of({"input": "", "output": output, "members": [{"checkpoint": ""}]} | known, SegmentSettings)


class Numbering:
    """Label values of prompts, from 1: first the prompts of the settings, then other prompts as they occur."""

    def __init__(self, settings: SegmentSettings) -> None:
        self.numbers = {prompt: number for number, prompt in enumerate(settings.prompts or settings.classes, start=1)}

    def __getitem__(self, prompt: str) -> int:
        return self.numbers.setdefault(prompt, len(self.numbers) + 1)
