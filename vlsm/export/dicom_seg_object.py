"""Builds a DICOM segmentation with highdicom.

highdicom copies elements of its source images, and refuses images of unknown classes as well as frames of which two
have the same position. It gets stand-ins for the images, with valid elements only. This module writes the elements of
the patient and the study, the true references, and the frames that highdicom refuses.
"""

from dataclasses import replace

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import EnhancedCTImageStorage, SecondaryCaptureImageStorage
from pydicom.valuerep import DS

from vlsm.errors import ImageError
from vlsm.export.dicom_objects import MAX_LABEL, Algorithm, derive_uid, unique_labels
from vlsm.export.dicom_seg_frames import add_frames, functional_groups
from vlsm.export.dicom_source import DicomImage, Plane
from vlsm.export.dicom_values import TYPE_2, UTF_8, Repairs, read_numbers
from vlsm.images.dicom_header import quiet
from vlsm.version import __version__

_SERIES_NUMBER = 1000  # scanners use much smaller numbers
_NOMINAL_THICKNESS, _NOMINAL_SLIDE_THICKNESS = 1.0, 0.001  # mm
_SLIDE_ELEMENTS = (
    *("TotalPixelMatrixRows", "TotalPixelMatrixColumns", "TotalPixelMatrixOriginSequence", "ImageOrientationSlide"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionOrganizationType"),
    *("TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths", "OpticalPathSequence"),
)


def make_segmentation(
    images: list[DicomImage], masks: dict[str, np.ndarray], algorithm: Algorithm, repairs: Repairs
) -> hd.seg.Segmentation:
    """Return the SEG of an image, or of several single-frame images of a series.

    Args:
        images: images of the same class and size; several only if each is one frame with a plane.
        masks: (frames, H, W) uint8 of 0 and 1, for each prompt.
        algorithm: what made the masks.
        repairs: counts slice thicknesses that are not known.

    Raises:
        ImageError: highdicom cannot build it.
    """
    pixels = np.stack(list(masks.values()), axis=-1)  # (frames, H, W, segments)
    planes = [plane for image in images for plane in image.planes]
    try:
        with quiet():
            slice_spacing = _measure_slice_spacing(images[0], planes)
            thickness = _choose_thickness(images[0], slice_spacing, repairs)
            seg = _build_slide(images[0], pixels, list(masks), algorithm, repairs)
            if seg is None and (stack := _find_stack(planes)):
                seg = _build(_stand_in_stack(images, stack, thickness), pixels, list(masks), algorithm)
            elif seg is None:
                first = _stand_in(images[0], planes[:1], thickness)
                seg = _build([first], np.ones_like(pixels[:1]), list(masks), algorithm)
                add_frames(seg, pixels, images, thickness)
            _finish(seg, images, list(masks), algorithm)
            _set_slice_spacing(seg, slice_spacing)
            return seg
    # highdicom raises many types of errors, and their texts can quote patient data. Attribute names are safe.
    except Exception as error:
        reason = getattr(error, "name", None) or type(error).__name__
        name = images[0].name
        raise ImageError("corrupt", f"{name} lacks what a DICOM segmentation needs ({reason})") from None


def _choose_thickness(image: DicomImage, slice_spacing: float | None, repairs: Repairs) -> float | None:
    """Return the slice thickness in mm. highdicom requires it of images with a position, the standard of volumes only.

    If the image does not tell it, it is the distance between slices, else 1 mm.
    """
    if image.thickness or not image.planes:
        return image.thickness
    repairs.add("SliceThickness", "set to the distance of slices" if slice_spacing else "set to 1 mm")
    return slice_spacing or _NOMINAL_THICKNESS


def _measure_slice_spacing(image: DicomImage, planes: list[Plane]) -> float | None:
    """Return the distance between slices in mm: of the planes if it is the same for all, else as the image tells it."""
    gaps = np.diff(np.unique([round(plane.distance, 3) for plane in planes]))
    if not gaps.size:
        return image.slice_spacing
    return float(gaps.mean()) if np.allclose(gaps, gaps.mean(), rtol=0.01) else None


def _find_stack(planes: list[Plane]) -> list[Plane]:
    """Return the planes if highdicom accepts them, with the orientation and spacing of the first, else no planes.

    highdicom accepts parallel planes with equal spacing, each at another distance.
    """
    axes = [(*plane.orientation, *plane.spacing) for plane in planes]
    distances = {round(plane.distance, 4) for plane in planes}
    if not planes or len(distances) < len(planes) or not np.allclose(axes, axes[0], rtol=0, atol=1e-4):
        return []
    return [replace(planes[0], position=plane.position) for plane in planes]


def _stand_in(image: DicomImage, planes: list[Plane], thickness: float | None) -> Dataset:
    """Return a single-frame image at the position of the first plane, or without a position if there is none."""
    stand_in = Dataset()
    stand_in.update(image.details)
    for keyword in TYPE_2:
        setattr(stand_in, keyword, None)
    for keyword, value in image.uids.items():
        if value:
            setattr(stand_in, keyword, value)
    stand_in.SOPClassUID, stand_in.SpecificCharacterSet = SecondaryCaptureImageStorage, UTF_8
    stand_in.Rows, stand_in.Columns = image.size[1:]
    if stand_in.get("LossyImageCompression") not in ("00", "01"):
        stand_in.pop("LossyImageCompression", None)
    stand_in.SliceThickness = thickness
    spacing = read_numbers(stand_in, "PixelSpacing", 2)
    if not (spacing and min(spacing) > 0 and thickness):  # highdicom cannot read a file with one but not the other
        stand_in.pop("PixelSpacing", None)
    for plane in planes[:1]:
        for group in functional_groups(plane, thickness):
            stand_in.update(group.value[0])
    return stand_in


def _stand_in_stack(images: list[DicomImage], planes: list[Plane], thickness: float | None) -> list[Dataset]:
    """Return single-frame images, or a multi-frame image whose frames share their orientation and spacing."""
    if len(images) == len(planes):
        return [_stand_in(image, [plane], thickness) for image, plane in zip(images, planes, strict=True)]
    stand_in = _stand_in(images[0], planes, thickness)
    stand_in.SOPClassUID, stand_in.NumberOfFrames = EnhancedCTImageStorage, len(planes)
    shared, frames = Dataset(), []
    for plane in planes:
        shared.update(functional_groups(plane, thickness))
        frames.append(Dataset())
        frames[-1].PlanePositionSequence = shared["PlanePositionSequence"].value
        del shared.PlanePositionSequence
    stand_in.SharedFunctionalGroupsSequence, stand_in.PerFrameFunctionalGroupsSequence = [shared], frames
    return [stand_in]


def _build_slide(
    image: DicomImage, pixels: np.ndarray, prompts: list[str], algorithm: Algorithm, repairs: Repairs
) -> hd.seg.Segmentation | None:
    """Return the SEG of a whole-slide image, with the positions of its tiles; None for another or an incomplete one."""
    if image.slide is None:
        return None
    stand_in = _stand_in(image, [], None)
    stand_in.SOPClassUID, stand_in.NumberOfFrames = image.uids["SOPClassUID"], image.size[0]
    try:
        for keyword in _SLIDE_ELEMENTS:
            if image.slide.get(keyword):
                setattr(stand_in, keyword, image.slide[keyword].value)
        _ = stand_in.FrameOfReferenceUID  # highdicom would write an empty one
        measures = stand_in.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        if not measures.get("SliceThickness"):
            repairs.add("SliceThickness", "set to 1 um")
            measures.SliceThickness = _NOMINAL_SLIDE_THICKNESS
        return _build([stand_in], pixels, prompts, algorithm)
    except Exception as error:  # highdicom raises many types of errors
        keyword = getattr(error, "name", None) or "TotalPixelMatrixOriginSequence"
        repairs.add(keyword, "missing or invalid, so the position was left out,")
        return None


def _build(
    stand_ins: list[Dataset], pixels: np.ndarray, prompts: list[str], algorithm: Algorithm
) -> hd.seg.Segmentation:
    name, _, version = algorithm.model.partition("@")
    identification = hd.AlgorithmIdentificationSequence(
        name=name.strip()[:MAX_LABEL] or "vlsm",
        family=codes.DCM.ArtificialIntelligence,
        version=version.strip()[:MAX_LABEL] or __version__,
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.Tissue,  # a free-text prompt has no code, so all segments are Tissue
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
        )
        for number, label in enumerate(unique_labels(prompts), start=1)
    ]
    return hd.seg.Segmentation(
        source_images=stand_ins,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=derive_uid("series", stand_ins[0].SeriesInstanceUID, algorithm.model, *prompts),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=derive_uid("instance", stand_ins[0].SOPInstanceUID, algorithm.model, *prompts),
        instance_number=1,
        manufacturer="vlsm",
        manufacturer_model_name="vlsm",
        software_versions=__version__,
        device_serial_number="0",
        content_date=algorithm.made_at.date(),
        content_time=algorithm.made_at.time(),
        content_label=f"{stand_ins[0].get('Modality') or 'OT'}"[:12] + "_SEG",
    )


def _finish(seg: hd.seg.Segmentation, images: list[DicomImage], prompts: list[str], algorithm: Algorithm) -> None:
    """Write the true references, the shared elements, and fixed values where highdicom writes the time or a random UID.

    Fixed values make repeated exports identical byte by byte.
    """
    for element in seg.iterall():
        if element.keyword == "ReferencedSOPClassUID":
            element.value = images[0].uids["SOPClassUID"]
    seg.update(images[0].common)
    seg.InstanceNumber, seg.ContentCreatorName = images[0].number, None  # nobody: a required element (type 2)
    seg.InstanceCreationDate, seg.InstanceCreationTime = seg.ContentDate, seg.ContentTime
    for equipment in seg.get("ContributingEquipmentSequence", [])[-1:]:  # the last item is highdicom's own
        equipment.ContributionDateTime = algorithm.made_at.strftime("%Y%m%d%H%M%S")
    facts = (*(image.uids["SOPInstanceUID"] for image in images), algorithm.model, *prompts)
    seg.SOPInstanceUID = seg.file_meta.MediaStorageSOPInstanceUID = derive_uid("instance", *facts)
    for item in (*seg.DimensionOrganizationSequence, *seg.get("DimensionIndexSequence", [])):
        item.DimensionOrganizationUID = derive_uid("dimensions", *facts)


def _set_slice_spacing(seg: hd.seg.Segmentation, slice_spacing: float | None) -> None:
    """Write the distance between slices in mm, or remove it: highdicom writes 1 mm for a single slice."""
    for measures in seg.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence", []):
        measures.pop("SpacingBetweenSlices", None)
        if slice_spacing:
            measures.SpacingBetweenSlices = DS(slice_spacing, auto_format=True)
