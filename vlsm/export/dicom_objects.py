"""Runs exports that write DICOM objects for the masks of DICOM images: one object per file, or one per series."""

import datetime
import hashlib
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from vlsm import storage
from vlsm.errors import ImageError
from vlsm.export.dicom_source import DicomImage, read_dicom_image
from vlsm.export.dicom_values import Repairs
from vlsm.export.labels import class_names, decode_labels
from vlsm.export.naming import file_path
from vlsm.export.origins import (
    MAX_EXPORT_BYTES,
    Filters,
    Numbering,
    Row,
    file_id,
    group_by_source,
    read_settings,
    source_of,
)
from vlsm.images.dicom_header import quiet
from vlsm.images.reader import Reader
from vlsm.runs.record import read_record
from vlsm.runs.results import read_ok_masks

logger = logging.getLogger("vlsm")

MAX_LABEL = 64  # maximum characters of a DICOM value of type LO
Slice = tuple[DicomImage, list[Row]]  # an image file and its rows


@dataclass(frozen=True)
class Algorithm:
    """What made the masks: the model (name, "@" and version), and the time of the run."""

    model: str
    made_at: datetime.datetime


# makes an object from images of the same class and size, their masks by prompt (frames, H, W), and what made the masks
Maker = Callable[[list[DicomImage], dict[str, np.ndarray], Algorithm, Repairs], Dataset]


class DicomExport:
    """One export: where it reads and writes, and what it has counted.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        limit: maximum number of rows.
        make: makes an object.
        suffix: end of the file names, such as ".seg.dcm".
    """

    def __init__(self, output: str, directory: str | Path, limit: int | None, make: Maker, suffix: str) -> None:
        self.output, self.directory, self.limit, self.make, self.suffix = output, directory, limit, make, suffix
        self.settings = read_settings(output)
        self.made_at = _read_planned_at(output)
        self.repairs, self.num_others, self.paths = Repairs(), 0, set[Path]()

    def write_files(self, filters: Filters) -> int:
        """Write one object per file, at `DIR/FILE.SUFFIX`. Returns the number of written files."""
        for image, rows in self._read_slices(filters):
            self._write([(image, rows)], file_id(rows[0]))
        return self._finish()

    def write_series(self, filters: Filters) -> int:
        """Write one object per series, at `DIR/SERIES_INSTANCE_UID.DIGEST.SUFFIX`. Returns the number of written files.

        Slices share an object if they are in the same series and frame of reference, and have the same size,
        orientation and pixel spacing. The digest is derived from these facts. Other images, such as multi-frame images
        and images without a position, have an object each, as in `write_files`.

        Slices of a series usually follow each other in the results. If they do not, the function reads the series again
        at the end and replaces its object. If a slice occurs twice, its last copy is used.
        """
        uris: dict[tuple[Any, ...], set[str]] = {}
        repeated: dict[tuple[Any, ...], None] = {}
        for key, group in itertools.groupby(self._read_slices(filters), key=lambda one: _series_key(one[0])):
            if key is None:
                for image, rows in group:
                    self._write([(image, rows)], file_id(rows[0]))
                continue
            slices = list(group)
            if key in uris:
                repeated[key] = None
            else:
                self._write(slices, _series_id(key))
            uris.setdefault(key, set()).update(rows[0]["image_uri"] for _, rows in slices)
        for key in repeated:
            chosen = [*(filters or ()), ("image_uri", "in", sorted(uris[key]))]
            again = self._read_slices(chosen, is_first=False)
            self._write([one for one in again if _series_key(one[0]) == key], _series_id(key))
        return self._finish()

    def _read_slices(self, filters: Filters, is_first: bool = True) -> Iterator[Slice]:
        """Yield each DICOM image with its rows. Other files are counted, and unreadable files cause a warning.

        Args:
            filters: conditions that the rows must meet.
            is_first: False if the same images are read again, so that nothing is counted twice.
        """
        reader = Reader(self.settings)
        repairs = self.repairs if is_first else Repairs()

        def read(chosen: Filters) -> Iterator[Row]:
            return read_ok_masks(self.output, chosen, self.limit, ["label_map", "model"], ("mask", "labels"))

        for source, rows in group_by_source(read, filters):
            try:
                image = read_dicom_image(source, reader, repairs)
            except ImageError as error:
                logger.warning("not exported: %s", error)
                continue
            if image is not None:
                yield image, rows
            elif is_first:
                self.num_others += len(rows)

    def _write(self, slices: list[Slice], identity: str) -> None:
        unique = {image.uids["SOPInstanceUID"]: (image, rows) for image, rows in slices}
        slices = sorted(unique.values(), key=lambda one: (one[0].number, one[0].uids["SOPInstanceUID"]))
        images, model = [image for image, _ in slices], slices[0][1][0]["model"]
        path = file_path(self.directory, {"image_id": identity, "prompt": ""}, self.suffix)
        try:
            masks = _stack_masks(slices, Numbering(self.settings))
            with quiet():
                made = self.make(images, masks, Algorithm(model, self.made_at), self.repairs)
                path.parent.mkdir(parents=True, exist_ok=True)
                made.save_as(path, enforce_file_format=True)
        except ImageError as error:
            logger.warning("not exported: %s", error)
            return
        self.paths.add(path)

    def _finish(self) -> int:
        """Log what was counted; return the number of written files."""
        self.repairs.log()
        if self.num_others:
            logger.warning("%d masks are of images that are not DICOM; they are not exported", self.num_others)
        return len(self.paths)


def _series_key(image: DicomImage) -> tuple[Any, ...] | None:
    """Return the facts that slices of one SEG share, or None for an image that has a SEG of its own."""
    if image.size[0] > 1 or not image.planes:
        return None
    plane, uids = image.planes[0], ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")
    geometry = tuple(round(number, 4) for number in (*plane.orientation, *plane.spacing))
    return (*(image.uids[keyword] for keyword in uids), *image.size[1:], *geometry)


def _series_id(key: tuple[Any, ...]) -> str:
    return f"{key[1]}.{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"


def _stack_masks(slices: list[Slice], numbering: Numbering) -> dict[str, np.ndarray]:
    """Return for each prompt, in order, the masks of all frames of all images: (frames, H, W) uint8."""
    has_labels = any(row["kind"] == "labels" for _, rows in slices for row in rows)
    masks: dict[str, np.ndarray] = {}
    size = sum(image.size[0] for image, _ in slices), *slices[0][0].size[1:]
    start = 0
    for image, rows in slices:
        for row in rows:
            if has_labels and row["kind"] != "labels":
                continue
            frame = int((source_of(row)[1] or "frame=0").partition("=")[2])
            if frame >= image.size[0] or row["mask"].shape != size[1:]:
                raise ImageError("corrupt", f"{image.name} changed its shape after segmentation")
            for prompt, mask in _split_row(row):
                if prompt not in masks and (len(masks) + 1) * np.prod(size, dtype=np.int64) > MAX_EXPORT_BYTES:
                    limit = f"{MAX_EXPORT_BYTES:,} pixels in all segments"
                    raise ImageError("too_large", f"{image.name} or its series has more than {limit}")
                masks.setdefault(prompt, np.zeros(size, np.uint8))[start + frame] = mask
        start += image.size[0]
    order = sorted(masks, key=numbering.__getitem__) if not has_labels else list(masks)
    return {prompt: masks[prompt] for prompt in order}


def _split_row(row: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Return the prompts and masks of a row: one pair for a mask, one pair per class for a label map."""
    if row["kind"] != "labels":
        return [(row["prompt"], row["mask"])]
    labels = decode_labels(row["label_map"])
    return [(name, labels == number) for number, name in enumerate(class_names(row), start=1)]


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
