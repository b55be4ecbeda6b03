"""Reads what exports need of a DICOM image file: its study, its UIDs and the position of its frames in the patient."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from vlsm.errors import ImageError
from vlsm.export.dicom_values import Repairs, copy_common_elements, copy_elements, read_numbers, read_texts
from vlsm.export.origins import Row, SourceFile
from vlsm.images.dicom import PIXEL_DATA_TAGS, count_frames, is_dicom
from vlsm.images.dicom_header import quiet, read_header
from vlsm.images.formats import HEAD_BYTES, UNNAMED, kind_of
from vlsm.images.reader import Reader
from vlsm.limits import MAX_LISTED_BYTES

_DETAILS = (
    *("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "InstitutionName"),
    *("InstitutionalDepartmentName", "InstitutionAddress", "StationName"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod", "Modality"),
    *("PositionReferenceIndicator", "PixelSpacing"),
)
_FUNCTIONAL_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
# value of a plane -> (sequence with the value in multi-frame images, keyword, count of numbers)
_PLANE_ELEMENTS = {
    "position": ("PlanePositionSequence", "ImagePositionPatient", 3),
    "orientation": ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
    "spacing": ("PixelMeasuresSequence", "PixelSpacing", 2),
}


@dataclass(frozen=True)
class Plane:
    """Position of a frame in the patient, in mm.

    Attributes:
        position: (x, y, z) of the center of the first pixel.
        orientation: the directions of a row and of a column, two unit vectors (x, y, z).
        spacing: distance between rows, and between columns.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]

    @property
    def distance(self) -> float:
        """Distance from the origin along the normal of the plane, in mm."""
        return float(np.dot(np.cross(self.orientation[:3], self.orientation[3:]), self.position))


@dataclass(frozen=True)
class DicomImage:
    """A DICOM image file without its pixels.

    Attributes:
        name: its name in messages.
        common: the elements that it shares with all objects of its study, in valid form.
        details: elements of its equipment, compression and pixel spacing, in valid form.
        uids: StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID, SOPClassUID and FrameOfReferenceUID (may be "").
        number: its InstanceNumber, at least 1.
        size: (frames, H, W).
        planes: one per frame, or empty if it has no complete position in the patient.
        thickness: SliceThickness in mm, or None if it is unknown.
        slice_spacing: SpacingBetweenSlices in mm, or None if it is unknown.
        slide: the header of a whole-slide image, or None. Frames of a slide are tiles, which `planes` cannot describe.
    """

    name: str
    common: Dataset
    details: Dataset
    uids: dict[str, str]
    number: int
    size: tuple[int, int, int]
    planes: tuple[Plane, ...]
    thickness: float | None
    slice_spacing: float | None
    slide: Dataset | None


@dataclass(frozen=True)
class ImageRows:
    """A DICOM image with its file and its rows of the results."""

    image: DicomImage
    source: SourceFile
    rows: list[Row]


def read_dicom_image(source: SourceFile, reader: Reader, repairs: Repairs) -> DicomImage | None:
    """Return a DICOM image, or None for a file of another format.

    Args:
        source: the file.
        reader: opens it.
        repairs: counts the values that had to be changed.

    Raises:
        ImageError: the file cannot be read, or it has no UIDs of its study, its series and itself.
    """
    if (data := _read_if_dicom(source, reader)) is None:
        return None
    num_frames = count_frames(io.BytesIO(data), source.name)
    try:
        with quiet():
            header = read_header(
                io.BytesIO(data), lambda tag, vr, length: tag in PIXEL_DATA_TAGS, [], MAX_LISTED_BYTES, source.name
            )
            return _read_image(header, num_frames, source.name, repairs)
    except ImageError:
        raise
    except Exception as error:  # the text of the error can quote patient data
        raise ImageError("corrupt", f"{source.name}: its DICOM header is damaged ({type(error).__name__})") from None


def _read_if_dicom(source: SourceFile, reader: Reader) -> bytes | None:
    """Return the content of a DICOM file, whatever its name is, or None for a file of another format.

    Of a file whose name states another format, only the start is read first.
    """
    states_other = kind_of(source.member or source.uri) not in ("dicom", UNNAMED, None)
    if states_other and not is_dicom(source.read_head(reader)[:HEAD_BYTES]):
        return None
    data = source.read(reader)
    return data if is_dicom(data[:HEAD_BYTES]) else None


def _read_image(header: Dataset, num_frames: int, name: str, repairs: Repairs) -> DicomImage:
    number = read_numbers(header, "InstanceNumber", 1) or [1]
    return DicomImage(
        name=name,
        common=copy_common_elements(header, repairs),
        details=copy_elements(header, _DETAILS, repairs),
        uids=_read_uids(header, name, repairs),
        number=int(min(max(1, number[0]), 2**31 - 1)),
        size=(num_frames, int(header.Rows), int(header.Columns)),
        planes=_read_planes(header, num_frames, repairs),
        thickness=_read_depth(header, "SliceThickness"),
        slice_spacing=_read_depth(header, "SpacingBetweenSlices"),
        slide=header if header.get("SOPClassUID") == uid.VLWholeSlideMicroscopyImageStorage else None,
    )


def _read_uids(header: Dataset, name: str, repairs: Repairs) -> dict[str, str]:
    """Return the UIDs. A missing UID of the object or its class is taken from the file's meta information.

    Raises:
        ImageError: a UID is missing. Without it, no viewer can connect a segmentation with its image.
    """
    uids = {"FrameOfReferenceUID": next(iter(read_texts(header, "FrameOfReferenceUID")), "").strip()}
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        texts = read_texts(header, keyword)
        if not texts and keyword.startswith("SOP"):
            texts = read_texts(header.file_meta, f"MediaStorage{keyword}")
            repairs.add(keyword, "taken from the file's meta information")
        if not texts:
            raise ImageError("corrupt", f"{name} lacks what a DICOM segmentation needs ({keyword})")
        uids[keyword] = texts[0].strip()
    return uids


def _read_planes(header: Dataset, num_frames: int, repairs: Repairs) -> tuple[Plane, ...]:
    """Return the plane of each frame, or no plane if an element is missing or invalid for a frame.

    Nothing is invented: an object that refers to the frames of its source needs no position of its own.
    """
    per_frame, shared = (header.get(keyword) for keyword in _FUNCTIONAL_GROUPS)
    planes = []
    for frame in range(num_frames):
        groups = [*(per_frame or ())[frame : frame + 1], *(shared or ())[:1]]
        values = {name: _read_plane_element(header, groups, *element) for name, element in _PLANE_ELEMENTS.items()}
        if not values["position"]:
            return ()
        if not header.get("FrameOfReferenceUID"):
            repairs.add("FrameOfReferenceUID", "missing, so the position was left out,")
            return ()
        if values["orientation"] and not _is_orthonormal(values["orientation"]):
            values["orientation"] = None
        for name, value in values.items():
            if not value or (name == "spacing" and min(value) <= 0):
                repairs.add(_PLANE_ELEMENTS[name][1], "missing or invalid, so the position was left out,")
                return ()
        planes.append(Plane(**{name: tuple(value or ()) for name, value in values.items()}))
    return tuple(planes)


def _read_plane_element(
    header: Dataset, groups: list[Dataset], sequence: str, keyword: str, count: int
) -> list[float] | None:
    """Return the numbers of an element: from a frame's groups, from the shared groups, or from the header."""
    homes: list[Any] = [items[0] for group in groups if (items := group.get(sequence))]
    return next((numbers for home in [*homes, header] if (numbers := read_numbers(home, keyword, count))), None)


def _is_orthonormal(orientation: list[float]) -> bool:
    axes = np.reshape(orientation, (2, 3))
    return bool(np.allclose(axes @ axes.T, np.eye(2), atol=0.01))


def _read_depth(header: Dataset, keyword: str) -> float | None:
    """Return a positive number of mm, from the groups of the first frame or from the header; None if there is none."""
    groups = [items[0] for sequence in _FUNCTIONAL_GROUPS if (items := header.get(sequence))]
    numbers = _read_plane_element(header, groups, "PixelMeasuresSequence", keyword, 1)
    return numbers[0] if numbers and numbers[0] > 0 else None
