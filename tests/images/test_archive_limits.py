"""Archives that would take for ever: each ends with a row that names the limit, and its images before that stay."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
import tifffile

from vlsm.errors import ImageError
from vlsm.images.containers import list_images
from vlsm.images.formats import Look
from vlsm.images.gunzip import open_gzip, open_member

MIB = 1 << 20


def header(name, size=0, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_header():
    block = bytearray(header("s.png", kind=tarfile.GNUTYPE_SPARSE))
    block[482] = 1  # the map goes on in the next block
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def records(count):
    """Attributes of a pax header, padded to a block."""
    texts = b"".join(b"13 k%06d=v\n" % number for number in range(count))
    return header("pax", len(texts), b"x") + texts + bytes(-len(texts) % 512)


class CountedFile(io.BytesIO):
    num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_bytes += len(data)
        return data


def look_into(data, name):
    """The selectors of the images in an archive, and the problems."""
    images = list_images(lambda: io.BytesIO(data), name, Look(), Counter())
    return [image.selector for image in images if not image.problem], [
        image.problem for image in images if image.problem
    ]


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr("vlsm.images.tar_walk.MAX_TAR_HEADER_BYTES", MIB)
    monkeypatch.setattr("vlsm.images.tar_walk.MAX_TAR_GAP_BYTES", 4 * MIB)
    monkeypatch.setattr("vlsm.images.tar_walk.MAX_TAR_HEADERS_BYTES", 8 * MIB)
    monkeypatch.setattr("vlsm.images.tar_walk.MAX_MEMBERS", 500)
    monkeypatch.setattr("vlsm.images.containers.MAX_MEMBERS", 500)
    monkeypatch.setattr("vlsm.images.tar_walk.MAX_NAMES_BYTES", 50_000)
    monkeypatch.setattr("vlsm.images.gunzip.MAX_UNPACKED_BYTES", 16 * MIB)
    monkeypatch.setattr("vlsm.images.gunzip.MAX_LISTED_BYTES", 8 * MIB)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([header(f"{number}.png") for number in range(600)], "more than 500 members"),
        ([header("d", kind=tarfile.DIRTYPE)] * 600, "more than 500 members"),
        ([b"\x41" * 5 * MIB], "without a member"),
        ([bytes(5 * MIB)], "without a member"),
        ([header("b.bin", 17 * MIB), bytes(17 * MIB)], "unpacks more than"),
        ([header("L", 2 * MIB, tarfile.GNUTYPE_LONGNAME), b"n" * 2 * MIB], "a header asks for 2,097,152 bytes"),
        ([header("L", 9 * 1024, tarfile.GNUTYPE_LONGNAME) + b"n" * 9 * 1024 + header("x.png")] * 6, "its names have"),
        ([(header("L", MIB, tarfile.GNUTYPE_LONGNAME) + b"n" * MIB)] * 5, "without a member"),
        ([header("p", 2 * MIB, b"x"), bytes(2 * MIB)], "a header asks for"),
        ([records(50_000) + header(f"{number}.png") for number in range(13)], "its headers have more than"),
        ([sparse_header(), (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 10_000], "without a member"),
    ],
    ids=["members", "folders", "damage", "zeros", "bytes", "name", "names", "chain", "pax", "paxes", "sparse"],
)
def test_a_tar_beyond_a_limit_says_so_and_keeps_its_images(parts, problem):
    data = gzip.compress(header("first.png") + b"".join(parts) + bytes(1024), 1)
    images, problems = look_into(data, "a.tar.gz")
    assert images[0] == "first.png"
    assert len(images) <= 500
    assert [problem in text and text.startswith("too_large: a.tar.gz: ") for text in problems] == [True]


def test_attributes_of_a_whole_tar_are_limited():
    texts = b"".join(b"13 k%06d=v\n" % number for number in range(1100))
    data = header("g", len(texts), b"g") + texts + bytes(-len(texts) % 512) + header("a.png") * 2 + bytes(1024)
    assert "attributes" in look_into(data, "a.tar")[1][0]


def zigzag(num_pages, num_bytes):
    """A TIFF whose pages lie at its start and at its end in turn."""
    data = bytearray(num_bytes)
    places = [num_bytes - 10_000 + 10 * n if n % 2 else 1000 + 10 * n for n in range(num_pages)]
    data[:8] = b"II*\0" + struct.pack("<I", places[0])
    for place, following in zip(places, [*places[1:], 0], strict=True):
        data[place : place + 6] = struct.pack("<HI", 0, following)
    return bytes(data)


def pack(name, member, data):
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, data)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_packed_member_is_unpacked_once(name):
    data = pack(name, "a.tif", zigzag(200, 2 * MIB))
    file = CountedFile(data)
    images = list_images(lambda: file, name, Look(), Counter())
    assert len(images) == 200
    assert file.num_bytes < 4 * len(data) + 3 * 65536  # 200 steps backwards, and not one of them begins again


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_member_that_must_be_unpacked_too_far_is_a_failed_row(name):
    images, problems = look_into(pack(name, "a.tif", zigzag(3, 10 * MIB)), name)
    assert images == []
    assert "beyond 8,388,608 bytes" in problems[0]
    assert problems[0].startswith("too_large")


def test_a_stored_member_of_any_size_is_listed_without_reading_it():
    """A whole slide is larger than what may be unpacked."""
    file = CountedFile()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.tif", zigzag(50, 10 * MIB))
    file.num_bytes = 0
    assert len(list_images(lambda: file, "a.zip", Look(), Counter())) == 50
    assert file.num_bytes < 52 * (1 << 17)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_stack_in_a_packed_archive_is_listed(name):
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((40, 32, 32), np.uint8), photometric="minisblack")
    assert len(look_into(pack(name, "a.tif", file.getvalue()), name)[0]) == 40


def write_zip(count, data=b"", same=True):
    """A zip with a member, and a table that names it again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    crc, name = zlib.crc32(data), b"a.tif"
    member = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(packed), len(data), len(name), 0)
    member += name + packed
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(packed), len(data), len(name), 0, 0, 0, 0, 0, 0
    )
    table = (entry + name) * count
    return member + table + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(table), len(member), 0)


def test_members_that_overlap_are_refused():
    with pytest.raises(ImageError, match="its members overlap"):
        look_into(write_zip(200, random.Random(0).randbytes(100_000)), "a.zip")


def test_a_zip_with_too_many_members_is_refused_before_they_are_kept():
    images, problems = look_into(write_zip(501), "a.zip")
    assert images == []
    assert problems == ["too_large: a.zip: it has more than 500 members, which are the most"]


def test_a_table_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("vlsm.images.containers.MAX_ZIP_TABLE_BYTES", 1000)
    assert "its table has" in look_into(write_zip(100), "a.zip")[1][0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 3 * MIB,  # a name without an end
        gzip.compress(b"") * 100_000,
        gzip.compress(b"x") + gzip.compress(b"") * 100_000,
    ],
    ids=["name", "empty", "empty behind"],
)
def test_gzip_files_without_content_end_early(data):
    file = CountedFile(data)
    with pytest.raises(gzip.BadGzipFile, match="without content"):
        open_gzip(file).read()
    assert file.num_bytes <= MIB + 2 * (1 << 14)


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_gzip_files_are_unpacked_as_python_does(size):
    random_bytes = random.Random(1)
    texts = [random_bytes.randbytes(50_000), b"x" * 300_000, b"", b"the end"]
    data = b"".join(map(gzip.compress, texts)) + bytes(40_000) + gzip.compress(b"more") + bytes(100)
    whole = b"".join(texts) + b"more"
    assert gzip.decompress(data) == whole
    file = open_gzip(io.BytesIO(data))
    if size > 1:
        assert b"".join(iter(lambda: file.read(size), b"")) == whole
    file.seek(60_000)
    assert (file.tell(), file.read(10)) == (60_000, whole[60_000:60_010])
    file.seek(5)
    assert file.read(size) == whole[5 : 5 + size]
    file.seek(len(whole) + 99)
    assert file.read() == b""


@pytest.mark.parametrize("cut", [5, 12, 1000, -9, -4])
def test_a_gzip_file_that_breaks_off_is_an_error(cut):
    data = gzip.compress(random.Random(2).randbytes(5000))[:cut]
    with pytest.raises(EOFError):
        open_gzip(io.BytesIO(data)).read()


def test_a_gzip_file_with_other_content_or_a_wrong_checksum_is_an_error():
    with pytest.raises(gzip.BadGzipFile):
        open_gzip(io.BytesIO(gzip.compress(b"x") + b"garbage")).read()
    data = bytearray(gzip.compress(b"x" * 100))
    data[-6] ^= 1
    with pytest.raises(zlib.error):
        open_gzip(io.BytesIO(bytes(data))).read()


def test_a_kept_member_reads_as_any_file():
    data = random.Random(3).randbytes(300_000)
    file = open_member(io.BytesIO(data), "x", lambda count: None)
    assert (file.read(348), file.seek(0), file.read(4)) == (data[:348], 0, data[:4])
    assert file.seek(0, io.SEEK_END) == len(data)
    file.seek(1000)
    assert (file.read(70_000), file.read()) == (data[1000:71_000], data[71_000:])


def test_an_ordinary_tar_of_many_members_is_listed(monkeypatch):
    monkeypatch.undo()
    data = b"".join(header(f"case {number}/image.png") for number in range(3000)) + bytes(10_240)
    images, problems = look_into(data + data, "a.tar")  # tars may be joined
    assert (len(images), problems) == (3000, [])
