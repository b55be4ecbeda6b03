"""The segment job over everything that images are kept in, on an object store, in windows, with all kinds of rows."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import segment, verify
from vlsm import read_masks

SIZE = (60, 90)


def make_picture(place):
    """Dark, with a bright square whose place tells which picture it is."""
    pixels = np.full(SIZE, 20, np.uint8)
    top, left = divmod(place, 4)
    pixels[8 + 20 * top : 24 + 20 * top, 4 + 20 * left : 20 + 20 * left] = 250
    return pixels


def encode(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def make_dicom(pictures):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = UltrasoundMultiFrameImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = "1.2.3"
    found.PatientName = "SECRET^NAME"
    found.Rows, found.Columns = SIZE
    found.SamplesPerPixel, found.PhotometricInterpretation, found.NumberOfFrames = 1, "MONOCHROME2", len(pictures)
    found.BitsAllocated = found.BitsStored = 8
    found.HighBit, found.PixelRepresentation = 7, 0
    found.PixelData = np.stack(pictures).tobytes()
    file = io.BytesIO()
    found.save_as(file, enforce_file_format=True)
    return file.getvalue()


def make_nifti(pictures):
    import nibabel

    # as the slices are shown: rows from anterior, columns from the patient's right
    volume = np.stack([picture[::-1, ::-1].T for picture in pictures], axis=2)
    return gzip.compress(nibabel.Nifti1Image(volume, np.eye(4)).to_bytes())


def make_tar(members, mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def make_parquet(files):
    file = io.BytesIO()
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": images}), file, row_group_size=1)
    return file.getvalue()


@pytest.fixture
def stored(s3_folder):
    """A prefix with files of every kind; and of each image_id which picture it is, or why it is none."""
    import s3fs

    pictures = [make_picture(place) for place in range(12)]
    pages = [Image.fromarray(picture) for picture in pictures[8:10]]
    tar = make_tar({"x/1.png": encode(pictures[1]), "x/2.jpg": encode(pictures[2], "JPEG", quality=95)}, "w")
    files = {
        "plain.png": encode(pictures[0]),
        "whole.tar": tar,
        "packed.tar.gz": make_tar({"b.png": encode(pictures[3]), "a.png": encode(pictures[4]), "c.txt": b""}, "w:gz"),
        "broken.tar": tar[:-9000],
        "study.zip": make_zip({"IM 1": make_dicom(pictures[5:7]), "bad.dcm": b"DICM"}),
        "IM0007": make_dicom(pictures[7:8]),
        "pages.tiff": encode(pictures[8], "TIFF", save_all=True, append_images=pages[1:]),
        "volume.nii.gz": make_nifti(pictures[10:12]),
        "hub.parquet": make_parquet(
            {"a": encode(pictures[0]), "b.tif": encode(pictures[8], "TIFF", save_all=True, append_images=pages[1:])}
        ),
        "README": b"no image at all",
    }
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    for name, data in files.items():
        fs.pipe_file(f"{s3_folder.removeprefix('s3://')}/in/{name}", data)
    wanted = {
        "plain.png": 0,
        "whole.tar#x/1.png": 1,
        "whole.tar#x/2.jpg": 2,
        "packed.tar.gz#b.png": 3,
        "packed.tar.gz#a.png": 4,
        "study.zip#IM 1#frame=0": 5,
        "study.zip#IM 1#frame=1": 6,
        "study.zip#bad.dcm": "corrupt",
        "IM0007": 7,
        "pages.tiff#page=0": 8,
        "pages.tiff#page=1": 9,
        "volume.nii.gz#slice=0": 10,
        "volume.nii.gz#slice=1": 11,
        "hub.parquet#row=0": 0,
        "hub.parquet#row=1#page=0": 8,
        "hub.parquet#row=1#page=1": 9,
        "broken.tar#x/1.png": 1,
        "broken.tar": "corrupt",
    }
    return s3_folder, wanted


@pytest.mark.usefixtures("in_process")
def test_everything_that_images_are_kept_in_is_segmented(stored, bright_checkpoint, capfd):
    folder, wanted = stored
    members = [{"checkpoint": str(bright_checkpoint)}, {"checkpoint": str(bright_checkpoint), "flip": True}]
    words = [f"{folder}/in", f"{folder}/out", "--set", f"members={json.dumps(members)}"]
    settings = [
        "prompts=[bright, light]",
        "allow_equal_masks=true",
        "member_rows=true",
        "label_maps=true",
        "probability_maps=all",
    ]
    for setting in (*settings, "tile.size=40", "shard_rows=48"):
        words += ["--set", setting]
    assert segment.main(words) == 0
    rows = list(read_masks(f"{folder}/out"))
    label = json.dumps(["bright", "light"])
    kinds = ["mask", "member 1", "member 2"]
    keys = [(prompt, kind) for prompt in ("bright", "light") for kind in kinds] + [(label, "labels")]
    assert sorted((row["image_id"], row["prompt"], row["kind"]) for row in rows) == sorted(
        (image_id, *key) for image_id in wanted for key in keys
    )
    for row in rows:
        place = wanted[row["image_id"]]
        if place == "corrupt":
            assert (row["status"], row["error"].partition(":")[0]) == ("failed", "corrupt")
            continue
        assert row["status"] == "ok", row["error"]
        truth = make_picture(place) > 128
        assert (row["mask"] != truth).mean() < 0.02  # its edges are the model's, on windows of 40 pixels
        if row["kind"] == "labels":
            labels = np.asarray(Image.open(io.BytesIO(row["label_map"])))
            assert set(np.unique(labels)) == {0, 1}  # equal probabilities: the first prompt wins
        else:
            certain = np.abs(row["probability"] - 0.5) > 1 / 255
            assert ((row["probability"] > 0.5) == row["mask"])[certain].all() and certain.mean() > 0.98
    assert verify.main([f"{folder}/out"]) == 0
    told = capfd.readouterr()
    assert not [text for text in (told.out, told.err, repr(rows), read_texts(f"{folder}/out")) if "SECRET" in text]


def read_texts(uri):
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    return b"".join(
        fs.cat_file(f"{uri.removeprefix('s3://')}/{name}") for name in ("config.yaml", "summary.json")
    ).decode()
