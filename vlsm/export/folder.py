"""The folder that an export fills: different names, an index of its files, and a list of rows that failed."""

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from vlsm import storage
from vlsm.cells import INDEX_COLUMNS, CsvWriter
from vlsm.errors import ConfigError, ImageError, VlsmError
from vlsm.export.naming import path_key, relative_path
from vlsm.runs.carried import CARRIED
from vlsm.shown import public_uri, show
from vlsm.words import count

logger = logging.getLogger("vlsm")

INDEX_NAME = "index.csv"
_NUM_NAMED = 5  # failed rows in the log; index.csv has all
# Errors that concern one file. Others, such as a full disk, end the export.
_FILE_ERRORS = {None, errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class ExportFolder:
    """A local folder with exported files, and with `index.csv`, which maps each file to its row.

    `index.csv` has the columns INDEX_COLUMNS, then those of the list that was INPUT: `file` is relative to the folder.
    A row that failed has no file, and its `error` states the reason. A file of several rows has a line for each. The
    folder and the index are created at the first row. No file is replaced: people may have worked on it.

    Args:
        directory: a local folder, which may exist, without an earlier export.
        allow: places whose images the export may read again, if OUTPUT is in a store and they lie outside of it.
        verb: what happens to rows, for messages.

    Raises:
        ConfigError: the folder is not local, has an index already, or a file is in its place.

    Attributes:
        num_written, num_failed: numbers of files and of failed rows.
    """

    def __init__(self, directory: str | Path, allow: Sequence[str] = (), verb: str = "exported") -> None:
        self._verb = verb
        self.directory, self.allow = Path(directory), tuple(map(storage.absolute, allow))
        if "://" in str(directory):
            raise ConfigError(f"{directory} is not a local folder; exports write local files")
        nearest = next((path for path in (self.directory, *self.directory.parents) if path.exists()), None)
        if nearest is not None and not nearest.is_dir():
            raise ConfigError(f"{nearest} is not a folder; exports need one")
        if os.path.lexists(self.directory / INDEX_NAME):
            raise ConfigError(f"{directory} holds an export already ({INDEX_NAME}): remove it or choose another DIR")
        self.num_written = self.num_failed = 0
        self._index: TextIO | None = None
        self._rows: CsvWriter | None = None
        self._taken: set[int] = set()  # hashes of the used names: about 100 bytes per file
        self._failed: set[int] = set()  # hashes of the failed rows
        self._first_errors: list[str] = []

    def __fspath__(self) -> str:
        return str(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._index is not None:
            self._index.close()
        if self.num_failed:
            more = ", ..." if self.num_failed > len(self._first_errors) else ""
            logger.warning(
                "%s could not be %s; %s lists them: %s%s",
                count(self.num_failed, "row"),
                self._verb,
                self.directory / INDEX_NAME,
                "; ".join(self._first_errors),
                more,
            )

    @contextlib.contextmanager
    def file(
        self,
        row: dict[str, Any],
        suffix: str = ".png",
        rows: Sequence[dict[str, Any]] = (),
        path: Path | None = None,
    ) -> Iterator[Path]:
        """Return a context that gives the path for a row's file. The caller decodes the row and writes the file in it.

        Errors are treated as by `attempt`.

        Args:
            row: the row that names the file, as for `naming.relative_path`.
            suffix: end of the file name.
            rows: the rows in the file, for the index; default: the row that names it.
            path: another path, from `claim`.
        """
        path = path or self.path(row, suffix)
        self._prepare(path)
        with self.attempt(rows or [row]):
            try:
                yield path
            except BaseException:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # a part of a file
                raise
            self.num_written += 1
            for written in rows or [row]:
                self.note(path.relative_to(self.directory).as_posix(), written)

    @contextlib.contextmanager
    def attempt(self, rows: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Return a context for the export of some rows. If it fails, they are noted as failed and the export goes on.

        Errors that concern other rows too are raised: a full or read-only disk, a store that is down or lacks
        credentials, a wrong setting.
        """
        try:
            yield
        except Exception as error:  # a damaged row can raise any error
            if not _concerns_one_row(error):
                raise
            for row in rows:
                self.fail(row, error)

    def path(self, row: dict[str, Any], suffix: str = ".png") -> Path:
        """Return a path for a row's file that no other row of this export has, also where case does not matter.

        The first of two such rows has the plain name, the second a digest.
        """
        for twin in itertools.count():
            path = relative_path(row, suffix, twin)
            if (key := hash(path_key(path))) not in self._taken:
                break
        self._taken.add(key)
        return self.directory / path

    def claim(self, name: str) -> Path:
        """Return the path of a file that must have this name, relative to the folder.

        Raises:
            ImageError: another file of this export has the name, or one that differs in case only.
        """
        if (key := hash(path_key(name))) in self._taken:
            raise ImageError("unreadable", f"another image of the export has the file {name} already")
        self._taken.add(key)
        return self.directory / name

    def new(self, name: str) -> Path:
        """Return the path of a file that describes the whole export; its folder exists.

        Raises:
            ConfigError: there is such a file already.
        """
        self._prepare(path := self.directory / name)
        return path

    def _prepare(self, path: Path) -> None:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists, and may hold the work of people: remove it or choose another DIR")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:  # a file or a broken link
            raise ConfigError(f"the folder {path.parent} cannot be made: choose another DIR ({error})") from error

    def note(self, file: str, row: dict[str, Any]) -> None:
        """Write a line of the index.

        Args:
            file: path of the file, relative to the folder.
            row: its row. Absent columns are empty.
        """
        self._write({"file": file, "error": ""} | _columns_of(row))

    def fail(self, row: dict[str, Any], error: Exception | str) -> None:
        """Write a line of the index for a row that failed. If it failed before, its first reason stays."""
        if (key := hash(repr(row))) in self._failed:
            return
        self._failed.add(key)
        text = str(error) if isinstance(error, (str, ImageError)) else f"{type(error).__name__}: {error}"
        text = " ".join(text.split())
        self.num_failed += 1
        if len(self._first_errors) < _NUM_NAMED:
            self._first_errors.append(f"{row.get('image_id')!r}, {row.get('prompt')!r}: {text}")
        self._write({"file": "", "error": text} | _columns_of(row))

    def _write(self, line: dict[str, Any]) -> None:
        of_list = line.pop(CARRIED)
        shown = line | {"image_uri": public_uri(line["image_uri"] or ""), "error": show(line["error"])}
        (self._rows or self._open_index(of_list)).write(shown | of_list)

    def _open_index(self, of_list: Iterable[str] = ()) -> CsvWriter:
        self._index = self.new(INDEX_NAME).open("w", encoding="utf-8", newline="")
        self._rows = CsvWriter(self._index, [*INDEX_COLUMNS, *of_list])
        return self._rows


def open_folder(directory: "str | Path | ExportFolder") -> contextlib.AbstractContextManager[ExportFolder]:
    """Return a context with the export folder. A folder that the caller has opened is not closed."""
    return contextlib.nullcontext(directory) if isinstance(directory, ExportFolder) else ExportFolder(directory)


def _columns_of(row: dict[str, Any]) -> dict[str, Any]:
    ours = {name: row.get(name) for name in INDEX_COLUMNS if name not in ("file", "error")}
    return ours | {CARRIED: dict(row.get(CARRIED) or {})}


def _concerns_one_row(error: Exception) -> bool:
    if isinstance(error, OSError):  # Pillow's errors have no number
        return error.errno in _FILE_ERRORS
    return isinstance(error, ImageError) or not isinstance(error, (VlsmError, *storage.store_errors()))
