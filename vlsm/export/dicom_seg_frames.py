"""Writes the frames of a DICOM segmentation that highdicom refuses: without a position, or several at the same one."""

import copy

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset

from vlsm.export.dicom_source import DicomImage, Plane


def functional_groups(plane: Plane, thickness: float | None) -> Dataset:
    """Return the three functional groups that describe a plane. The thickness is in mm."""
    groups, patient = Dataset(), hd.CoordinateSystemNames.PATIENT
    groups.PlanePositionSequence = hd.PlanePositionSequence(patient, plane.position)
    groups.PlaneOrientationSequence = hd.PlaneOrientationSequence(patient, plane.orientation)
    groups.PixelMeasuresSequence = hd.PixelMeasuresSequence(plane.spacing, thickness)
    return groups


def add_frames(seg: hd.seg.Segmentation, pixels: np.ndarray, images: list[DicomImage], thickness: float | None) -> None:
    """Replace the frames of a SEG of one frame per segment by the masks of all frames of the images.

    The frames of an ultrasound loop, for example, have no position; the SEG identifies them by their number in the
    source file. Frames at the same position, such as phases of a heart, keep their positions.

    Args:
        seg: segmentation of the first frame of the first image, in which no segment is empty.
        pixels: (frames, H, W, segments) of 0 and 1.
        images: the source images, all with planes or all without.
        thickness: slice thickness in mm.
    """
    pairs = [(s, f) for s in range(pixels.shape[3]) for f in range(pixels.shape[0])]
    pairs = [(s, f) for s, f in pairs if pixels[f, :, :, s].any()] or pairs  # all pairs if every mask is empty
    sources = [(image, number) for image in images for number in range(1, image.size[0] + 1)]
    planes = [plane for image in images for plane in image.planes]
    own_groups = _choose_own_groups(seg, planes)
    templates, items = list(seg.PerFrameFunctionalGroupsSequence), []
    for segment, frame in pairs:
        image, number = sources[frame]
        item = copy.deepcopy(templates[segment])
        item.FrameContentSequence[0].DimensionIndexValues = [segment + 1, frame + 1]
        item.FrameContentSequence[0].FrameLabel = f"source frame {frame + 1}"
        reference = item.DerivationImageSequence[0].SourceImageSequence[0]
        reference.ReferencedSOPInstanceUID = image.uids["SOPInstanceUID"]
        if image.size[0] > 1:
            reference.ReferencedFrameNumber = number
        if planes:
            groups = functional_groups(planes[frame], thickness)
            for keyword in own_groups:
                item.add(groups[keyword])
        items.append(item)
    _index_by_frame(seg)
    _refer_to(seg, images)
    seg.PerFrameFunctionalGroupsSequence = items
    seg.NumberOfFrames = len(items)
    bits = np.packbits(
        np.stack([pixels[frame, :, :, segment] for segment, frame in pairs]), bitorder="little"
    ).tobytes()
    seg.PixelData = bits + b"\0" * (len(bits) % 2)
    seg.SegmentsOverlap = "YES" if (pixels.sum(axis=3, dtype=np.uint16) > 1).any() else "NO"


def _choose_own_groups(seg: hd.seg.Segmentation, planes: list[Plane]) -> list[str]:
    """Return the groups that each frame needs for itself, and remove them from the groups that all frames share."""
    own_groups = ["PlanePositionSequence"]
    for keyword, values in (
        ("PlaneOrientationSequence", {plane.orientation for plane in planes}),
        ("PixelMeasuresSequence", {plane.spacing for plane in planes}),
    ):
        if len(values) > 1:
            own_groups.append(keyword)
            del seg.SharedFunctionalGroupsSequence[0][keyword]
    return own_groups


def _index_by_frame(seg: hd.seg.Segmentation) -> None:
    """Make segment and frame label the two dimensions of the SEG. Positions may occur twice, labels do not."""
    segment_dimension = seg.DimensionIndexSequence[0]
    frame_dimension = copy.deepcopy(segment_dimension)
    frame_dimension.DimensionIndexPointer, frame_dimension.FunctionalGroupPointer = 0x00209453, 0x00209111
    frame_dimension.DimensionDescriptionLabel = "Frame Label"
    seg.DimensionIndexSequence = [segment_dimension, frame_dimension]


def _refer_to(seg: hd.seg.Segmentation, images: list[DicomImage]) -> None:
    """List all images as sources of the SEG."""
    references = []
    for image in images:
        reference = Dataset()
        reference.ReferencedSOPClassUID = image.uids["SOPClassUID"]
        reference.ReferencedSOPInstanceUID = image.uids["SOPInstanceUID"]
        references.append(reference)
    seg.SourceImageSequence = references
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = copy.deepcopy(references)
