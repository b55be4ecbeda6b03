"""DICOM images with labels: segmentations by our export and by highdicom, stored values, and label volumes."""

import json
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.sr.codedict import codes

from tests.datasets.test_volumes import LABELS, examples, turn, write_list
from tests.export.test_dicom_seg import SECRET, SHAPE, make
from tests.export.test_volumes import checkers, row, run, write  # noqa: F401 - write is a fixture
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ManifestError


def save(path, dataset):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def slices(folder, count=3, **elements):
    """The files of a CT series, named in another order than their positions."""
    paths = []
    for number in range(count):
        made = make(SOPInstanceUID=f"1.2.3.{number + 10}", ImagePositionPatient=[10, 20, 2.0 * number], **elements)
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        paths.append(save(folder / f"{count - number}.dcm", made))
    return paths


def table(folder, *rows, header="image_uri,mask_uri,split"):
    (folder / "list.csv").write_text("\n".join([header, *(",".join(map(str, one)) for one in rows)]) + "\n")
    return str(folder / "list.csv")


def masks(records, **settings):
    """The mask of each record, by image, frame and prompt."""
    return {
        (record.image_uri.rpartition("/")[2], record.image_selector, record.prompts["p1"][0]): example.target.mask
        for record, example in zip(records, examples(records, **settings), strict=True)
    }


def equal(read, expected):
    assert read.keys() == expected.keys()
    for key, mask in expected.items():
        np.testing.assert_array_equal(read[key], mask)


def test_our_export_of_a_series_is_a_label_again(tmp_path, write, caplog):  # noqa: F811
    paths = slices(tmp_path / "series")
    expected = {(path.name, None, p): checkers(SHAPE, n) for n, path in enumerate(paths) for p in ("polyp", "fold")}
    expected["2.dcm", None, "fold"] = np.zeros(SHAPE, np.uint8)
    rows = [row(tmp_path / "series" / name, mask, prompt) for (name, _, prompt), mask in expected.items()]
    [seg] = run(write(rows), "dicom-seg-series", tmp_path / "x")
    path = table(tmp_path, ("series", f"x/{seg}", "train"))
    records = read_dataset("mine", path, DatasetSettings(absent_classes="empty"))
    equal(masks(records), expected)
    assert {record.group for record in records} == {f"{tmp_path}/series"}
    caplog.set_level("INFO")
    shown = read_dataset("mine", path)
    assert "1 pairs of a DICOM frame and a class are left out" in caplog.text
    equal(masks(shown), {key: mask for key, mask in expected.items() if mask.any()})
    assert shown[0].where == f"{path}, row 1, segment 'polyp', 1.dcm"


def test_our_export_of_a_loop_without_positions_is_a_label_again(tmp_path, write):  # noqa: F811
    """20 pixels a frame: the frames of the segmentation do not begin at bytes."""
    loop = make(NumberOfFrames=3, ImagePositionPatient=None, SOPClassUID=uid.UltrasoundMultiFrameImageStorage)
    save(tmp_path / "loop.dcm", loop)
    expected = {("loop.dcm", f"frame={frame}", "polyp"): checkers(SHAPE, frame) for frame in range(3)}
    rows = [row(tmp_path / name, mask, prompt, selector) for (name, selector, prompt), mask in expected.items()]
    [seg] = run(write(rows), "dicom-seg", tmp_path / "x")
    equal(masks(read_dataset("mine", table(tmp_path, ("loop.dcm", f"x/{seg}", "train")))), expected)


def segment(paths, pixels, kind="BINARY", labels=("liver", "spleen"), **more):
    """A segmentation by highdicom of the files, in the order of their positions."""
    sources = [pydicom.dcmread(path) for path in paths]
    for source in sources:
        source.update({keyword: "" for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")})
        source.StudyID = source.StudyDate = source.StudyTime = source.AccessionNumber = (
            source.ReferringPhysicianName
        ) = ""
    descriptions = [
        hd.seg.SegmentDescription(number, label, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
        for number, label in enumerate(labels, start=1)
    ]
    return hd.seg.Segmentation(
        sources, pixels, kind, descriptions, "1.2.8", 1, "1.2.8.1", 1, "maker", "model", "1", "0", **more
    )


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_segmentations_of_every_kind(tmp_path, kind):
    paths = slices(tmp_path / "series")
    labels = np.zeros((3, *SHAPE), np.uint8)
    labels[0, 1:3, 2:4], labels[1, 0, :], labels[1, 3, 1] = 1, 2, 1
    pixels = np.stack([labels == 1, labels == 2], axis=-1).astype(np.float32)
    if kind == "FRACTIONAL":  # less than half is background
        made = segment(paths, pixels * 0.6 + (pixels == 0) * 0.2, kind, max_fractional_value=100)
    else:
        made = segment(paths, labels, kind)
    save(tmp_path / "seg.dcm", made)
    expected = {("3.dcm", None, "liver"): labels[0] == 1, ("2.dcm", None, "liver"): labels[1] == 1}
    expected["2.dcm", None, "spleen"] = labels[1] == 2
    equal(masks(read_dataset("mine", table(tmp_path, ("series", "seg.dcm", "train")))), expected)
    one_by_one = table(tmp_path, *((f"series/{path.name}", "seg.dcm", "train") for path in paths))
    records = read_dataset("mine", one_by_one)
    equal(masks(records), expected)
    assert {record.group for record in records} == {f"{tmp_path}/seg.dcm"}


def test_frames_without_references_are_found_by_their_position(tmp_path):
    paths = slices(tmp_path / "series")
    labels = np.stack([checkers(SHAPE, number) for number in range(3)])
    made = segment(paths, labels, labels=["liver"])
    for item in made.PerFrameFunctionalGroupsSequence:
        del item.DerivationImageSequence
    save(tmp_path / "seg.dcm", made)
    expected = {(path.name, None, "liver"): mask for path, mask in zip(paths, labels, strict=True)}
    equal(masks(read_dataset("mine", table(tmp_path, ("series", "seg.dcm", "train")))), expected)


def test_frames_of_images_that_are_missing_are_told(tmp_path, caplog):
    paths = slices(tmp_path / "series")
    save(tmp_path / "seg.dcm", segment(paths, np.ones((3, *SHAPE), np.uint8), labels=["liver"]))
    paths[1].unlink()
    assert len(read_dataset("mine", table(tmp_path, ("series", "seg.dcm", "train")))) == 2
    assert "seg.dcm: 1 of 3 frames are of images that are not in" in caplog.text


def test_damaged_segmentations_and_images_are_errors_of_ours(tmp_path):
    """No message quotes the patient."""
    paths, rng = slices(tmp_path / "series"), np.random.default_rng(0)
    save(tmp_path / "seg.dcm", segment(paths, np.ones((3, *SHAPE), np.uint8), labels=["liver"]))
    path, seen = table(tmp_path, ("series", "seg.dcm", "train")), set()
    for file in (tmp_path / "seg.dcm", paths[0]):
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(30):
            damaged = whole.copy()
            damaged[rng.integers(132, len(whole), 10)] = rng.integers(0, 256, 10)
            file.write_bytes(damaged.tobytes())
            try:
                seen.add(len(read_dataset("mine", path)))
            except ManifestError as error:
                seen.add("error")
                assert SECRET not in str(error)
        file.write_bytes(whole.tobytes())
    assert {"error", 3} <= seen


def test_the_prompt_of_a_record_chooses_the_segment(tmp_path):
    paths = slices(tmp_path / "series", 1)
    save(tmp_path / "seg.dcm", segment(paths, np.stack([checkers((1, *SHAPE), n) for n in (0, 1)], axis=-1)))
    save(tmp_path / "one.dcm", segment(paths, checkers((1, *SHAPE), 2), labels=["x"]))
    header = "image_uri,mask_uri,split,prompt"
    path = table(
        tmp_path, ("series", "seg.dcm", "val", "Spleen"), ("series", "one.dcm", "val", "a tumour"), header=header
    )
    expected = {("1.dcm", None, "Spleen"): checkers(SHAPE, 1), ("1.dcm", None, "a tumour"): checkers(SHAPE, 2)}
    equal(masks(read_dataset("mine", path)), {key: mask.reshape(SHAPE) for key, mask in expected.items()})
    path = table(tmp_path, ("series", "seg.dcm", "val", "kidney"), header=header)
    with pytest.raises(ManifestError, match="segments 'liver', 'spleen'; none is a prompt of the record"):
        read_dataset("mine", path)


def test_a_segmentation_that_does_not_fit_is_named(tmp_path):
    paths = slices(tmp_path / "series")
    made = segment(paths, np.ones((3, *SHAPE), np.uint8), labels=["liver"])
    save(tmp_path / "seg.dcm", made)
    other = make(SOPInstanceUID="1.2.7", SeriesInstanceUID="1.2.7.1", ImagePositionPatient=None)
    save(tmp_path / "other.dcm", other)
    with pytest.raises(ManifestError, match="seg.dcm is a segmentation of other images than .*other.dcm"):
        read_dataset("mine", table(tmp_path, ("other.dcm", "seg.dcm", "train")))
    moved = make(SOPInstanceUID="1.2.3.10", ImagePositionPatient=[11, 20, 0])
    save(tmp_path / "moved.dcm", moved)
    with pytest.raises(ManifestError, match="the pixels of frame=. are at other places than those of .*moved.dcm"):
        read_dataset("mine", table(tmp_path, ("moved.dcm", "seg.dcm", "train")))
    for item in (*made.PerFrameFunctionalGroupsSequence, *made.SharedFunctionalGroupsSequence):
        item.pop("SegmentIdentificationSequence", None)
    save(tmp_path / "vague.dcm", made)
    with pytest.raises(ManifestError, match="vague.dcm: its frame 1 does not say which segment it shows"):
        read_dataset("mine", table(tmp_path, ("series", "vague.dcm", "train")))
    save(tmp_path / "series" / "copy.dcm", make(SOPInstanceUID="1.2.3.10"))
    with pytest.raises(ManifestError, match="copy.dcm and .*3.dcm have the same SOP Instance UID"):
        read_dataset("mine", table(tmp_path, ("series", "seg.dcm", "train")))


def secondary(values, **elements):
    made = make(SOPClassUID=uid.SecondaryCaptureImageStorage, WindowCenter=1, WindowWidth=1, RescaleSlope=2, **elements)
    made.PixelData = values.astype(np.uint8).tobytes()
    return made


def test_stored_values_of_a_dicom_file_are_a_mask(tmp_path):
    save(tmp_path / "a.dcm", make())
    save(tmp_path / "m.dcm", secondary(checkers(SHAPE) * 128))
    [record] = read_dataset("mine", write_list(tmp_path, ("a.dcm", "m.dcm")))
    np.testing.assert_array_equal(examples([record])[0].target.mask, checkers(SHAPE))
    save(tmp_path / "a.dcm", make(NumberOfFrames=2))
    with pytest.raises(ManifestError, match="m.dcm has 1 frames and its image .*a.dcm has 2"):
        read_dataset("mine", write_list(tmp_path, ("a.dcm", "m.dcm")))
    save(tmp_path / "m.dcm", secondary(checkers((2, *SHAPE)) * 128, NumberOfFrames=2))
    records = read_dataset("mine", write_list(tmp_path, ("a.dcm", "m.dcm")))
    assert [record.image_selector for record in records] == ["frame=0", "frame=1"]
    for example, mask in zip(examples(records), checkers((2, *SHAPE)), strict=True):
        np.testing.assert_array_equal(example.target.mask, mask)


ORIENTATIONS = {"axial": [1, 0, 0, 0, 1, 0], "sagittal": [0, 1, 0, 0, 0, -1], "flipped": [-1, 0, 0, 0, 1, 0]}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("codes_of_label", ["LPS", "RAS", "PIR"])
def test_a_label_volume_is_turned_as_its_series(tmp_path, orientation, codes_of_label):
    """The images show the label in white: voxel (column, row, slice) of the series is the label's."""
    across, down = np.reshape(ORIENTATIONS[orientation], (2, 3))
    normal = np.cross(across, down)
    for number in range(LABELS.shape[2]):
        plane = LABELS[:, :, number].T
        made = make(
            SOPInstanceUID=f"1.2.3.{number + 10}",
            ImagePositionPatient=list(np.array([5.0, 6, 7]) + 2.5 * number * normal),
            ImageOrientationPatient=ORIENTATIONS[orientation],
            PixelSpacing=[0.8, 0.7],
            Rows=plane.shape[0],
            Columns=plane.shape[1],
        )
        made.PixelData = ((plane > 0) * 200).astype(np.uint8).tobytes()
        save(tmp_path / "series" / f"{9 - number}.dcm", made)
    affine = np.eye(4)
    affine[:3] = np.column_stack([across * 0.7, down * 0.8, normal * 2.5, [5, 6, 7]])
    image = nib.Nifti1Image(LABELS, np.diag([-1, -1, 1, 1]) @ affine)
    nib.save(turn(image, codes_of_label), tmp_path / "label.nii.gz")
    path = write_list(tmp_path, ("series/", "label.nii.gz"))
    for axis in ("axial", "coronal"):  # directions of slices do not matter for a series
        records = read_dataset("mine", path, DatasetSettings(slices=axis))
        assert [record.image_uri.rpartition("/")[2] for record in records] == ["8.dcm", "7.dcm", "6.dcm"]
        read = examples(records)
        assert sum(int(example.target.mask.sum()) for example in read) == np.count_nonzero(LABELS)
        for example in read:
            np.testing.assert_array_equal(example.target.mask, example.image[:, :, 0] > 127)
    assert len(read_dataset("mine", path, DatasetSettings(absent_classes="empty"))) == 5
    (tmp_path / "series" / "7.dcm").unlink()
    with pytest.raises(ManifestError, match="slices are not parallel at equal distances"):
        read_dataset("mine", path)
    (tmp_path / "series" / "8.dcm").unlink()
    (tmp_path / "series" / "9.dcm").unlink()
    with pytest.raises(ManifestError, match="label.nii.gz has .* voxels.* resample the label"):
        read_dataset("mine", path)


def test_a_folder_without_images_and_a_series_without_positions_are_named(tmp_path):
    (tmp_path / "series").mkdir()
    nib.save(nib.Nifti1Image(LABELS, np.eye(4)), tmp_path / "label.nii")
    path = write_list(tmp_path, ("series", "label.nii"))
    with pytest.raises(ManifestError, match="series holds no DICOM image"):
        read_dataset("mine", path)
    (tmp_path / "series" / "note.txt").write_text("x")
    save(tmp_path / "series" / "a.dcm", make(ImagePositionPatient=None))
    with pytest.raises(ManifestError, match="must hold one series of equal size with positions"):
        read_dataset("mine", path)


def attributes(number, label):
    """The description of a segment for dcmqi."""
    category, kind = (
        {"CodeValue": value, "CodingSchemeDesignator": "SCT", "CodeMeaning": meaning}
        for value, meaning in (("85756007", "Tissue"), ("10200004", "Liver"))
    )
    return {
        "labelID": number,
        "SegmentLabel": label,
        "SegmentDescription": label,
        "SegmentAlgorithmType": "MANUAL",
        "SegmentedPropertyCategoryCodeSequence": category,
        "SegmentedPropertyTypeCodeSequence": kind,
    }


def test_a_segmentation_of_dcmqi_is_a_label(tmp_path):
    """It has frames without a pixel of their segment, between frames with one."""
    program = Path(sys.executable).with_name("itkimage2segimage")
    if not program.exists():
        pytest.skip("dcmqi is not installed")
    study = {"StudyDate": "20200101", "StudyTime": "101010", "StudyID": "1", "SeriesNumber": 1}
    for number in range(LABELS.shape[2]):
        made = make(
            SOPInstanceUID=f"1.2.3.{number + 10}",
            ImagePositionPatient=[5, 6, 7 + 2.5 * number],
            PixelSpacing=[0.8, 0.7],
            Rows=LABELS.shape[1],
            Columns=LABELS.shape[0],
            **study,
        )
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        made.PixelData = bytes(LABELS.shape[0] * LABELS.shape[1])
        save(tmp_path / "series" / f"{number}.dcm", made)
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    affine[:3, 3] = -5, -6, 7
    nib.save(nib.Nifti1Image(LABELS, affine), tmp_path / "label.nii.gz")
    described = {"ContentCreatorName": "x", "SeriesDescription": "x", "SeriesNumber": "3", "InstanceNumber": "1"}
    described |= {"ContentLabel": "SEGMENTATION", "ContentDescription": "x", "BodyPartExamined": ""}
    described["segmentAttributes"] = [[attributes(1, "liver"), attributes(2, "tumour")]]
    (tmp_path / "meta.json").write_text(json.dumps(described))
    files = {"inputImageList": "label.nii.gz", "inputDICOMDirectory": "series", "outputDICOM": "seg.dcm"}
    words = [word for key, name in files.items() for word in (f"--{key}", str(tmp_path / name))]
    words += ["--inputMetadata", str(tmp_path / "meta.json")]
    subprocess.run([str(program), *words], check=True, capture_output=True)
    expected = {
        (f"{number}.dcm", None, label): LABELS[:, :, number].T == value
        for number in range(LABELS.shape[2])
        for value, label in ((1, "liver"), (2, "tumour"))
    }
    path = table(tmp_path, ("series", "seg.dcm", "train"))
    equal(masks(read_dataset("mine", path)), {key: mask for key, mask in expected.items() if mask.any()})
