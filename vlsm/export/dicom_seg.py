"""Export masks of DICOM images as DICOM segmentations (SEG), which a PACS stores and a viewer shows over the images."""

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
    SourceFile,
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

_MAX_LABEL = 64  # maximum characters of a DICOM value of type LO
_SERIES_NUMBER = 1000  # scanners use much smaller numbers
# Required attributes that may be empty (type 2). Some manufacturers leave them out.
_TYPE_2_KEYWORDS = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)


def export_dicom_seg(output: str, directory: str | Path, filters: Filters = None, limit: int | None = None) -> int:
    """Write one DICOM SEG per DICOM source file, at `DIR/FILE.seg.dcm`, with one segment per prompt.

    The SEG has type BINARY. It refers to the frames of the source file and names the model as its algorithm. If the run
    has label maps, the segments are their classes. UIDs are derived from the UIDs of the source file, the model and the
    prompts, so that a repeated export writes identical objects.

    A SEG repeats the patient and the study of its source file, as DICOM requires. Protect it like the source file.

    Args:
        output: OUTPUT of a segment run, local or in an object store.
        directory: a local folder; created if it does not exist.
        filters: conditions that the rows must meet, as a list of (column, operator, value).
        limit: maximum number of rows.

    Returns:
        Number of written files. The function skips files that are not DICOM, and a warning counts their masks. It also
        skips, with a warning each, source files that cannot be read or that lack attributes which a SEG requires.

    Raises:
        ConfigError: OUTPUT has no masks, or a filter names an unknown column.
    """
    settings = read_settings(output)
    made_at = _read_planned_at(output)
    num_written, num_others, reader = 0, 0, Reader(settings)

    def read(chosen: Filters) -> Iterator[Row]:
        return read_ok_masks(output, chosen, limit, ["label_map", "model"], ("mask", "labels"))

    for source, rows in group_by_source(read, filters):
        try:
            header = _read_header(source, reader)
            if header is None:
                num_others += len(rows)
                continue
            path = file_path(directory, {"image_id": file_id(rows[0]), "prompt": ""}, ".seg.dcm")
            masks = _stack_masks(header, rows, Numbering(settings), source)
            seg = _make_segmentation(header, masks, rows[0]["model"], made_at, source)
        except ImageError as error:
            logger.warning("no segmentation: %s", error)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        seg.save_as(path)
        num_written += 1
    if num_others:
        logger.warning("%d masks are of images that are not DICOM; they are not exported", num_others)
    return num_written


def _read_header(source: SourceFile, reader: Reader) -> Dataset | None:
    """Return a DICOM file without its pixels, or None for a file of another format."""
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
    except Exception as error:  # the text of the error can quote patient data
        raise ImageError("corrupt", f"{source.name}: its DICOM header is damaged ({type(error).__name__})") from None


def _stack_masks(
    header: Dataset, rows: list[dict[str, Any]], numbering: Numbering, source: SourceFile
) -> dict[str, np.ndarray]:
    """Return for each prompt, in order, the masks of all frames: (frames, H, W) uint8."""
    has_labels = any(row["kind"] == "labels" for row in rows)
    masks: dict[str, np.ndarray] = {}
    size = int(header.NumberOfFrames), int(header.Rows), int(header.Columns)
    for row in rows:
        if has_labels and row["kind"] != "labels":
            continue
        frame = int((source_of(row)[1] or "frame=0").partition("=")[2])
        if frame >= size[0] or row["mask"].shape != size[1:]:
            raise ImageError("corrupt", f"{source.name} changed its shape after segmentation")
        for prompt, mask in _split_row(row):
            if prompt not in masks and (len(masks) + 1) * np.prod(size, dtype=np.int64) > MAX_EXPORT_BYTES:
                raise ImageError(
                    "too_large", f"{source.name} has more than {MAX_EXPORT_BYTES:,} pixels in all segments"
                )
            masks.setdefault(prompt, np.zeros(size, np.uint8))[frame] = mask
    order = sorted(masks, key=numbering.__getitem__) if not has_labels else list(masks)
    return {prompt: masks[prompt] for prompt in order}


def _split_row(row: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Return the prompts and masks of a row: one pair for a mask, one pair per class for a label map."""
    if row["kind"] != "labels":
        return [(row["prompt"], row["mask"])]
    labels = decode_labels(row["label_map"])
    return [(name, labels == number) for number, name in enumerate(class_names(row), start=1)]


def _make_segmentation(
    header: Dataset, masks: dict[str, np.ndarray], model: str, made_at: datetime.datetime, source: SourceFile
) -> hd.seg.Segmentation:
    """Return the SEG of one source file, also if its frames have no spatial position."""
    pixels = np.stack(list(masks.values()), axis=-1)  # (frames, H, W, segments)
    try:
        with quiet():
            _fill_missing_attributes(header)
            if hd.spatial.get_image_coordinate_system(header) is not None:
                return _build_segmentation(header, pixels, list(masks), model, made_at)
            # highdicom expects functional groups in files of a multi-frame class, and fails without them. A
            # single-frame class avoids that; the loop below writes the true class.
            sop_class_uid, header.SOPClassUID = header.SOPClassUID, SecondaryCaptureImageStorage
            seg = _build_segmentation(header, np.ones_like(pixels[:1]), list(masks), model, made_at)
            _add_frames(seg, pixels)
            for element in seg.iterall():
                if element.keyword == "ReferencedSOPClassUID" and element.value == SecondaryCaptureImageStorage:
                    element.value = sop_class_uid
            return seg
    # highdicom raises many types of errors, and their texts can quote patient data. Attribute names are safe.
    except Exception as error:
        reason = getattr(error, "name", None) or type(error).__name__
        raise ImageError("corrupt", f"{source.name} lacks what a DICOM segmentation needs ({reason})") from None


def _fill_missing_attributes(header: Dataset) -> None:
    for keyword in _TYPE_2_KEYWORDS:
        if keyword not in header:
            setattr(header, keyword, "")
    if hd.spatial.get_image_coordinate_system(header) is None and "SliceThickness" not in header:
        header.pop("PixelSpacing", None)  # highdicom cannot read its own file with a spacing but no thickness


def _add_frames(seg: hd.seg.Segmentation, pixels: np.ndarray) -> None:
    """Replace the single frame of a SEG by the masks of all frames. highdicom cannot do this without frame positions.

    The frames of an ultrasound loop, for example, have no position; the SEG identifies them by their number in the
    source file.

    Args:
        seg: segmentation with one frame per segment.
        pixels: (frames, H, W, segments) of 0 and 1.
    """
    pairs = [(s, f) for s in range(pixels.shape[3]) for f in range(pixels.shape[0])]
    pairs = [(s, f) for s, f in pairs if pixels[f, :, :, s].any()] or pairs  # all pairs if every mask is empty
    templates, items = list(seg.PerFrameFunctionalGroupsSequence), []
    for segment, frame in pairs:
        item = copy.deepcopy(templates[segment])
        item.FrameContentSequence[0].DimensionIndexValues = [segment + 1, frame + 1]
        item.FrameContentSequence[0].FrameLabel = f"source frame {frame + 1}"
        if len(pixels) > 1:
            item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = frame + 1
        items.append(item)
    frame_dimension = copy.deepcopy(seg.DimensionIndexSequence[0])
    frame_dimension.DimensionIndexPointer, frame_dimension.FunctionalGroupPointer = 0x00209453, 0x00209111
    frame_dimension.DimensionDescriptionLabel = "Frame Label"
    seg.DimensionIndexSequence.append(frame_dimension)
    seg.PerFrameFunctionalGroupsSequence = items
    seg.NumberOfFrames = len(items)
    bits = np.packbits(
        np.stack([pixels[frame, :, :, segment] for segment, frame in pairs]), bitorder="little"
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
            segmented_property_category=codes.SCT.Tissue,  # a free-text prompt has no code, so all segments are Tissue
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(_segment_labels(prompts), start=1)
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
    # highdicom writes the current time and a random UID. Fixed values make repeated exports identical byte by byte.
    seg.InstanceCreationDate, seg.InstanceCreationTime = seg.ContentDate, seg.ContentTime
    for equipment in seg.get("ContributingEquipmentSequence", ()):
        equipment.ContributionDateTime = made_at.strftime("%Y%m%d%H%M%S")
    dimensions_uid = _uid("dimensions", header.SOPInstanceUID, model, *prompts)
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions_uid
    return seg


def _segment_labels(prompts: list[str]) -> list[str]:
    """Return unique segment labels for the prompts: at most 64 printable characters, no backslash."""
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
    """Return a UID that is derived from the facts (DICOM PS3.5, B.2: UID from a UUID)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(facts)).int}"


def _read_planned_at(output: str) -> datetime.datetime:
    """Return the planning time of the run, as the content date of a SEG: it is the same in every export."""
    record = read_record(storage.absolute(output)) or {}
    try:
        return datetime.datetime.fromisoformat(str(record.get("planned_at")))
    except ValueError:
        return datetime.datetime.now(datetime.UTC)
