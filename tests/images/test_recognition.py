"""Which files are images, and of which format: names first, content where names state nothing or state it wrongly."""

import io
import tarfile
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file

from tests.images.test_dicom import ROW, make, save
from vlsm.archive.archive import open_archive
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.formats import HEAD_BYTES, describe_other, kind_of, sniff_kind
from vlsm.images.reader import open_images

DICOM = save(make(ROW, WindowCenter=100.5, WindowWidth=201))
LOOP = save(make(np.stack([ROW, ROW]), frames=2))


def picture(kind):
    sink = io.BytesIO()
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(sink, kind)
    return sink.getvalue()


def volume():
    return nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)).to_bytes()


def read_all(location, names=None):
    """The shape and mean of each image in a folder or list, or its error; and the counter of what was passed over."""
    archive = open_archive(str(location), ("polyp",))
    rows, settings = list(archive.rows), SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    found = {}
    for number, opening in open_images(rows, settings):
        try:
            content, frame = opening()
            found[rows[number]["image_id"]] = content.decode(frame).pixels.shape[:2]
        except ImageError as error:
            found[rows[number]["image_id"]] = error.reason
    return found, dict(archive.skipped)


NAMES = (
    *("IM0001", "1.2.840.113619.2", "x.dc3", "MR.1.2.3.4-anon", "P1.MR.HEAD.0001.2020.IMA", "a b.DICOM", "scan.dcm30"),
    *("scan_0001.img0", "x.bin", "image.001_anonymised", "CT.1.3.12.2.1107.5.1.4", "noextension.", "report.dcm.bak"),
)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "list"])
def test_dicom_is_found_whatever_it_is_called(tmp_path, kind):
    location = tmp_path / "archive"
    location.mkdir()
    for name in NAMES:
        (location / name).write_bytes(DICOM)
    (location / "notes.qqq").write_bytes(b"no image " * 100)
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(location, arcname="")
        location = tmp_path / "a.tar"
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in (*NAMES, "notes.qqq"):
                archive.write(location / name, name)
        location = tmp_path / "a.zip"
    elif kind == "list":
        (tmp_path / "list.csv").write_text("image_uri\n" + "".join(f"archive/{name}\n" for name in NAMES))
        location = tmp_path / "list.csv"
    found, skipped = read_all(location)
    prefix = {"tar": "a.tar#", "zip": "a.zip#", "list": "archive/"}.get(kind, "")
    assert {name.removeprefix(prefix): size for name, size in found.items()} == dict.fromkeys(NAMES, (1, 5))
    assert kind == "list" or skipped == {".qqq": 1}


def test_names_that_state_another_format_are_not_opened(tmp_path):
    others = ("a.txt", "b.json", "c.xml", "d.pdf", "e.css", "f.mp3", "g.html", "h.py", "i.gz", "j.doc", "._k.dcm")
    for name in others:
        (tmp_path / name).write_bytes(DICOM)
        assert kind_of(name) is None, name
    assert read_all(tmp_path)[0] == {}


def test_content_is_stronger_than_a_name(tmp_path):
    pytest.importorskip("nibabel")
    files = {
        "jpeg.dcm": (picture("JPEG"), (10, 20)),
        "png.dcm": (picture("PNG"), (10, 20)),
        "tiff.dcm": (picture("TIFF"), (10, 20)),
        "dicom.png": (DICOM, (1, 5)),
        "dicom.jpg": (DICOM, (1, 5)),
        "dicom.tif": (DICOM, (1, 5)),
        "dicom.nii": (DICOM, (1, 5)),
        "bmp.tif": (picture("BMP"), (10, 20)),
        "png.unknown": (picture("PNG"), (10, 20)),
        "loop.png": (LOOP, "unreadable"),  # a name of one image
        "volume.jpg": (volume(), "unreadable"),
        "dose.png": (save(make(ROW, SOPClassUID=uid.RTDoseStorage)), "unreadable"),
        "damaged.png": (b"nothing" * 100, "corrupt"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    assert read_all(tmp_path)[0] == {name: expected for name, (_, expected) in files.items()}
    (tmp_path / "volume.dcm").write_bytes(volume())
    assert sorted(read_all(tmp_path / "volume.dcm")[0]) == [f"volume.dcm#slice={number}" for number in range(4)]


def test_a_file_of_two_formats_has_that_of_its_name_and_without_one_is_dicom():
    both = picture("TIFF")[:128].ljust(128, b"\0") + DICOM[128:]  # DICOM leaves the first 128 bytes to others
    assert both[:4] in (b"II*\0", b"MM\0*")
    assert sniff_kind(both[:HEAD_BYTES], "x.tif") == "tiff"
    for name in ("x.dcm", "IM0001", ""):
        assert sniff_kind(both[:HEAD_BYTES], name) == "dicom"


@pytest.mark.parametrize("query", ["?X-Amz-Signature=a.b/c.txt&X-Amz-Expires=900", "?sig=x%2F.png", "#part"])
def test_the_query_of_a_url_is_no_part_of_the_name(query):
    names = {"x.dcm": "dicom", "x.nii.gz": "nifti", "x.zip": "zip", "x.tar.gz": "tar", "x.json": None, "x": "unnamed"}
    for name, kind in names.items():
        assert kind_of(f"https://store.example/a/{name}{query}") == kind
    assert describe_other(f"https://store.example/a/x.json{query}") == ".json"
    assert kind_of("/disk/a?b.dcm") == "dicom"
    # a folder may hold a million names that end in different parts of UIDs
    assert {describe_other(f"MR.1.2.{number}-anon") for number in range(99)} == {"no extension"}
    assert kind_of("s3://bucket/a?b.dcm") == "dicom"


def test_what_is_no_picture_is_passed_over_and_counted_by_its_kind(tmp_path):
    label_map = "1.2.840.10008.5.1.4.1.1.66.7"
    classes = {"seg": uid.SegmentationStorage, "labels": label_map, "dose": uid.RTDoseStorage}
    for name, kind in classes.items():
        (tmp_path / f"{name}.dcm").write_bytes(save(make(np.zeros((3, 8, 8), np.uint8), frames=3, SOPClassUID=kind)))
    bare = make(ROW, SOPClassUID=uid.EncapsulatedPDFStorage)
    for keyword in [element.keyword for element in bare if element.tag.group in (0x28, 0x7FE0)]:
        delattr(bare, keyword)
    (tmp_path / "pdf").write_bytes(save(bare))
    spectrum = make(ROW, SOPClassUID=uid.MRSpectroscopyStorage)  # it has rows and columns, and no pixels
    del spectrum.PixelData, spectrum.BitsAllocated
    (tmp_path / "spectrum.dcm").write_bytes(save(spectrum))
    private = make(ROW, SOPClassUID="1.2.3.4.5.6.7")
    del private.PixelData
    (tmp_path / "private.dcm").write_bytes(save(private))
    for name in ("reportsi.dcm", "rtstruct.dcm", "waveform_ecg.dcm", "test-SR.dcm"):
        with open(get_testdata_file(name, download=False), "rb") as file:
            (tmp_path / name).write_bytes(file.read())
    (tmp_path / "map.dcm").write_bytes(save(make(ROW, SOPClassUID=uid.ParametricMapStorage)))  # a picture
    found, skipped = read_all(tmp_path)
    assert found == {"map.dcm": (1, 5)}
    kinds = {name.removeprefix("DICOM without a picture: "): count for name, count in skipped.items()}
    assert kinds == {
        "Segmentation Storage": 1,
        "Label Map Segmentation Storage": 1,
        "RT Dose Storage": 1,
        "Encapsulated PDF Storage": 1,
        "MR Spectroscopy Storage": 1,
        "of an unknown class": 1,
        "Basic Text SR Storage": 1,
        "RT Structure Set Storage": 1,
        "12-lead ECG Waveform Storage": 1,
        "Comprehensive SR Storage": 1,
    }


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_an_object_that_ends_in_its_header_is_damaged_and_not_passed_over(tmp_path, syntax):
    whole = save(make(ROW, syntax, ImageComments="x" * 3000))
    (tmp_path / "a.dcm").write_bytes(whole[: len(whole) - 60 if syntax.endswith("99") else 1500])
    assert read_all(tmp_path) == ({"a.dcm": "corrupt"}, {})


def test_an_object_without_rows_but_with_pixels_is_a_failed_row_that_names_them(tmp_path):
    dataset = make(ROW)
    del dataset.Rows
    (tmp_path / "a.dcm").write_bytes(save(dataset))
    row = next(iter(open_archive(str(tmp_path), ("polyp",)).rows))
    assert row["problem"] == f"corrupt: {tmp_path}/a.dcm: its header has no Rows"


def test_float_pixels_without_a_description_of_bits_are_a_picture(tmp_path):
    dataset = make(ROW)
    for keyword in ("PixelData", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, keyword)
    dataset.FloatPixelData = np.arange(5, dtype="<f4").tobytes()
    (tmp_path / "a.dcm").write_bytes(save(dataset))
    assert read_all(tmp_path) == ({"a.dcm": (1, 5)}, {})
