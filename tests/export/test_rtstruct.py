"""DICOM structure sets, read again with pydicom and filled with matplotlib, which takes no part in writing them."""

import numpy as np
import pydicom
import pytest
from highdicom._standard_utils import get_iod_module_map
from matplotlib.path import Path as Polygon
from pydicom import uid
from scipy import ndimage

from tests.export.test_dicom_seg import AXIAL, SECRET, SHAPE, check_required, enhanced, make, masks_of, slices
from tests.export.test_volumes import row, run, write  # noqa: F401 - write is a fixture
from vlsm.export.rtstruct import trace

OBLIQUE = [0.8, 0.6, 0, 0, 0, -1]


def fill(polygons, shape):
    """(H, W) bool: the pixels whose center an odd number of polygons holds."""
    rows, columns = np.indices(shape)
    centers = np.stack([columns.ravel(), rows.ravel()], axis=1)
    inside = [Polygon(polygon).contains_points(centers).reshape(shape) for polygon in polygons]
    return np.logical_xor.reduce([np.zeros(shape, bool), *inside])


@pytest.fixture
def export(tmp_path, write):  # noqa: F811
    def export(*datasets, masks=None, code=0):
        rows = []
        for number, dataset in enumerate(datasets):
            path = tmp_path / f"{number}.dcm"
            dataset.save_as(path, enforce_file_format=False)
            for frame, mask in enumerate(masks_of(dataset) if masks is None else masks):
                selector = f"frame={frame}" if dataset.get("NumberOfFrames", 1) > 1 else None
                rows.append(row(path, mask, "полип", selector))
        names = run(write(rows, prompts=["полип"]), "rtstruct", tmp_path / "x", code=code)
        return [pydicom.dcmread(tmp_path / "x" / name) for name in names]

    return export


def polygons_of(structures, sop_instance_uid, position, orientation, frame=None):
    """The polygons (points, 2) of (column, row) of the only structure in a frame."""
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    polygons = []
    for contour in structures.ROIContourSequence[0].get("ContourSequence", []):
        (reference,) = contour.ContourImageSequence
        if (reference.ReferencedSOPInstanceUID, reference.get("ReferencedFrameNumber")) == (sop_instance_uid, frame):
            offsets = np.reshape(contour.ContourData, (-1, 3)).astype(float) - position
            np.testing.assert_allclose(offsets @ np.cross(across, down), 0, atol=1e-3)  # all points are in the plane
            assert contour.NumberOfContourPoints == len(offsets)
            polygons.append(np.stack([offsets @ across / 0.75, offsets @ down / 0.5], axis=1))
    return polygons


def check(structures):
    modules = [one["key"] for one in get_iod_module_map()["rt-structure-set"] if one["usage"] == "M"]
    assert check_required(structures, modules) == []
    assert structures.StructureSetROISequence[0].ROIName == "полип"


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("depths", [(0, 3, 6), (6, 0, 3), (5,)], ids=str)
def test_the_contours_of_a_series_are_its_masks(export, depths, orientation):
    sources = slices(*depths, ImageOrientationPatient=orientation)
    (structures,) = export(*sources)
    check(structures)
    assert str(structures.PatientName) == f"{SECRET}^Anna"
    (frame_of_reference,) = structures.ReferencedFrameOfReferenceSequence
    assert frame_of_reference.FrameOfReferenceUID == "1.2.9"
    series = frame_of_reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    named = {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence}
    assert named == {source.SOPInstanceUID for source in sources}
    for source in sources:
        polygons = polygons_of(structures, source.SOPInstanceUID, source.ImagePositionPatient, orientation)
        np.testing.assert_array_equal(fill(polygons, SHAPE), masks_of(source)[0])


def test_the_contours_of_frames_name_their_frames(export):
    source = enhanced(([0, 0, 4], AXIAL), ([0, 0, 0], AXIAL))
    (structures,) = export(source)
    check(structures)
    for number, mask in enumerate(masks_of(source), start=1):
        position = source.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0].ImagePositionPatient
        polygons = polygons_of(structures, source.SOPInstanceUID, position, AXIAL, number)
        np.testing.assert_array_equal(fill(polygons, SHAPE), mask)


def test_an_empty_mask_is_a_structure_without_contours(export):
    (structures,) = export(make(), masks=np.zeros((1, *SHAPE), np.uint8))
    check(structures)
    assert "ContourSequence" not in structures.ROIContourSequence[0]


def test_an_image_without_a_position_has_no_structure_set(export, caplog):
    assert export(make(ImagePositionPatient=None, SOPClassUID=uid.SecondaryCaptureImageStorage), code=1) == []
    assert "0.dcm has no complete position in the patient" in caplog.text
    assert SECRET not in caplog.text


def test_polygons_filled_are_the_mask_again():
    random = np.random.default_rng(0)
    masks = [(random.random(random.integers(1, 20, 2)) < random.random()).astype(np.uint8) for _ in range(60)]
    masks += [ndimage.gaussian_filter(random.random((60, 50)), 3) > 0.5 for _ in range(3)]
    rings = np.zeros((9, 9), np.uint8)
    rings[1:8, 1:8], rings[3:6, 3:6], rings[4, 4] = 1, 0, 1
    for mask in [*masks, rings, np.ones((3, 4), np.uint8), np.ones((1, 1), np.uint8)]:
        polygons = trace(mask)
        np.testing.assert_array_equal(fill(polygons, mask.shape), mask)
        assert len(polygons) == ndimage.label(mask)[1]  # holes have no polygon of their own
