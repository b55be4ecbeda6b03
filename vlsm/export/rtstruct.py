"""Export masks of DICOM images as DICOM structure sets (RTSTRUCT), the contours that radiotherapy planning reads."""

import functools
import itertools
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from scipy.spatial import KDTree

from vlsm.errors import ImageError
from vlsm.export.dicom_objects import Algorithm, DicomExport, derive_uid, unique_labels
from vlsm.export.dicom_source import DicomImage, Plane
from vlsm.export.dicom_values import Repairs
from vlsm.export.folder import ExportFolder, open_folder
from vlsm.export.origins import Filters
from vlsm.version import __version__

_SERIES_NUMBER = 1001  # scanners use much smaller numbers; SEG has 1000
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management (retired), which the standard still names here


def export_rtstruct(
    output: str, directory: str | Path | ExportFolder, filters: Filters = None, limit: int | None = None
) -> int:
    """Write one DICOM RTSTRUCT per series, at `DIR/SERIES_INSTANCE_UID.DIGEST.rtstruct.dcm`, with one ROI per prompt.

    `DicomExport.write_series` tells which slices share a structure set. A multi-frame image has one of its own. An
    image without a complete position in the patient has none, because contours are points in the patient: its rows
    fail.

    A contour separates the centers of the pixels inside and outside of the mask, halfway between them. A hole is
    connected with its outer contour by a channel of no width, the "keyhole" of the standard (PS3.3, C.8.8.6.3): a
    reader that fills each contour gets the mask again. Arguments, result and errors are as for `export_dicom_seg`.
    """
    with open_folder(directory) as folder:
        return DicomExport(output, folder, limit, make_structure_set, ".rtstruct.dcm").write_series(filters)


def make_structure_set(
    images: list[DicomImage], masks: dict[str, np.ndarray], algorithm: Algorithm, repairs: Repairs
) -> Dataset:
    """Return the RTSTRUCT of a multi-frame image, or of the single-frame images of a series.

    Args:
        images: images of the same class and size, each with its planes.
        masks: (frames, H, W) uint8 of 0 and 1, for each prompt.
        algorithm: what made the masks.
        repairs: not used; no value of the images is repaired here.

    Raises:
        ImageError: an image has no position in the patient.
    """
    first = images[0]
    if not first.planes:
        raise ImageError("corrupt", f"{first.name} has no complete position in the patient, which contours need")
    facts = (*(image.uids["SOPInstanceUID"] for image in images), algorithm.model, *masks)
    structures = _describe(first, derive_uid("structures", *facts), algorithm)
    structures.SeriesInstanceUID = derive_uid("contours", first.uids["SeriesInstanceUID"], algorithm.model, *masks)
    structures.ReferencedFrameOfReferenceSequence = [_refer_to(images)]
    structures.StructureSetROISequence, structures.ROIContourSequence = [], []
    structures.RTROIObservationsSequence = []
    frames = [(image, number) for image in images for number in range(image.size[0])]
    for number, (label, mask) in enumerate(zip(unique_labels(list(masks)), masks.values(), strict=True), start=1):
        roi = _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=first.uids["FrameOfReferenceUID"],
            ROIName=label,
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=algorithm.model[:64],
        )
        contours = [
            _make_contour(points, image, frame)
            for (image, frame), pixels in zip(frames, mask, strict=True)
            for points in trace(pixels)
        ]
        structures.StructureSetROISequence.append(roi)
        structures.ROIContourSequence.append(_item(ReferencedROINumber=number))
        if contours:  # the standard forbids an empty sequence
            structures.ROIContourSequence[-1].ContourSequence = contours
        structures.RTROIObservationsSequence.append(
            _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        )
    return structures


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outline of each region of a mask, holes included, as closed polygons.

    Args:
        mask: (H, W) of 0 and 1.

    Returns:
        Arrays (points, 2) of (column, row); the center of the first pixel is (0, 0). The last point is not repeated.
    """
    outside = np.pad(mask.astype(np.float64), 1)  # a region at the border is closed, too
    regions, offsets = contour_generator(z=outside, fill_type=FillType.OuterOffset).filled(0.5, 2)
    polygons = []
    for points, ends in zip(regions, offsets, strict=True):
        rings = [_drop_straight(points[start : end - 1]) for start, end in itertools.pairwise(ends)]
        polygons.append(functools.reduce(_cut_out, rings) - 1)
    return polygons


def _cut_out(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return an outer ring that a channel of no width connects with a hole.

    Each point lies halfway between two pixels of a row or of a column. The channel leads from a point of one kind to a
    point of the other kind: such a line never meets the center of a pixel. It is the shortest one of its kind.
    """
    sides, ends = np.flatnonzero(outer[:, 0] % 1 != 0), np.flatnonzero(hole[:, 0] % 1 == 0)
    distances, nearest = KDTree(outer[sides]).query(hole[ends])
    shortest = int(np.argmin(distances))
    at, hole = int(sides[nearest[shortest]]), np.roll(hole, -ends[shortest], axis=0)
    return np.concatenate([outer[: at + 1], hole, hole[:1], outer[at:]])


def _drop_straight(ring: np.ndarray) -> np.ndarray:
    """Return a ring of points without those that lie on a straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _make_contour(points: np.ndarray, image: DicomImage, frame: int) -> Dataset:
    reference = _item(
        ReferencedSOPClassUID=image.uids["SOPClassUID"], ReferencedSOPInstanceUID=image.uids["SOPInstanceUID"]
    )
    if image.size[0] > 1:
        reference.ReferencedFrameNumber = frame + 1
    return _item(
        ContourImageSequence=[reference],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourData=[f"{number:.4f}" for number in _place(points, image.planes[frame]).ravel()],
    )


def _place(points: np.ndarray, plane: Plane) -> np.ndarray:
    """Return (points, 3) in mm in the patient, from (points, 2) of (column, row)."""
    rows_mm, columns_mm = plane.spacing  # between rows, and between columns
    axes = np.array([np.multiply(plane.orientation[:3], columns_mm), np.multiply(plane.orientation[3:], rows_mm)])
    return plane.position + points @ axes


def _describe(image: DicomImage, sop_instance_uid: str, algorithm: Algorithm) -> Dataset:
    """Return a structure set without structures."""
    date, time = algorithm.made_at.strftime("%Y%m%d"), algorithm.made_at.strftime("%H%M%S")
    structures = _item(
        StudyInstanceUID=image.uids["StudyInstanceUID"],
        SOPClassUID=uid.RTStructureSetStorage,
        SOPInstanceUID=sop_instance_uid,
        Modality="RTSTRUCT",
        SeriesNumber=_SERIES_NUMBER,
        OperatorsName="",
        Manufacturer="vlsm",
        ManufacturerModelName="vlsm",
        SoftwareVersions=__version__,
        InstanceCreationDate=date,
        InstanceCreationTime=time,
        StructureSetLabel="vlsm",
        StructureSetDate=date,
        StructureSetTime=time,
        ApprovalStatus="UNAPPROVED",
    )
    structures.update(image.common)
    structures.file_meta = FileMetaDataset()
    # ContourData can be longer than the 65,534 bytes that a text element with an explicit VR can have
    structures.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    structures.file_meta.MediaStorageSOPClassUID = uid.RTStructureSetStorage
    structures.file_meta.MediaStorageSOPInstanceUID = uid.UID(sop_instance_uid)
    return structures


def _refer_to(images: list[DicomImage]) -> Dataset:
    """Return the frame of reference with the study, the series and the images in it."""
    references = [
        _item(ReferencedSOPClassUID=image.uids["SOPClassUID"], ReferencedSOPInstanceUID=image.uids["SOPInstanceUID"])
        for image in images
    ]
    uids = images[0].uids
    series = _item(SeriesInstanceUID=uids["SeriesInstanceUID"], ContourImageSequence=references)
    study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=uids["StudyInstanceUID"],
        RTReferencedSeriesSequence=[series],
    )
    return _item(FrameOfReferenceUID=uids["FrameOfReferenceUID"], RTReferencedStudySequence=[study])


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item
