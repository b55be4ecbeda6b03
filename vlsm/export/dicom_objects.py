"""Runs exports that write DICOM objects for the masks of DICOM images: one object per file, or one per series."""

import datetime
import hashlib
import io
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from vlsm import storage
from vlsm.errors import ImageError
from vlsm.export.dicom_masks import stack_masks
from vlsm.export.dicom_source import DicomImage, ImageRows, read_dicom_image
from vlsm.export.dicom_values import Repairs
from vlsm.export.folder import ExportFolder
from vlsm.export.origins import Filters, Numbering, Row, SourceFile, SourceRows, file_id, read_settings
from vlsm.images.dicom_header import quiet
from vlsm.images.reader import Reader
from vlsm.runs.locations import Locations
from vlsm.runs.record import read_record
from vlsm.words import count

logger = logging.getLogger("vlsm")

MAX_LABEL = 64  # maximum characters of a DICOM value of type LO


@dataclass(frozen=True)
class Algorithm:
    """What made the masks: the model (name, "@" and version), and the time of the run."""

    model: str
    made_at: datetime.datetime


# makes an object from images of the same class and size, their masks by prompt (frames, H, W), and what made the masks
Maker = Callable[[list[DicomImage], dict[str, np.ndarray], Algorithm, Repairs], Dataset]


@dataclass
class _Series:
    """A series of which slices were read.

    Attributes:
        path: its object, or None if it could not be written.
        written: the files of the slices in the object.
        later: files of slices that came after the object was written.
        instances: the SOP Instance UIDs of all slices.
    """

    path: Path | None = None
    written: list[SourceFile] = field(default_factory=list)
    later: list[SourceFile] = field(default_factory=list)
    instances: set[str] = field(default_factory=set)


class DicomExport:
    """One export: where it reads and writes, and what it has counted.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        folder: for the files.
        limit: maximum number of rows.
        make: makes an object.
        suffix: end of the file names, such as ".seg.dcm".
    """

    def __init__(self, output: str, folder: ExportFolder, limit: int | None, make: Maker, suffix: str) -> None:
        self.output, self.folder, self.limit, self.make, self.suffix = output, folder, limit, make, suffix
        self.settings = read_settings(output)
        self.reader = Reader(self.settings, Locations(output, folder.allow))
        self.made_at = _read_planned_at(output)
        self.repairs, self.num_others, self.num_copies = Repairs(), 0, 0

    def write_files(self, filters: Filters) -> int:
        """Write one object per file, at `DIR/FILE.SUFFIX`. Returns the number of written files."""
        for entry in self._read(self._rows(filters)):
            self._write([entry], file_id(entry.rows[0]))
        return self._finish()

    def write_series(self, filters: Filters) -> int:
        """Write one object per series, at `DIR/SERIES_INSTANCE_UID.DIGEST.SUFFIX`. Returns the number of written files.

        Slices share an object if they are in the same series and frame of reference, and have the same size,
        orientation and pixel spacing. The digest is derived from these facts. Other images, such as multi-frame images
        and images without a position, have an object each, as in `write_files`.

        Slices of a series usually follow each other in the results. If they do not, the function reads the series again
        at the end and replaces its object. If several files have one SOP Instance UID, the first one is used, and a
        warning counts the masks of the others.
        """
        rows = self._rows(filters)
        found: dict[tuple[Any, ...], _Series] = {}
        for key, group in itertools.groupby(self._read(rows), key=lambda entry: _series_key(entry.image)):
            if key is None:
                for entry in group:
                    self._write([entry], file_id(entry.rows[0]))
                continue
            is_first = key not in found
            series = found.setdefault(key, _Series())
            entries = [entry for entry in group if self._is_first_copy(entry, series)]
            sources = [entry.source for entry in entries]
            if is_first:
                series.path, series.written = self._write(entries, _series_id(key)), sources
            else:
                series.later += sources
        for key, series in found.items():
            if series.later:
                self._extend(series, rows, key)
        return self._finish()

    def _rows(self, filters: Filters) -> SourceRows:
        return SourceRows(self.output, filters, self.limit, ["label_map", "model"], ("mask", "labels"))

    def _read(self, rows: SourceRows) -> Iterator[ImageRows]:
        """Yield each DICOM image with its rows. Other files are counted, and rows of unreadable files fail."""
        for source, source_rows in rows:
            with self.folder.attempt(source_rows):
                image = read_dicom_image(source, self.reader, self.repairs)
                if image is None:
                    self.num_others += len(source_rows)
                else:
                    yield ImageRows(image, source, source_rows)

    def _is_first_copy(self, entry: ImageRows, series: _Series) -> bool:
        instance = entry.image.uids["SOPInstanceUID"]
        if instance in series.instances:
            self.num_copies += len(entry.rows)
            return False
        series.instances.add(instance)
        return True

    def _write(self, entries: list[ImageRows], identity: str) -> Path | None:
        """Write an object. Return its path, or None if it could not be written."""
        written = None
        with self.folder.attempt([row for entry in entries for row in entry.rows]):
            content, rows = self._build(entries, self.repairs)
            with self.folder.file({"image_id": identity, "prompt": ""}, self.suffix, rows) as path:
                path.write_bytes(content)
                written = path
        return written

    def _extend(self, series: _Series, rows: SourceRows, key: tuple[Any, ...]) -> None:
        """Add the later slices to the object of a series. If that fails, the object stays, and only their rows fail."""
        written = series.written if series.path else []
        found = list(rows.read_again([*written, *series.later]))
        new_rows = [row for _, source_rows in found[len(written) :] for row in source_rows]
        with self.folder.attempt(new_rows):
            entries = [ImageRows(self._read_again(source, key), source, source_rows) for source, source_rows in found]
            if series.path is None:
                self._write(entries, _series_id(key))
                return
            content, painted = self._build(entries, Repairs())
            series.path.write_bytes(content)
            is_new = {id(row) for row in new_rows}
            for row in painted:
                if id(row) in is_new:
                    self.folder.note(series.path.relative_to(self.folder.directory).as_posix(), row)

    def _read_again(self, source: SourceFile, key: tuple[Any, ...]) -> DicomImage:
        image = read_dicom_image(source, self.reader, Repairs())
        if image is None or _series_key(image) != key:
            raise ImageError("corrupt", f"{source.name} changed during the export")
        return image

    def _build(self, entries: list[ImageRows], repairs: Repairs) -> tuple[bytes, list[Row]]:
        """Return the content of an object, and the rows whose masks it has.

        Raises:
            ImageError: it cannot be built, or is too large.
        """
        entries = sorted(entries, key=lambda entry: (entry.image.number, entry.image.uids["SOPInstanceUID"]))
        images, name = [entry.image for entry in entries], entries[0].image.name
        masks, rows = stack_masks(entries, Numbering(self.settings), self.folder)
        content = io.BytesIO()
        try:
            with quiet():
                made = self.make(images, masks, Algorithm(entries[0].rows[0]["model"], self.made_at), repairs)
                made.save_as(content, enforce_file_format=True)
        except ImageError:
            raise
        except Exception as error:  # the text of the error can quote patient data
            raise ImageError("corrupt", f"{name}: no object can be written ({type(error).__name__})") from None
        return content.getvalue(), rows

    def _finish(self) -> int:
        """Log what was counted; return the number of written files."""
        self.repairs.log()
        if self.num_others:
            logger.warning("not exported, because the image is not DICOM: %s", count(self.num_others, "mask"))
        if self.num_copies:
            logger.warning(
                "not exported, because an earlier file has the same SOP Instance UID: %s",
                count(self.num_copies, "mask"),
            )
        return self.folder.num_written


def _series_key(image: DicomImage) -> tuple[Any, ...] | None:
    """Return the facts that slices of one SEG share, or None for an image that has a SEG of its own."""
    if image.size[0] > 1 or not image.planes:
        return None
    plane, uids = image.planes[0], ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")
    geometry = tuple(round(number, 4) for number in (*plane.orientation, *plane.spacing))
    return (*(image.uids[keyword] for keyword in uids), *image.size[1:], *geometry)


def _series_id(key: tuple[Any, ...]) -> str:
    return f"{key[1]}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def _read_planned_at(output: str) -> datetime.datetime:
    """Return the planning time of the run, as the content date of a SEG: it is the same in every export."""
    record = read_record(storage.absolute(output)) or {}
    try:
        return datetime.datetime.fromisoformat(str(record.get("planned_at")))
    except ValueError:
        return datetime.datetime.now(datetime.UTC)


def unique_labels(prompts: list[str]) -> list[str]:
    """Return unique labels for the prompts: at most 64 printable characters, no backslash."""
    labels: list[str] = []
    for prompt in prompts:
        short = "".join(letter if letter.isprintable() and letter != "\\" else "_" for letter in prompt).strip() or "_"
        label, number = short[:MAX_LABEL], 2
        while label in labels:
            label = f"{short[: MAX_LABEL - len(str(number)) - 2]} ~{number}"
            number += 1
        labels.append(label)
    return labels


def derive_uid(*facts: str) -> str:
    """Return a UID that is derived from the facts (DICOM PS3.5, B.2: UID from a UUID)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(facts)).int}"
