"""Masks of DICOM images as DICOM segmentations (SEG), which a PACS takes and a viewer lays over their source."""

import copy
import datetime
import io
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import SecondaryCaptureImageStorage

from vlsm import storage
from vlsm.errors import ImageError
from vlsm.export.labels import class_names, decode_labels
from vlsm.export.naming import file_path
from vlsm.export.origins import (
    MAX_EXPORT_BYTES,
    Filters,
    Numbering,
    Row,
    Source,
    file_id,
    group_by_source,
    read_settings,
    source_of,
)
from vlsm.images.decode import EXTENSIONS
from vlsm.images.dicom import PIXEL_DATA_TAGS, count_frames, is_dicom
from vlsm.images.dicom_header import quiet, read_header
from vlsm.images.reader import Reader
from vlsm.runs.record import read_record
from vlsm.runs.results import read_ok_masks
from vlsm.version import __version__

logger = logging.getLogger("vlsm")

_MAX_LABEL = 64  # characters of a DICOM LO
_SERIES_NUMBER = 1000  # far from those of scanners
# What must be there, if only as nothing (type 2), and is missing in files of careless makers.
_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)


def export_dicom_seg(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write a DICOM SEG for each DICOM file among the sources, at `DIR/FILE.seg.dcm`, with a segment per prompt.

    Each is of kind BINARY, refers to the frames of its source, and names the model as its algorithm; where the run has
    label maps, their classes are the segments. As the standard demands, a SEG repeats its source's patient and study:
    it is as confidential as that. UIDs follow from the source's, the model and the prompts, so that the same export
    gives the same objects again.

    Args:
        output: OUTPUT of a segment run, local or on an object store.
        directory: a local folder; it is made where it does not exist.
        filters: which rows, as a list of (column, operator, value).
        limit: rows at most.

    Returns:
        How many files were written. Images that are not DICOM are passed over and counted in a warning; so is a source
        that is no longer there, or that lacks what a SEG needs.

    Raises:
        ConfigError: there are no masks at OUTPUT.
    """
    settings = read_settings(output)
    made_at = _planned_at(output)
    num_written, num_others, reader = 0, 0, Reader(settings)

    def read(chosen: Filters) -> Iterator[Row]:
        return read_ok_masks(output, chosen, limit, ["label_map", "model"], ("mask", "labels"))

    for source, rows in group_by_source(read, filters):
        try:
            header = _read_source(source, reader)
            if header is None:
                num_others += len(rows)
                continue
            path = file_path(directory, {"image_id": file_id(rows[0]), "prompt": ""}, ".seg.dcm")
            seg = _segment(
                header, _segments(header, rows, Numbering(settings), source), rows[0]["model"], made_at, source
            )
        except ImageError as error:
            logger.warning("no segmentation: %s", error)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        seg.save_as(path)
        num_written += 1
    if num_others:
        logger.warning("%d masks are of images that are not DICOM; no segmentation is written for them", num_others)
    return num_written


def _read_source(source: Source, reader: Reader) -> Dataset | None:
    """All of a DICOM file but its pixels; None for one of another kind."""
    if source.name.lower().endswith((*EXTENSIONS, ".nii", ".nii.gz")):
        return None
    data = source.read(reader)
    if not is_dicom(data[:132]):
        return None
    num_frames = count_frames(io.BytesIO(data), source.name)
    try:
        with quiet():
            header = read_header(
                io.BytesIO(data), lambda tag, vr, length: tag in PIXEL_DATA_TAGS, [], MAX_EXPORT_BYTES, source.name
            )
            header.NumberOfFrames = num_frames
            return header
    except Exception as error:  # its text would quote values
        raise ImageError("corrupt", f"{source.name}: its DICOM header is damaged ({type(error).__name__})") from None


def _segments(
    header: Dataset, rows: list[dict[str, Any]], numbering: Numbering, source: Source
) -> dict[str, np.ndarray]:
    """For each prompt, in order, its masks of all frames: (frames, H, W) uint8."""
    has_labels = any(row["kind"] == "labels" for row in rows)
    masks: dict[str, np.ndarray] = {}
    size = int(header.NumberOfFrames), int(header.Rows), int(header.Columns)
    for row in rows:
        if has_labels and row["kind"] != "labels":
            continue
        frame = int((source_of(row)[1] or "frame=0").partition("=")[2])
        if frame >= size[0] or row["mask"].shape != size[1:]:
            raise ImageError("corrupt", f"{source.name} changed its shape since it was segmented")
        for prompt, mask in _masks(row):
            if prompt not in masks and (len(masks) + 1) * np.prod(size, dtype=np.int64) > MAX_EXPORT_BYTES:
                raise ImageError(
                    "too_large", f"{source.name} has more than {MAX_EXPORT_BYTES:,} pixels in all segments"
                )
            masks.setdefault(prompt, np.zeros(size, np.uint8))[frame] = mask
    order = sorted(masks, key=numbering.__getitem__) if not has_labels else list(masks)
    return {prompt: masks[prompt] for prompt in order}


def _masks(row: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    if row["kind"] != "labels":
        return [(row["prompt"], row["mask"])]
    labels = decode_labels(row["label_map"])
    return [(name, labels == number) for number, name in enumerate(class_names(row), start=1)]


def _segment(
    header: Dataset, masks: dict[str, np.ndarray], model: str, made_at: datetime.datetime, source: Source
) -> hd.seg.Segmentation:
    pixels = np.stack(list(masks.values()), axis=-1)  # (frames, H, W, segments)
    try:
        with quiet():
            _mend(header)
            if hd.spatial.get_image_coordinate_system(header) is not None:
                return _build_segmentation(header, pixels, list(masks), model, made_at)
            kind, header.SOPClassUID = (
                header.SOPClassUID,
                SecondaryCaptureImageStorage,
            )  # or functional groups are missed
            seg = _build_segmentation(header, np.ones_like(pixels[:1]), list(masks), model, made_at)
            _spread(seg, pixels)
            for element in seg.iterall():
                if element.keyword == "ReferencedSOPClassUID" and element.value == SecondaryCaptureImageStorage:
                    element.value = kind
            return seg
    except Exception as error:  # highdicom has many, and their texts quote values; the names of attributes are none
        what = getattr(error, "name", None) or type(error).__name__
        raise ImageError("corrupt", f"{source.name} lacks what a DICOM segmentation needs ({what})") from None


def _mend(header: Dataset) -> None:
    for keyword in _EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    if hd.spatial.get_image_coordinate_system(header) is None and "SliceThickness" not in header:
        header.pop("PixelSpacing", None)  # highdicom writes one without the other, and does not read that again


def _spread(seg: hd.seg.Segmentation, pixels: np.ndarray) -> None:
    """Put the masks of all frames into a segmentation of one, for what highdicom does not know: frames without places.

    Frames of an ultrasound loop, say, are told apart by their number in the source.

    Args:
        seg: with one frame per segment.
        pixels: (frames, H, W, segments) of 0 and 1.
    """
    chosen = [(s, f) for s in range(pixels.shape[3]) for f in range(pixels.shape[0]) if pixels[f, :, :, s].any()]
    chosen = chosen or [(s, f) for s in range(pixels.shape[3]) for f in range(pixels.shape[0])]
    templates, items = list(seg.PerFrameFunctionalGroupsSequence), []
    for segment, frame in chosen:
        item = copy.deepcopy(templates[segment])
        item.FrameContentSequence[0].DimensionIndexValues = [segment + 1, frame + 1]
        item.FrameContentSequence[0].FrameLabel = f"source frame {frame + 1}"
        if len(pixels) > 1:
            item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = frame + 1
        items.append(item)
    by_frame = copy.deepcopy(seg.DimensionIndexSequence[0])
    by_frame.DimensionIndexPointer, by_frame.FunctionalGroupPointer = 0x00209453, 0x00209111
    by_frame.DimensionDescriptionLabel = "Frame Label"
    seg.DimensionIndexSequence.append(by_frame)
    seg.PerFrameFunctionalGroupsSequence = items
    seg.NumberOfFrames = len(items)
    bits = np.packbits(
        np.stack([pixels[frame, :, :, segment] for segment, frame in chosen]), bitorder="little"
    ).tobytes()
    seg.PixelData = bits + b"\0" * (len(bits) % 2)
    seg.SegmentsOverlap = "YES" if (pixels.sum(axis=3, dtype=np.uint16) > 1).any() else "NO"


def _build_segmentation(
    header: Dataset, pixels: np.ndarray, prompts: list[str], model: str, made_at: datetime.datetime
) -> hd.seg.Segmentation:
    name, _, version = model.partition("@")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=name.strip()[:_MAX_LABEL] or "vlsm",
        family=codes.DCM.ArtificialIntelligence,
        version=version.strip()[:_MAX_LABEL] or __version__,
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.Tissue,  # what a prompt names is known to its reader alone
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(_labels(prompts), start=1)
    ]
    seg = hd.seg.Segmentation(
        source_images=[header],
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=_uid("series", header.SeriesInstanceUID, model, *prompts),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=_uid("instance", header.SOPInstanceUID, model, *prompts),
        instance_number=max(1, int(header.get("InstanceNumber") or 1)),
        manufacturer="vlsm",
        manufacturer_model_name="vlsm",
        software_versions=__version__,
        device_serial_number="0",
        content_date=made_at.date(),
        content_time=made_at.time(),
    )
    # the same export twice is the same object, byte for byte
    seg.InstanceCreationDate, seg.InstanceCreationTime = seg.ContentDate, seg.ContentTime
    for equipment in seg.get("ContributingEquipmentSequence", ()):
        equipment.ContributionDateTime = made_at.strftime("%Y%m%d%H%M%S")
    dimensions = _uid("dimensions", header.SOPInstanceUID, model, *prompts)  # highdicom draws one
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    return seg


def _labels(prompts: list[str]) -> list[str]:
    """The prompts as segment labels: of 64 characters at most, without backslashes, none twice."""
    labels: list[str] = []
    for prompt in prompts:
        short = "".join(letter if letter.isprintable() and letter != "\\" else "_" for letter in prompt).strip() or "_"
        label, number = short[:_MAX_LABEL], 2
        while label in labels:
            label = f"{short[: _MAX_LABEL - len(str(number)) - 2]} ~{number}"
            number += 1
        labels.append(label)
    return labels


def _uid(*facts: str) -> str:
    """A UID that follows from the facts (DICOM PS3.5, B.2: derived from a UUID)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(facts)).int}"


def _planned_at(output: str) -> datetime.datetime:
    """When the run was planned: a date that stays the same, which each object has to have."""
    record = read_record(storage.absolute(output)) or {}
    try:
        return datetime.datetime.fromisoformat(str(record.get("planned_at")))
    except ValueError:
        return datetime.datetime.now(datetime.UTC)
