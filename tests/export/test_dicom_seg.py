"""DICOM segmentations of unusual sources, read again by highdicom, and by dcmqi where the source has a position."""

import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom._standard_utils import construct_module_tree, get_iod_module_map
from pydicom import uid
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag

from tests.export.test_volumes import checkers, row, run, write  # noqa: F401 - write is a fixture

SHAPE = (4, 5)
SECRET = "Geheim"


def items(**elements):
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return [item]


def make(**elements):
    """A CT slice. An element that is None is left out; bytes are stored as they are."""
    plain = {
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": "1.2.3.4.5",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.9",
        "Modality": "CT",
        "PatientName": f"{SECRET}^Anna",
        "PatientID": f"{SECRET} 1",
        "ImagePositionPatient": [10, 20, 30],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.5, 0.75],
        "SliceThickness": 2,
        "Rows": SHAPE[0],
        "Columns": SHAPE[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    for keyword, value in (plain | elements).items():
        if isinstance(value, bytes):
            tag, padding = Tag(tag_for_keyword(keyword)), b" " * (len(value) % 2)
            raw = RawDataElement(tag, dictionary_VR(keyword), len(value + padding), value + padding, 0, False, True)
            dataset._dict[tag] = raw
        elif value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    dataset.PixelData = bytes(int(dataset.get("NumberOfFrames", 1)) * SHAPE[0] * SHAPE[1])
    return dataset


@pytest.fixture
def export(tmp_path, write):  # noqa: F811
    """Export the masks of DICOM images, and return the written segmentations by name."""

    def export(*datasets, kind="dicom-seg", prompt="polyp", code=0):
        rows = []
        for number, dataset in enumerate(datasets):
            path = tmp_path / f"{number}.dcm"
            with pydicom.config.disable_value_validation():
                dataset.save_as(path, enforce_file_format=False)
            for frame, mask in enumerate(masks_of(dataset)):
                selector = f"frame={frame}" if dataset.get("NumberOfFrames", 1) > 1 else None
                rows.append(row(path, mask, prompt, selector))
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        names = run(write(rows, prompts=[prompt]), kind, tmp_path / "x", code=code)
        return {name: hd.seg.segread(tmp_path / "x" / name) for name in names}

    return export


def masks_of(dataset):
    """The masks of the frames of an image; its UID decides which."""
    seed = sum(map(ord, str(dataset.get("SOPInstanceUID"))))
    return checkers((int(dataset.get("NumberOfFrames", 1)), *SHAPE), seed)


def pixels_of(seg, *sources):
    """(frames, H, W) of the only segment, as highdicom reads them."""
    arguments = {"combine_segments": False, "assert_missing_frames_are_empty": True, "ignore_spatial_locations": True}
    if sources[0].get("NumberOfFrames", 1) > 1:
        numbers = range(1, sources[0].NumberOfFrames + 1)
        return seg.get_pixels_by_source_frame(sources[0].SOPInstanceUID, numbers, **arguments)[..., 0]
    return seg.get_pixels_by_source_instance([source.SOPInstanceUID for source in sources], **arguments)[..., 0]


def check_required(dataset, modules):
    """Required attributes of the modules that a dataset lacks (types 1 and 2) or that are empty (type 1)."""

    def check(item, tree, holds_groups=False):
        for keyword, fact in tree["attributes"].items():
            kind = "3" if holds_groups else fact["type"].value  # a group stands in the shared or in the frames' items
            if (kind in ("1", "2") and keyword not in item) or (kind == "1" and item[keyword].is_empty):
                yield keyword
            elif "attributes" in fact and keyword in item:
                for nested in item[keyword].value:
                    yield from check(nested, fact, "FunctionalGroups" in keyword)

    return [keyword for module in modules for keyword in check(dataset, construct_module_tree(module))]


def lacking_attributes(seg):
    modules = [one["key"] for one in get_iod_module_map()["segmentation"] if one["usage"] == "M"]
    return check_required(seg, [*modules, *(["frame-of-reference"] if "FrameOfReferenceUID" in seg else [])])


def has_position(seg):
    """Whether the frames have a position in the patient or on a slide, or are in the order of the tiles of a slide."""
    group = seg.PerFrameFunctionalGroupsSequence[0]
    if "PlanePositionSequence" in group or "PlanePositionSlideSequence" in group:
        return "FrameOfReferenceUID" in seg
    return seg.get("DimensionOrganizationType") == "TILED_FULL"


def check_seg(seg, *sources):
    """Highdicom finds the masks, no required attribute is missing, and the class of the source is the true one."""
    np.testing.assert_array_equal(pixels_of(seg, *sources), np.concatenate([masks_of(source) for source in sources]))
    assert lacking_attributes(seg) == []
    classes = {element.value for element in seg.iterall() if element.keyword == "ReferencedSOPClassUID"}
    assert classes == {sources[0].get("SOPClassUID", uid.CTImageStorage)}


# --- the patient

JAPANESE = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"  # PS3.5, H.3
KOREAN = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"  # PS3.5, I.2
CHINESE = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="  # PS3.5, K.2
CHARACTER_SETS = {
    b"": (b"Test^Person", "Test^Person"),
    b"ISO_IR 6": (b"Test^Person", "Test^Person"),
    b"ISO_IR 100": ("Müller^Jörg".encode("latin1"), "Müller^Jörg"),
    b"ISO 2022 IR 100": ("Müller^Jörg".encode("latin1"), "Müller^Jörg"),
    b"ISO_IR 144": ("Люкceмбypг".encode("iso8859_5"), "Люкceмбypг"),  # PS3.5, 6.2.1.2
    b"ISO_IR 166": ("นามสกุล".encode("tis_620"), "นามสกุล"),
    b"ISO_IR 13": ("ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis"), "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    b"ISO_IR 192": ("Wang^XiaoDong=王^小东".encode(), "Wang^XiaoDong=王^小东"),
    b"GB18030": ("Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
    b"GBK": ("Wang^XiaoDong=王^小东".encode("gbk"), "Wang^XiaoDong=王^小东"),
    b"GBK ": ("乗^小东".encode("gbk"), "乗^小东"),  # the second byte of the first character is that of a backslash
    b"\\ISO 2022 IR 87": (JAPANESE, "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    b"ISO 2022 IR 6\\ISO 2022 IR 87\\ISO 2022 IR 159": (JAPANESE, "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    b"\\ISO 2022 IR 149": (KOREAN, "Hong^Gildong=洪^吉洞=홍^길동"),
    b"\\ISO 2022 IR 58": (CHINESE, "Zhang^XiaoDong=张^小东"),
    b"ISO_IR 192\\ISO_IR 100": ("山田".encode(), "山田"),
    b"ISO-IR 192": ("山田".encode(), "山田"),  # a common mistake
    b"NONSENSE": ("Müller".encode("latin1"), "Müller"),
    b"\\": (b"Test^Person", "Test^Person"),
}


@pytest.mark.parametrize("terms", CHARACTER_SETS, ids=repr)
def test_names_are_kept_in_every_character_set(export, terms):
    stored, name = CHARACTER_SETS[terms]
    source = make(SpecificCharacterSet=terms, PatientName=stored)
    source.ReferencedStudySequence = items(ReferencedSOPClassUID="1.2.3", ReferencedSOPInstanceUID="1.2")
    (seg,) = export(source, prompt="полип").values()
    assert str(seg.PatientName) == name
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert seg.SegmentSequence[0].SegmentLabel == "полип"


VALUES = [
    ("PatientBirthDate", b"00000000", "", "emptied"),
    ("PatientBirthDate", b"19701301", "", "emptied"),
    ("PatientBirthDate", b"197001", "", "emptied"),
    ("PatientBirthDate", b"19700101\\19710101", "", "emptied"),
    ("PatientBirthDate", b"1970.01.02", "19700102", "repaired"),
    ("PatientBirthDate", b"18991231", "18991231", None),
    ("PatientSex", b"U", "", "emptied"),
    ("PatientSex", b"M\\F", "", "emptied"),
    ("PatientSex", b"m", "M", "repaired"),
    ("PatientAge", b"45", None, "left out"),
    ("PatientAge", b"45y", "045Y", "repaired"),
    ("PatientWeight", b"70,5", 70.5, "repaired"),
    ("PatientWeight", b"heavy", None, "left out"),
    ("PatientWeight", b"1e999", None, "left out"),
    ("PatientID", b"x" * 80, "x" * 80, None),
    ("PatientID", b"a\\b", ["a", "b"], None),
    ("PatientName", b"A^B^C^D^E^F^G", "A^B^C^D^E^F^G", None),
    ("PatientName", b"A=B=C=D=E", "A=B=C=D=E", None),
    ("PatientName", b"x" * 200, "x" * 200, None),
    ("PatientName", b"A\\B", ["A", "B"], None),
    ("StudyDate", b"20260231", "", "emptied"),
    ("StudyTime", b"10:20:30", "102030", "repaired"),
    ("StudyTime", b"25", "", "emptied"),
    ("AccessionNumber", b"x" * 40, "x" * 40, None),
    ("InstanceNumber", b"abc", 1, None),  # the number of the segmentation in its own series
    ("LossyImageCompression", b"maybe", "00", None),
]


@pytest.mark.parametrize(("keyword", "stored", "expected", "change"), VALUES, ids=lambda one: str(one)[:20])
def test_unusual_values_are_kept_or_repaired_or_emptied(export, caplog, keyword, stored, expected, change):
    source = make(**{keyword: stored})
    (seg,) = export(source).values()
    check_seg(seg, source)
    assert seg.get(keyword) == expected
    assert (f"{keyword} {change} in 1" in caplog.text) == (change is not None)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("keyword", "vr", "stored", "expected"),
    [
        ("PatientName", "OB", b"A^B\0", "A^B"),
        ("PatientName", "UN", b"A^B ", "A^B"),
        ("PatientID", "US", b"\1\0", "1"),
        ("PatientSex", "UN", b"M ", "M"),
        ("PatientBirthDate", "OW", b"19700101", "19700101"),
        ("StudyDate", "SQ", b"", ""),
    ],
)
def test_values_of_another_representation_are_read(export, keyword, vr, stored, expected):
    source = make()
    tag = Tag(tag_for_keyword(keyword))
    source._dict[tag] = RawDataElement(tag, vr, len(stored), stored, 0, False, True)
    (seg,) = export(source).values()
    assert seg.get(keyword) == expected


def test_changes_are_counted_in_one_line(export, caplog):
    sources = [
        make(SOPInstanceUID=f"1.2.{number}", PatientSex="W", PatientBirthDate=SECRET.encode()) for number in range(3)
    ]
    sources[0].PatientSex = "F"
    assert len(export(*sources)) == 3
    lines = [record.message for record in caplog.records if "could not be copied" in record.message]
    assert len(lines) == 1
    assert lines[0].endswith("by number of images: PatientBirthDate emptied in 3, PatientSex emptied in 2")
    assert SECRET not in caplog.text


# --- what is missing

POSITION = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
EMPTY_OK = ("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "PatientID", "PatientName", "Modality")


@pytest.mark.parametrize("value", [None, b""], ids=["missing", "empty"])
@pytest.mark.parametrize("keyword", [*POSITION, *EMPTY_OK, "SliceThickness", "SOPClassUID", "SOPInstanceUID"])
def test_missing_elements_cost_no_segmentation(export, keyword, value):
    source = make(**{keyword: value})
    (seg,) = export(source).values()
    source.SOPInstanceUID = "1.2.3.4.5"  # it is in the meta information as well
    if keyword == "SOPInstanceUID":
        assert seg.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5"
    elif keyword != "SOPClassUID":
        check_seg(seg, source)
    assert has_position(seg) == (keyword not in POSITION)
    assert ("FrameOfReferenceUID" in seg) == (keyword != "FrameOfReferenceUID")
    assert lacking_attributes(seg) == []


@pytest.mark.parametrize(
    ("keyword", "stored", "is_usable"),
    [
        ("PixelSpacing", b"0,5\\0,75", True),
        ("PixelSpacing", b"0\\0", False),
        ("PixelSpacing", b"0.5", False),
        ("SliceThickness", b"0", True),
        ("SliceThickness", b"thin", True),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0", False),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0", False),
        ("ImageOrientationPatient", b"0.97\\0.24\\0\\-0.24\\0.97\\0", True),
        ("ImagePositionPatient", b"a\\b\\c", False),
        ("ImagePositionPatient", b"1e400\\0\\0", False),
    ],
    ids=str,
)
def test_a_position_that_is_wrong_is_not_copied(export, keyword, stored, is_usable):
    source = make(**{keyword: stored})
    (seg,) = export(source).values()
    check_seg(seg, source)
    assert has_position(seg) == is_usable
    if is_usable:
        measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert measures.PixelSpacing == [0.5, 0.75]
        assert measures.SliceThickness == (1 if keyword == "SliceThickness" else 2)
        assert "SpacingBetweenSlices" not in measures


@pytest.mark.parametrize("position", [[1, 2, 3], None], ids=["position", "no position"])
@pytest.mark.parametrize(
    "sop_class", ["1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.3", "1.3.12.2.1107.5.9.1", uid.CTImageStorage]
)
def test_retired_and_private_classes_are_sources(export, sop_class, position):
    for source in (make(SOPClassUID=sop_class, ImagePositionPatient=position), make(NumberOfFrames=3)):
        source.SOPClassUID, source.ImagePositionPatient = sop_class, position
        (seg,) = export(source).values()
        check_seg(seg, source)


def enhanced(*frames, **measures):
    """A multi-frame image whose frames (position, orientation) have functional groups of their own."""
    groups = [
        items(
            PlanePositionSequence=items(ImagePositionPatient=position),
            PlaneOrientationSequence=items(ImageOrientationPatient=orientation),
            PixelMeasuresSequence=items(PixelSpacing=[0.5, 0.75], **measures),
        )[0]
        for position, orientation in frames
    ]
    single = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"))
    more = {"NumberOfFrames": len(frames), "SOPClassUID": uid.EnhancedMRImageStorage}
    return make(PerFrameFunctionalGroupsSequence=groups, **single, **more)


AXIAL, CORONAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("source", "thickness", "spacing"),
    [
        (enhanced(([0, 0, 4], AXIAL), ([0, 0, 0], AXIAL), ([0, 0, 2], AXIAL), SliceThickness=1), 1, 2),
        (enhanced(([0, 0, 4], AXIAL), ([0, 0, 0], AXIAL), ([0, 0, 2], AXIAL)), 2, 2),
        (enhanced(([0, 0, 0], AXIAL), ([0, 0, 3], AXIAL), ([0, 0, 0], AXIAL), SliceThickness=1), 1, 3),  # two phases
        (enhanced(([0, 0, 0], AXIAL), ([0, 0, 3], CORONAL), SliceThickness=1), 1, None),  # localizers
    ],
    ids=["stack", "no thickness", "phases", "localizers"],
)
def test_frames_keep_their_positions_in_every_arrangement(export, source, thickness, spacing):
    (seg,) = export(source).values()
    check_seg(seg, source)
    shared = seg.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.get("SpacingBetweenSlices")) == (thickness, spacing)
    for group in seg.PerFrameFunctionalGroupsSequence:
        number = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        of_source = source.PerFrameFunctionalGroupsSequence[number - 1]
        orientation = (group if "PlaneOrientationSequence" in group else shared).PlaneOrientationSequence[0]
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert position == of_source.PlanePositionSequence[0].ImagePositionPatient
        assert orientation.ImageOrientationPatient == of_source.PlaneOrientationSequence[0].ImageOrientationPatient


SLIDE = {
    **dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")),
    "SOPClassUID": uid.VLWholeSlideMicroscopyImageStorage,
    "NumberOfFrames": 4,
    "TotalPixelMatrixRows": 2 * SHAPE[0],
    "TotalPixelMatrixColumns": 2 * SHAPE[1],
    "TotalPixelMatrixFocalPlanes": 1,
    "NumberOfOpticalPaths": 1,
    "DimensionOrganizationType": "TILED_FULL",
    "ImageOrientationSlide": [0, -1, 0, -1, 0, 0],
    "TotalPixelMatrixOriginSequence": items(XOffsetInSlideCoordinateSystem=1, YOffsetInSlideCoordinateSystem=2),
    "OpticalPathSequence": items(OpticalPathIdentifier="1"),
    "SharedFunctionalGroupsSequence": items(PixelMeasuresSequence=items(PixelSpacing=[0.1, 0.1])),
}


@pytest.mark.parametrize("missing", [None, "OpticalPathSequence", "TotalPixelMatrixOriginSequence"])
def test_tiles_of_slides_have_a_segmentation_with_their_positions_or_without(export, missing):
    source = make(**SLIDE | {missing: None} if missing else SLIDE)
    (seg,) = export(source).values()
    check_seg(seg, source)
    assert has_position(seg) == (missing is None)


# --- one segmentation per series


def slices(*depths, **elements):
    return [
        make(SOPInstanceUID=f"1.2.{number}", InstanceNumber=number, ImagePositionPatient=[10, 20, depth], **elements)
        for number, depth in enumerate(depths, start=1)
    ]


@pytest.mark.parametrize("depths", [(0, 3, 6), (6, 0, 3), (0, 1, 6), (0, 3, 0)], ids=str)
def test_a_series_is_one_segmentation(export, depths):
    sources = slices(*depths, SliceThickness=None)
    ((name, seg),) = export(*sources, kind="dicom-seg-series").items()
    assert name.startswith("1.2.3.4.")
    check_seg(seg, *sources)
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(sources)
    depth_of = {source.SOPInstanceUID: source.ImagePositionPatient for source in sources}
    for group in seg.PerFrameFunctionalGroupsSequence:
        source_uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert group.PlanePositionSequence[0].ImagePositionPatient == depth_of[source_uid]


def test_slices_of_other_series_frames_and_places_do_not_share_a_segmentation(export):
    first, second, third, fourth, fifth = slices(0, 3, 6, 9, 12)
    second.SeriesInstanceUID, third.FrameOfReferenceUID = "1.9", "1.8"
    del fourth.ImagePositionPatient
    segs = export(first, second, third, fourth, fifth, first, kind="dicom-seg-series")
    assert len(segs) == 4
    sizes = {name[:7]: len(seg.SourceImageSequence) for name, seg in segs.items() if name.startswith(("1.9", "3"))}
    assert sizes == {"1.9." + name[4:7]: 1 for name in segs if name.startswith("1.9")} | {"3.dcm.s": 1}
    (shared,) = [seg for seg in segs.values() if len(seg.SourceImageSequence) == 2]
    check_seg(shared, first, fifth)


def test_rows_of_a_grown_archive_are_in_the_segmentation_of_their_series(tmp_path, write):  # noqa: F811
    """Its rows come prompt by prompt: each slice occurs again after the others."""
    sources, rows = slices(0, 3), []
    for number, source in enumerate(sources):
        source.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    for prompt in ("polyp", "fold"):
        rows += [row(tmp_path / f"{n}.dcm", masks_of(source)[0], prompt) for n, source in enumerate(sources)]
    (name,) = run(write(rows), "dicom-seg-series", tmp_path / "x")
    seg = hd.seg.segread(tmp_path / "x" / name)
    uids = [source.SOPInstanceUID for source in sources]
    pixels = seg.get_pixels_by_source_instance(uids, combine_segments=False, ignore_spatial_locations=True)
    for number in range(2):
        np.testing.assert_array_equal(pixels[..., number], np.concatenate([masks_of(source) for source in sources]))


def test_a_series_exported_again_is_the_same(export, tmp_path):
    export(*slices(0, 3, 6), kind="dicom-seg-series")
    (path,) = (tmp_path / "x").glob("*.dcm")
    before = path.read_bytes()
    export(*slices(0, 3, 6), kind="dicom-seg-series")
    assert path.read_bytes() == before
    assert hd.seg.segread(path).ContentDate == "20260102"


def test_directions_that_differ_by_rounding_are_one(export):
    sources = slices(0, 3, 6)
    sources[1].ImageOrientationPatient = [1, 0.00001, 0, -0.00001, 1, 0]
    (seg,) = export(*sources, kind="dicom-seg-series").values()
    check_seg(seg, *sources)
    assert "PlaneOrientationSequence" in seg.SharedFunctionalGroupsSequence[0]
    assert seg.get_volume().spacing == (3, 0.5, 0.75)


@pytest.mark.parametrize("depths", [(5,), (0, 3, 6)])
def test_dcmqi_reads_a_volume_at_the_place_of_the_series(export, tmp_path, depths):
    sources = slices(*depths)
    ((name, _),) = export(*sources, kind="dicom-seg-series").items()
    program = Path(sys.executable).with_name("segimage2itkimage")
    (tmp_path / "q").mkdir()
    words = ["--inputDICOM", tmp_path / "x" / name, "--outputDirectory", tmp_path / "q", "-t", "nii"]
    done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    assert "W:" not in done.stdout + done.stderr  # a required element is missing
    (path,) = (tmp_path / "q").glob("*.nii.gz")
    image = nib.load(path)
    volume = np.concatenate([masks_of(source) for source in sources])
    np.testing.assert_array_equal(np.asarray(image.dataobj) > 0, volume.transpose(2, 1, 0))
    step = 3 if len(depths) > 1 else 2  # a single slice has its thickness
    expected = [[-0.75, 0, 0, -10], [0, -0.5, 0, -20], [0, 0, step, depths[0]], [0, 0, 0, 1]]  # NIfTI is RAS
    np.testing.assert_allclose(image.affine, expected, atol=1e-5)
