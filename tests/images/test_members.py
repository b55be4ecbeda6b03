"""Which members of a tar or zip are images, and under which names."""

import io
import logging
import struct
import tarfile
import zipfile
import zlib

import pytest

from tests.images.test_containers import png, read, rows, values, write_tar, write_zip
from vlsm.images.formats import Look


def tar_of(folder, *names):
    """A tar with these members: images of the values 1, 2, ... and other files."""
    members = [(name, png(n) if name.endswith(("png", "jpg")) else b"3") for n, name in enumerate(names, start=1)]
    return write_tar(folder / "a.tar", members)


@pytest.mark.parametrize(
    "names",
    [
        "scan.png scan.v2.png scan.0001.png patient.1.jpg 2.png 2.25.111.png 2.25.112.png",
        "a.png a.b.png",
        "study.1.png study.2.png notes.txt",
        "scan.png scan.png.json scan.v2.png scan.v2.png.json",  # each with a file of its own beside it
        "1.2.840.png 1.2.840.111.png 1.2.840.json",
        "x.jpg x.2.png",  # two formats, but the field is a number
        "a/scan.jpg b/scan.mask.png",
        "README.md README.txt a.png a.b.png",
    ],
)
def test_dots_in_the_names_of_a_plain_tar_are_no_fields(tmp_path, names):
    images = [name for name in names.split() if name.endswith(("png", "jpg"))]
    assert [row["selector"] for row in rows(tar_of(tmp_path, *names.split()))[0]] == images


@pytest.mark.parametrize(
    ("names", "images", "warned"),
    [
        ("1.image.png 1.mask.png 1.json", "1.image.png 1.mask.png", "image.png, mask.png"),
        ("1.jpg 1.seg.png 2.jpg 2.seg.png 3.seg.png", "1.jpg 2.jpg 3.seg.png", ""),
        ("1.jpg 1.png 1.cls", "1.jpg 1.png", "jpg, png"),
        ("1.jpg 2.png 1.cls 2.cls", "1.jpg 2.png", ""),
        ("1.Image.PNG 1.MASK.png 1.json", "1.Image.PNG 1.MASK.png", "image.png, mask.png"),
        ("1.png 1.mask.png 2.png 2.mask.png", "1.png 1.mask.png 2.png 2.mask.png", "png, mask.png"),
        ("1.2.840.png 1.2.840.111.png 1.2.json", "1.2.840.png 1.2.840.111.png", ""),
        ("1.a.png 1.b.png 1.c.png 1.d.png 1.e.png 1.f.png 1.txt", "1.a.png 1.b.png 1.c.png 1.d.png 1.e.png 1.f.png",
         "a.png, b.png, c.png, d.png, e.png, ..."),
    ],
)  # fmt: skip
def test_several_images_in_a_sample_are_told_with_their_fields(tmp_path, caplog, names, images, warned):
    names = names.replace("PNG", "png") if "Image" in names else names
    (tmp_path / "in").mkdir()
    for folder in (tmp_path / "in", tmp_path):
        tar_of(folder, *names.split())
    assert [row["selector"] for row in rows(tmp_path)[0]] == images.replace("PNG", "png").split() * 2
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == bool(warned)  # once for all files of INPUT
    assert all(f"with the fields {warned}: all are segmented; --set 'fields=[" in message for message in messages)


def test_fields_choose_the_members_of_a_sample(tmp_path, caplog):
    path = tar_of(tmp_path, "1.image.png", "1.mask.png", "1.json", "2.Image.png", "2.jpg")
    found, skipped = rows(path, look=Look(fields=("image.png",)))
    assert [(row["selector"], read(row, fields=["image.png"])) for row in found] == [
        ("1.image.png", 1),
        ("2.Image.png", 4),
    ]
    assert skipped == {".json": 1, ".mask.png is not in fields": 1, ".jpg is not in fields": 1}
    assert not caplog.records
    path = tar_of(tmp_path, "1.jpg", "1.seg.png")
    bare = {"image_uri": str(path), "selector": "1.seg.png"}  # a row of the results has no offset
    assert read(bare, fields="seg.png") == 2
    path = write_zip(tmp_path / "b.zip", [("1.image.png", png(1)), ("1.mask.png", png(2))])
    assert [row["selector"] for row in rows(path, look=Look(fields=(".mask.png", "x")))[0]] == ["1.mask.png"]


def raw_zip(path, names, extra=b""):
    """A zip whose names are these bytes, without the flag that says UTF-8."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo(f"{number}".ljust(len(name), "~"))
            info.extra = extra
            archive.writestr(info, png(number + 1))
    data = path.read_bytes()
    for number, name in enumerate(names):
        data = data.replace(f"{number}".ljust(len(name), "~").encode(), name)
    path.write_bytes(data)
    return path


def test_names_in_a_zip_are_what_they_were_where_they_were_packed(tmp_path):
    texts = ["café.png", "病人/画像.png", "плёнка.png"]
    path = raw_zip(tmp_path / "mac.zip", [text.encode() for text in texts])
    assert values(path) == {f"mac.zip#{text}": n for n, text in enumerate(texts, start=1)}
    earlier = {"image_uri": str(path), "selector": texts[0].encode().decode("cp437")}  # as it was listed before
    assert earlier["selector"] == "caf├⌐.png" and read(earlier) == 1
    written = write_zip(tmp_path / "flag.zip", [(text, png(n)) for n, text in enumerate(texts, start=1)])
    assert values(written) == {f"flag.zip#{text}": n for n, text in enumerate(texts, start=1)}


@pytest.mark.parametrize("code", ["cp437", "cp850", "latin-1", "shift_jis", "gbk", "cp1251"])
def test_names_in_another_code_page_can_be_read(tmp_path, code):
    text = {"shift_jis": "画像.png", "gbk": "图像.png", "cp1251": "снимок.png"}.get(code, "é.png")
    path = raw_zip(tmp_path / "a.zip", [text.encode(code), b"b.png"])
    assert values(path) == {f"a.zip#{text.encode(code).decode('cp437')}": 1, "a.zip#b.png": 2}
    raw = text.encode(code)
    field = b"\x01" + struct.pack("<I", zlib.crc32(raw)) + text.encode()  # as Info-ZIP, 7-Zip and WinRAR write it
    extra = struct.pack("<HH", 0x5455, 1) + b"\0" + struct.pack("<HH", 0x7075, len(field)) + field
    path = raw_zip(tmp_path / "b.zip", [raw], extra)
    assert values(path) == {f"b.zip#{text}": 1}
    path = raw_zip(tmp_path / "c.zip", [raw + b".png"], extra)  # renamed since: the field belongs to another name
    assert list(values(path).values()) == [1]


def test_what_is_in_a_folder_of_macos_is_no_image(tmp_path):
    members = [("a/b.png", png(1)), ("__MACOSX/a/._b.png", b"x"), ("__MACOSX/a/b.png", b"x"), ("a/._b.png", b"x")]
    assert values(write_zip(tmp_path / "a.zip", members)) == {"a.zip#a/b.png": 1}
    assert values(write_tar(tmp_path / "a.tar", members)) == {"a.tar#a/b.png": 1}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length_and_form_in_a_tar(tmp_path, form):
    long = "d" * 120 + "/" + "é" * 200 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate([long, "./b.png", "/data/c.png", "../d.png", "b.png"], start=1):
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            archive.addfile(info, io.BytesIO(png(number)))
        for name, target in (("e.png", "./b.png"), ("f.png", long), ("g.png", "nowhere.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            archive.addfile(link)
    found, skipped = rows(tmp_path / "a.tar")
    names = {row["selector"]: read(row) for row in found}
    assert names == {long: 1, "/data/c.png": 3, "../d.png": 4, "b.png": 5, "e.png": 5, "f.png": 1}
    assert skipped == {"member replaced by a later one with the same name": 1, "link or device": 1}
    assert [read({"image_uri": row["image_uri"], "selector": row["selector"]}) for row in found] == list(names.values())


def test_a_zip_of_every_kind(tmp_path):
    """Members of unknown size (data descriptors), ZIP64, stored, a folder with the name of an image, an empty one."""
    path = tmp_path / "a.zip"

    class Stream(io.RawIOBase):
        """A file that cannot seek: zipfile then writes sizes behind the data."""

        def __init__(self):
            self.file = path.open("wb")

        def writable(self):
            return True

        def write(self, data):
            return self.file.write(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder.png/", b"")
        with archive.open("a.png", "w") as member:
            member.write(png(1))
        with archive.open("b.png", "w", force_zip64=True) as member:
            member.write(png(2))
        archive.writestr("c.png", png(3), zipfile.ZIP_STORED)
        archive.writestr("d.png", b"")
    stream.file.close()
    assert values(path) == {"a.zip#a.png": 1, "a.zip#b.png": 2, "a.zip#c.png": 3, "a.zip#d.png": "empty"}
    assert zipfile.ZipFile(path).infolist()[1].flag_bits & 8
