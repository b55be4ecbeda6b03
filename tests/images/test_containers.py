"""Files that hold several images: what is found in them, and what is read of it."""

import functools
import gzip
import io
import struct
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlsm.archive.archive import open_archive
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.formats import kind_of, split_selector
from vlsm.images.reader import Reader


def png(value, size=(8, 12)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pages(*values, **options):
    file = io.BytesIO()
    first, *rest = [Image.fromarray(np.full((8, 12), value, np.uint8)) for value in values]
    first.save(file, "TIFF", save_all=True, append_images=rest, **options)
    return file.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def rows(path, **options):
    archive = open_archive(str(path), ("polyp",), **options)
    return list(archive.rows), archive.skipped


def read(row, **options):
    """The value of the pixel in the middle of a row's image, or why there is none."""
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": ""}], **options)
    try:
        content, frame = Reader(settings).open(row)
        return int(content.decode(frame).pixels[4, 6, 0])
    except ImageError as error:
        return str(error).partition(":")[0]


def values(path, **options):
    return {row["image_id"]: read(row, **options) for row in rows(path)[0]}


@pytest.fixture(params=["a.tar", "a.tar.gz", "a.tgz", "a.zip"])
def write(request, tmp_path):
    """A function that packs members into an archive of each kind."""
    path = tmp_path / request.param
    if path.suffix == ".zip":
        return lambda members: write_zip(path, members)
    return lambda members: write_tar(path, members, "w" if path.suffix == ".tar" else "w:gz")


def test_the_images_of_an_archive_are_its_members(write):
    members = [("sub/b.png", png(7)), ("a.jpg.txt", b"no"), ("c.tif", pages(1, 2)), ("ü #1.PNG", png(9))]
    path = write([*members, ("._b.png", b"mac"), ("inner.tar", b""), ("d.png", png(5)[:40])])
    found, skipped = rows(path)
    name = path.name
    assert [row["image_id"] for row in found] == [
        f"{name}#{inner}" for inner in ("sub/b.png", "c.tif#page=0", "c.tif#page=1", "ü #1.PNG", "d.png")
    ]
    assert {row["image_uri"] for row in found} == {str(path)}
    assert len({row["image_version"] for row in found}) == 1
    assert skipped == Counter({".txt": 1, ".png": 1, ".tar": 1})
    assert [read(row) for row in found] == [7, 1, 2, 9, "corrupt"]


def test_what_was_written_last_counts_where_a_name_stands_twice(write):
    assert list(values(write([("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])).values()) == [2, 3]


def test_members_that_are_too_large_or_empty_are_told(write):
    assert list(values(write([("a.png", b""), ("b.png", bytes(5000))]), max_image_bytes=4000).values()) == [
        "empty",
        "too_large",
    ]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_of_a_tar_that_breaks_off_the_rest_is_done(tmp_path, name):
    noise = np.random.default_rng(0).bytes(4000)
    path = tmp_path / name
    write_tar(path, [("a.png", png(1)), ("b.bmp", noise), ("c.png", png(3))], "w:gz" if "gz" in name else "w")
    path.write_bytes(path.read_bytes()[: 512 + 512 + 512 + 2000 if name == "a.tar" else -2500])
    found, _ = rows(path)
    assert [row["image_id"] for row in found] == [f"{name}#a.png", f"{name}#b.bmp", name]
    assert [read(row) for row in found] == [1, "corrupt", "corrupt"]
    assert name in found[-1]["problem"]


def test_damage_in_the_middle_of_a_tar_costs_one_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))])
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76  # the name of the second
    path.write_bytes(data)
    assert values(path) == {"a.tar#a.png": 1, "a.tar#c.png": 3, "a.tar": "corrupt"}
    assert "byte 1,024" in rows(path)[0][-1]["problem"]


def test_tars_behind_each_other_are_one(tmp_path):
    first, second = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", png(n))]).read_bytes() for n in (1, 2))
    path = tmp_path / "both.tar"
    path.write_bytes(first + second)
    assert values(path) == {"both.tar#1.png": 1, "both.tar#2.png": 2}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.tif"])
@pytest.mark.parametrize("what", ["nothing", "text", "zeros", "gzip"])
def test_what_is_no_archive_at_all_is_a_failed_row(tmp_path, name, what):
    data = {"nothing": b"", "text": b"Dear radiologist,", "zeros": bytes(3000), "gzip": gzip.compress(b"no tar")}[what]
    (tmp_path / name).write_bytes(data)
    found, skipped = rows(tmp_path / name)
    if skipped:  # zeros are what an empty tar consists of
        assert (found, name, what) == ([], "a.tar", "zeros")
    else:
        assert [row["image_id"] for row in found] == [name]
        assert read(found[0]) in ("corrupt", "empty")


def test_a_picture_beside_the_image_of_a_webdataset_sample_is_no_image(tmp_path):
    members = [("1.seg.png", png(1)), ("0.jpg", png(2)), ("1.jpg", png(3)), ("x.y/a.b.png", png(4)), ("1.cls", b"3")]
    found, skipped = rows(write_tar(tmp_path / "a.tar", members))
    assert [row["selector"] for row in found] == ["0.jpg", "1.jpg", "x.y/a.b.png"]
    assert skipped == Counter({".seg.png of a sample": 1, ".cls": 1})


def test_an_encrypted_member_and_one_compressed_in_a_strange_way(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))])
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    local = 0
    data[local + 6] |= 1  # encrypted
    data[central + 8] |= 1
    second = data.index(b"PK\x01\x02", central + 4)
    data[second + 10] = 97  # WavPack
    path.write_bytes(data)
    assert list(values(path).values()) == ["unreadable", "unreadable", 3]


def test_smaller_copies_and_masks_in_a_tiff_are_no_images(tmp_path):
    file = io.BytesIO()
    first = Image.fromarray(np.full((8, 12), 1, np.uint8))
    second, third = (Image.fromarray(np.full((8, 12), value, np.uint8)) for value in (2, 3))
    second.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(file, "TIFF", save_all=True, append_images=[second, third])
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    assert values(tmp_path / "a.tif") == {"a.tif#page=0": 1, "a.tif#page=2": 3}


def test_a_listing_goes_on_in_the_middle_of_an_archive(tmp_path):
    write_tar(tmp_path / "b.tar", [(f"{n}.png", png(n)) for n in range(4)])
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "c.png").write_bytes(png(1))
    everything = [row["image_id"] for row in rows(tmp_path)[0]]
    for count, row in enumerate(rows(tmp_path)[0], start=1):
        after = row["image_uri"], row["selector"]
        assert [row["image_id"] for row in rows(tmp_path, after=after)[0]] == everything[count:]
    alone = tmp_path / "b.tar"
    assert [row["selector"] for row in rows(alone, after=(str(alone), "2.png"))[0]] == ["3.png"]


def test_an_archive_in_a_list_is_its_images(tmp_path):
    write_zip(tmp_path / "a.zip", [("x.png", png(1)), ("y.png", png(2))])
    write_zip(tmp_path / "none.zip", [("x.txt", b"no")])
    (tmp_path / "list.csv").write_text("image_uri,image_id\na.zip,study 1\nnone.zip,\nlost.tif,\n")
    assert values(tmp_path / "list.csv") == {
        "study 1#x.png": 1,
        "study 1#y.png": 2,
        "none.zip": "empty",
        "lost.tif": "missing",
    }


def dicom(*values):
    """Frames of 8 x 12 pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset

    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = "1.2.3"
    found.Rows, found.Columns, found.NumberOfFrames = 8, 12, len(values)
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 8
    found.HighBit, found.PixelRepresentation = 7, 0
    found.PixelData = np.repeat(np.array(values, np.uint8), 96).tobytes()
    file = io.BytesIO()
    found.save_as(file, enforce_file_format=True)
    return file.getvalue()


def nifti(*values):
    import nibabel

    image = nibabel.Nifti1Image(np.repeat(np.array(values, np.uint8), 96).reshape(12, 8, -1, order="F"), np.eye(4))
    image.header["cal_max"] = 255
    return image.to_bytes()


def test_every_frame_of_a_member_is_an_image(write):
    found = rows(
        write([("l.dcm", dicom(1, 2, 3)), ("IM1", dicom(4, 5)), ("v.nii", nifti(6, 7)), ("p.tif", pages(8, 9))])
    )
    assert [row["selector"].rpartition("#")[2] for row in found[0]] == [
        *(f"frame={frame}" for frame in (0, 1, 2, 0, 1)),
        *("slice=0", "slice=1", "page=0", "page=1"),
    ]
    assert [read(row) for row in found[0]] == list(range(1, 10))
    bare = [{"image_uri": row["image_uri"], "selector": row["selector"]} for row in found[0]]  # as a result has them
    assert [read(row) for row in bare] == list(range(1, 10))


class _Faulty:
    """A file of which one read fails, as a store does."""

    def __init__(self, file, number):
        self.file, self.left = file, number

    def read(self, *size):
        self.left -= 1
        if self.left == 0:
            raise OSError("the store hiccuped")
        return self.file.read(*size)

    def __getattr__(self, name):
        return getattr(self.file, name)


def _as_stored(store, uri, *_):
    return store, uri


def test_a_store_that_hiccups_while_a_member_is_looked_into_costs_no_frame(write, monkeypatch):
    from vlsm import storage

    path = write([("v.nii", nifti(6, 7)), ("p.tif", pages(8, 9))])
    wanted = [row["image_id"] for row in rows(path)[0]]
    fs = storage.open_uri(str(path))[0]
    for number in range(1, 12):
        faults = iter([number])

        class Store:
            protocol, isfile, info, unstrip_protocol = "memory", fs.isfile, fs.info, staticmethod(lambda path: path)

            def open(self, path, mode, faults=faults, **options):
                return _Faulty(open(path, mode), next(faults, 0))  # noqa: SIM115 - whoever opens it closes it

        monkeypatch.setattr(storage, "open_uri", functools.partial(_as_stored, Store()))
        monkeypatch.setattr(storage, "split_scheme", lambda uri: ("memory", uri))
        monkeypatch.setattr(storage, "_delays", lambda patience_s: iter([0.0, 0.0]))
        assert [row["image_id"] for row in rows(path)[0]] == wanted, number


def test_links_and_holes_in_a_tar(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to("a.png")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "b.png", "c.png"):
            archive.add(tmp_path / name, arcname=name)
    found, skipped = rows(path)
    assert [(row["selector"], read(row)) for row in found] == [("a.png", 1), ("b.png", 1)]
    assert skipped == Counter({"link or device": 1})
    sparse = tarfile.TarInfo("s.bmp")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    path.write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert list(values(path).values()) == ["unreadable"]


def test_a_size_below_nothing_ends_a_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))])
    data = bytearray(path.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(data[1024:1536]), "utf-8", "strict")
    header = bytearray(info.tobuf())
    header[124:136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    data[1024:1536] = header
    path.write_bytes(data)
    assert values(path) == {"a.tar#a.png": 1, "a.tar": "corrupt"}


def test_a_global_header_is_no_damage_and_junk_behind_a_gzip_neither(tmp_path):
    path = tmp_path / "a.tar.gz"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "abc"}) as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
    path.write_bytes(gzip.compress(file.getvalue()) + b"garbage")
    assert values(path) == {"a.tar.gz#a.png": 1}


def test_a_zip_cannot_unpack_more_than_it_tells(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", bytes(1 << 20), zipfile.ZIP_BZIP2)
        archive.writestr("b.png", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    data[second + 24 : second + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    assert list(values(path).values()) == ["unreadable", "corrupt"]


def place_before(data):
    """The table is said to lie 16 MiB later, and so do the members before it."""
    data[data.rindex(b"PK\x05\x06") + 19] += 1


def place_behind(data):
    """A zip of 64 bits says that its member lies at a place which no file system has."""
    entry, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    data[end + 12] += 12  # the length of the table
    data[entry + 42 : entry + 46] = b"\xff" * 4
    data[entry + 30] = 12
    data[end:end] = struct.pack("<HHQ", 1, 8, 1 << 62)


@pytest.mark.parametrize("place", [place_before, place_behind])
def test_a_member_outside_of_its_zip_is_damage_and_no_outage(tmp_path, place):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(0))
    data = bytearray(path.read_bytes())
    place(data)
    path.write_bytes(data)
    assert list(values(path).values()) == ["corrupt"]
    row = {"image_uri": str(path), "selector": "a.png", "problem": None}  # of a list that names the member
    with pytest.raises(ImageError, match=r"begins at byte -?[\d,]+, which is outside of the zip") as caught:
        Reader(SegmentSettings(input="", output="", members=[{"checkpoint": ""}])).open(row)
    assert caught.value.reason == "corrupt"


def test_a_thumbnail_before_the_image_is_not_taken_for_it(tmp_path):
    file = io.BytesIO()
    first, second = (Image.fromarray(np.full((8, 12), value, np.uint8)) for value in (1, 2))
    first.save(file, "TIFF", save_all=True, append_images=[second], tiffinfo={254: 1})
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    found = values(tmp_path / "a.tif")
    assert found in ({"a.tif#page=1": 2}, {"a.tif": 1})  # Pillow may write the tag into both pages


def test_names_that_are_not_utf8_are_told_apart(tmp_path):
    members = [(b"\xff.png".decode("utf-8", "surrogateescape"), png(1)), ("\\xff.png", png(2))]
    found = values(write_tar(tmp_path / "a.tar", members))
    assert len(found) == 2 and set(found.values()) == {1, 2}


def test_an_archive_that_changed_while_it_was_listed_is_told(tmp_path):
    path = write_tar(tmp_path / "b.tar", [("2.png", png(2)), ("3.png", png(3))])
    (tmp_path / "c.png").write_bytes(png(1))
    found, skipped = rows(tmp_path, after=(str(path), "1.png"))
    assert [row["image_id"] for row in found] == ["c.png"]
    assert any("changed while it was listed" in reason for reason in skipped)


def test_names():
    assert [
        kind_of(f"x/{name}") for name in ("a.JPG", "a.tif", "a.nii.gz", "a.tar.gz", "a.gz", "IM0001", "1.2.840")
    ] == [
        "image",
        "tiff",
        "nifti",
        "tar",
        None,
        "unnamed",
        "unnamed",
    ]
    assert split_selector("x.tar", "a#b.png") == ("a#b.png", None)
    assert split_selector("x.zip", "a.dcm#frame=3") == ("a.dcm", "frame=3")
    assert split_selector("x.tgz", "frame=3") == ("frame=3", None)
    assert split_selector("x.nii", "volume=1,slice=3") == (None, "volume=1,slice=3")
