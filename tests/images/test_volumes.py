"""NRRD and MetaImage files, written by SimpleITK, against the NIfTI files that it writes of the same images."""

import bz2
import gzip
import io
import itertools
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images.test_nifti import BODY, limits, save, save_pair
from tests.test_hostile import edits, mutate
from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.errors import ImageError
from vlsm.images.formats import FORMATS, Look, kind_of
from vlsm.images.reader import open_images
from vlsm.images.volumes import check_data_file

AXES = ("axial", "coronal", "sagittal")


def make(array, direction=None, is_vector=False, spacing=(0.5, 1.5, 2.5, 3.0), origin=(7.0, -8.0, 9.0, 2.0)):
    """A SimpleITK image of an array (..., z, y, x)."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array, isVector=is_vector)
    count = image.GetDimension()
    image.SetSpacing(spacing[:count])
    image.SetOrigin(origin[:count])
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    return image


def write(image, path, is_packed=False):
    import SimpleITK as sitk

    sitk.WriteImage(image, str(path), useCompression=is_packed)


def read(path, axis="axial", window=None):
    """All slices of a file, by their selectors, and the second file's content beside it as the Reader finds it."""
    name, data = str(path), path.read_bytes()
    module = FORMATS[kind_of(name)].load()
    second = [(path.parent / one).read_bytes() for one in module.data_files(data, name)]
    look = Look(axis)
    selectors, size = module.list_images(io.BytesIO(data), name, None, look)
    decode = module.open_images(data, name, limits(axis, window), *second)
    slices = {selector: decode(selector).pixels for selector in selectors}
    assert {pixels.shape[:2] for pixels in slices.values()} == {size}
    return slices


DIRECTIONS = {  # every way to store a body, and one that is turned by some degrees
    f"{order}{signs}": np.eye(3)[list(order)] * signs
    for order, signs in zip(
        itertools.permutations(range(3)),
        [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1), (1, 1, -1), (-1, 1, -1)],
        strict=True,
    )
} | {"turned": np.linalg.qr(np.array([[1, 0.2, 0.1], [0.1, -1, 0.3], [0.0, 0.2, 1]]))[0]}


@pytest.mark.parametrize("name", ["x.nrrd", "x.nhdr", "x.mha", "x.mhd"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_slices_are_those_of_the_nifti_file(tmp_path, name, direction, is_packed):
    image = make(BODY.astype(np.int16).transpose(2, 1, 0) * 10, DIRECTIONS[direction])
    write(image, tmp_path / name, is_packed)
    write(image, tmp_path / "y.nii")
    for axis in AXES:
        shown, expected = (read(tmp_path / one, axis) for one in (name, "y.nii"))
        assert shown.keys() == expected.keys()
        for selector, pixels in shown.items():
            np.testing.assert_array_equal(pixels, expected[selector])


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha", "x.mhd"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_type_of_value_is_read(tmp_path, name, dtype):
    write(make(np.array([[[0, 20, 40], [60, 80, 100]]], dtype)), tmp_path / name)
    (pixels,) = read(tmp_path / name, window=(50, 100)).values()
    assert pixels[..., 0].tolist() == [[0, 51, 102], [153, 204, 255]]  # x to the left, y to the back


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha", "x.nhdr"])
@pytest.mark.parametrize(
    ("shape", "dtype", "selectors"),
    [
        ((2, 4, 5, 3), "u1", ["slice=0", "slice=1"]),  # a colour
        ((2, 4, 5, 4), "u1", ["slice=0", "slice=1"]),
        ((2, 4, 5, 2), "u1", ["volume=0,slice=0", "volume=0,slice=1", "volume=1,slice=0", "volume=1,slice=1"]),
        ((1, 4, 5, 3), "f4", ["volume=0,slice=0", "volume=1,slice=0", "volume=2,slice=0"]),
        ((4, 5, 3), "u1", ["slice=0"]),  # an image
        ((4, 5, 2), "i2", ["volume=0,slice=0", "volume=1,slice=0"]),
    ],
)
def test_three_or_four_bytes_are_a_colour_and_other_components_are_volumes(tmp_path, name, shape, dtype, selectors):
    values = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    write(make(values, is_vector=True), tmp_path / name)
    shown = read(tmp_path / name, window=(127.5, 255))
    assert list(shown) == selectors
    for selector, pixels in shown.items():
        numbers = dict(part.split("=") for part in selector.split(","))
        plane = values.reshape(-1, *shape[-3:])[int(numbers["slice"])]
        if len(shown) == len(values.reshape(-1, *shape[-3:])):
            np.testing.assert_array_equal(pixels, plane[..., :3])
        else:
            np.testing.assert_array_equal(pixels[..., 0], plane[..., int(numbers["volume"])])


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_images_and_series_have_two_and_four_axes(tmp_path, name):
    flat = np.arange(20, dtype=np.uint8).reshape(4, 5)
    write(make(flat), tmp_path / name)
    (pixels,) = read(tmp_path / name, window=(127.5, 255)).values()
    np.testing.assert_array_equal(pixels[..., 0], flat)
    series = np.arange(120, dtype=np.uint8).reshape(3, 2, 4, 5)
    write(make(series), tmp_path / name)
    shown = read(tmp_path / name, window=(127.5, 255))
    assert len(shown) == 6
    for selector, pixels in shown.items():
        volume, number = (int(part.split("=")[1]) for part in selector.split(","))
        np.testing.assert_array_equal(pixels[..., 0], series[volume, number])


VALUES = np.arange(24, dtype=">i2")
NRRD = "NRRD0005\ntype: short\ndimension: 3\nsizes: 4 3 2\nendian: big\n"
META = "NDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementByteOrderMSB = True\n"
TEXT = " ".join(map(str, VALUES)).encode()
PACKINGS = {  # beside what SimpleITK writes
    "bzip2.nrrd": (NRRD + "encoding: bz2\n\n", bz2.compress(VALUES.tobytes())),
    "text.nrrd": (NRRD + "encoding: text\n\n", TEXT),
    "commas.nrrd": (NRRD + "encoding: ascii\n\n", TEXT.replace(b" ", b", ")),
    "skip.nrrd": (NRRD + "encoding: raw\nbyte skip: 3\n\n", b"abc" + VALUES.tobytes()),
    "skip gzip.nrrd": (NRRD + "encoding: gzip\nbyte skip: 3\n\n", gzip.compress(b"abc" + VALUES.tobytes())),
    "end.nrrd": (NRRD + "encoding: raw\nbyteskip: -1\n\n", b"a header" + VALUES.tobytes()),
    "case.nrrd": (NRRD.upper().replace("BIG", "Big") + "Encoding: Raw\nA:=1\na:=2\n\n", VALUES.tobytes()),
    "windows.nrrd": ((NRRD + "# a: comment\nkey:=value: 1\nencoding: raw\n\n").replace("\n", "\r\n"), VALUES.tobytes()),
    "local.mhd": (META + "ElementDataFile = LOCAL\n", VALUES.tobytes()),
    "text.mha": (META + "BinaryData = False\nElementDataFile = LOCAL\n", TEXT),
    "colon.mha": (META.replace("=", ":") + "ElementDataFile : LOCAL\n", VALUES.tobytes()),
    "gzip.mha": (META + "CompressedData = True\nElementDataFile = LOCAL\n", gzip.compress(VALUES.tobytes())),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_values_are_unpacked_however_they_are_packed(tmp_path, name):
    text, content = PACKINGS[name]
    (tmp_path / name).write_bytes(text.encode() + content)
    shown = read(tmp_path / name, window=(127.5, 255))
    np.testing.assert_array_equal(np.stack([pixels[..., 0] for pixels in shown.values()]).ravel(), VALUES)


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.mhd", META + "HeaderSize = 5\nElementDataFile = v/x.raw\n"),
     ("x.mhd", META + "HeaderSize = -1\nElementDataFile = ./v/x.raw"),
     ("x.nhdr", NRRD + "encoding: raw\nbyte skip: -1\ndata file: v/x.raw"),
     ("x.nhdr", NRRD + "encoding: raw\ndatafile: v/x.raw\nbyte skip: 5\n")],
)  # fmt: skip
def test_a_data_file_may_have_a_header_of_its_own(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "x.raw").write_bytes(b"12345" + VALUES.tobytes())
    shown = read(tmp_path / name, window=(127.5, 255))
    np.testing.assert_array_equal(np.stack([pixels[..., 0] for pixels in shown.values()]).ravel(), VALUES)


@pytest.mark.parametrize("kinds", ["complex domain domain", "domain domain list", "vector domain domain"])
def test_kinds_of_axes_say_what_they_count(tmp_path, kinds):
    values = np.array([[3, 4], [6, 8], [5, 12], [0, 0]], "<f4")  # complex numbers of the magnitudes 5, 10, 13, 0
    (tmp_path / "x.nrrd").write_bytes(
        f"NRRD0005\ntype: float\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nendian: little\nkinds: {kinds}\n\n".encode()
        + values.tobytes()
    )
    shown = [pixels[..., 0].ravel().tolist() for pixels in read(tmp_path / "x.nrrd", window=(127.5, 255)).values()]
    first, second = ([3, 6, 5, 0], [4, 8, 12, 0]) if kinds.startswith("vector") else ([3, 4, 6, 8], [5, 12, 0, 0])
    assert shown == ([[5, 10, 13, 0]] if kinds.startswith("complex") else [first, second])


@pytest.mark.parametrize(
    "place",
    ["/etc/passwd", "../../x.raw", "a/../../x.raw", "s3://bucket/x.raw", "http://host/x", "file:///etc/passwd", ".."]
    + ["C:\\x.raw", "..\\x.raw", "a\0b", ""],
)
@pytest.mark.parametrize("name", ["x.mhd", "x.nhdr"])
def test_no_header_leads_out_of_its_folder(place, name):
    with pytest.raises(ImageError, match=r"^unreadable: x keeps its data in .*; the data file must lie in the same"):
        check_data_file(place, "x")
    text = f"{META}ElementDataFile = {place}\n" if name == "x.mhd" else f"{NRRD}encoding: raw\ndata file: {place}\n"
    with pytest.raises(ImageError, match=r"^(unreadable|corrupt): x\.(mhd|nhdr)"):
        FORMATS[kind_of(name)].load().list_images(io.BytesIO(text.encode()), name, None, Look())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.mhd", META + "ElementDataFile = LIST\na.raw\nb.raw\n", "keeps its data in several files"),
        ("x.mhd", META + "ElementDataFile = a%03d.raw 1 9 1\n", "keeps its data in several files"),
        ("x.nhdr", NRRD + "encoding: raw\ndata file: LIST\na.raw", "keeps its data in several files"),
        ("x.nhdr", NRRD + "encoding: raw\ndata file: a%d.raw 1 9 1", "keeps its data in several files"),
        ("x.nrrd", NRRD + "encoding: hex\n\n", "has the encoding 'hex', which is not read"),
        ("x.nrrd", NRRD.replace("short", "block") + "encoding: raw\n\n", "has values of the type 'block'"),
        ("x.nrrd", NRRD + "encoding: raw\nkinds: list domain vector\n\n", "fewer than two axes of space"),
        ("x.nrrd", NRRD.replace("endian: big\n", "") + "encoding: raw\n\n", "states no byte order"),
        ("x.nrrd", "P5 3 4 255", "its NRRD header is damaged"),
        ("x.nrrd", NRRD.replace("4 3 2", "4 3") + "encoding: raw\n\n", "has the sizes"),
        ("x.nrrd", NRRD.replace("4 3 2", "4 -3 2") + "encoding: raw\n\n", "has the sizes"),
        ("x.nrrd", NRRD.replace("4 3 2", "4 3 2000000") + "encoding: bzip2\n\n", "more than 1,000,000 slices"),
        ("x.nrrd", NRRD + "encoding: raw\n\nabc", "fewer than its header needs"),
        ("x.nrrd", NRRD + "a: b\n" * 300_000, "its header is longer than 1 MiB"),
        ("x.mha", META.replace("4 3 2", "0 3 2") + "ElementDataFile = LOCAL\n", "has the sizes"),
        ("x.mha", META.replace("SHORT", "STRING") + "ElementDataFile = LOCAL\n", "has the type 'MET_STRING'"),
        ("x.mha", "ObjectType = Tube\n" + META + "ElementDataFile = LOCAL\n", "holds another object than an image"),
        ("x.mha", META + "ElementNumberOfChannels = 0\nElementDataFile = LOCAL\n", "has 0 channels"),
        ("x.mha", META + "ElementSpacing = 1 2\nElementDataFile = LOCAL\n", "its MetaImage header is damaged"),
        ("x.mha", META + "ElementDataFile = LOCAL\nabc", "fewer than its header needs"),
    ],
    ids=range(20),
)  # fmt: skip
def test_what_is_not_read_is_said_when_it_is_listed(name, text, message):
    with pytest.raises(ImageError, match=message):
        FORMATS[kind_of(name)].load().list_images(io.BytesIO(text.encode()), name, None, Look())


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_listing_reads_the_header_only(name):
    class Lazy(io.BytesIO):
        num_read = 0

        def read(self, size=-1):
            content = super().read(size)
            self.num_read += len(content)
            return content

    sizes = "300 300 300"
    text = NRRD + "encoding: raw\n\n" if name == "x.nrrd" else META + "ElementDataFile = LOCAL\n"
    file = Lazy(text.replace("4 3 2", sizes).encode() + bytes(2 * 300**3))
    assert len(FORMATS[kind_of(name)].load().list_images(file, name, None, Look())[0]) == 300
    assert file.num_read < 20_000


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("x.nrrd", NRRD + "encoding: bzip2\n\n", bz2.compress(bytes(50 << 20))),
        ("x.nrrd", NRRD + "encoding: gzip\n\n", gzip.compress(bytes(50 << 20))),
        ("x.mha", META + "CompressedData = True\nElementDataFile = LOCAL\n", zlib.compress(bytes(50 << 20))),
    ],
    ids=["bzip2", "gzip", "zlib"],
)
def test_a_bomb_is_not_unpacked(name, text, content):
    module = FORMATS[kind_of(name)].load()
    tracemalloc.start()
    assert module.open_images(text.encode() + content, name, limits())("slice=1").pixels.shape == (3, 4, 3)
    large = text.replace("4 3 2", "512 512 90").encode() + content
    with pytest.raises(ImageError, match="too_large: .*47,185,920 uncompressed bytes"):
        module.open_images(large, name, limits(max_pixels=1 << 20, max_bytes=1 << 20))
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    with pytest.raises(ImageError, match=r"too_large: .*is 512 x 512 = 262,144 pixels"):
        module.open_images(large, name, limits())
    for end in (-1, len(text) + 20, len(text)):
        with pytest.raises(ImageError, match="corrupt"):
            module.open_images(
                (text.encode() + content)[:end].replace(b"4 3 2", b"512 512 200"), name, limits(max_pixels=1 << 20)
            )


# --- in archives


def list_and_read(uri, **options):
    """The rows of an INPUT, and the pixels or the error of each."""
    rows = list(open_archive(str(uri), ("polyp",), **options).rows)
    found = {}
    for number, opening in open_images(rows, limits(window=(127.5, 255))):
        try:
            content, selector = opening()
            found[rows[number]["image_id"]] = content.decode(selector).pixels[..., 0]
        except ImageError as error:
            found[rows[number]["image_id"]] = str(error)
    return found


def write_pairs(put):
    """Write an Analyze pair, a packed NIfTI pair, and volumes with detached data, by `put(name, content)`."""
    for name, kind, pack in (("a", "analyze", bytes), ("b", "nifti1", gzip.compress)):
        header, values = save_pair(kind, BODY)
        put(f"{name}.hdr", header)
        put(f"{name}.img" + (".gz" if pack is gzip.compress else ""), pack(values))
    put("c d%20.mhd", (META + "ElementDataFile = c d%20.raw\n").encode())
    put("c d%20.raw", VALUES.tobytes())
    put("e.nhdr", (NRRD + "encoding: gzip\ndata file: sub/e.gz\n").encode())
    put("sub/e.gz", gzip.compress(VALUES.tobytes()))


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_pairs_in_a_folder_are_one_source_each(tmp_path, s3_folder, store):
    folder = str(tmp_path) if store == "disk" else s3_folder
    write_pairs(lambda name, content: storage.write_bytes(f"{folder}/{name}", content))
    found = list_and_read(folder)
    counts = {"a.hdr": 4, "b.hdr": 4, "c d%20.mhd": 2, "e.nhdr": 2}
    assert sorted(found) == [f"{name}#slice={number}" for name, count in counts.items() for number in range(count)]
    for name in ("c d%20.mhd", "e.nhdr"):
        shown = [found[f"{name}#slice={number}"] for number in (0, 1)]
        np.testing.assert_array_equal(np.stack(shown).ravel(), VALUES)
    expected = FORMATS["nifti"].load().open_images(save(BODY, None), "x.nii", limits(window=(127.5, 255)))
    for name, number in itertools.product("ab", range(4)):
        np.testing.assert_array_equal(found[f"{name}.hdr#slice={number}"], expected(f"slice={number}").pixels[..., 0])


def test_a_list_may_name_either_file_of_a_pair(tmp_path):
    write_pairs(lambda name, content: storage.write_bytes(f"{tmp_path}/{name}", content))
    (tmp_path / "b.hdr").rename(tmp_path / "b.HDR")
    (tmp_path / "b.img.gz").rename(tmp_path / "b.IMG.gz")
    (tmp_path / "list.csv").write_text("image_uri\na.hdr\na.img\nb.IMG\nz.img\n")
    rows = list(open_archive(str(tmp_path / "list.csv"), ("polyp",)).rows)
    assert {row["image_uri"] for row in rows[:8]} == {f"{tmp_path}/a.hdr"}
    found = list_and_read(tmp_path / "list.csv")
    np.testing.assert_array_equal(found["a.img#slice=2"], found["a.hdr#slice=2"])
    np.testing.assert_array_equal(found["b.IMG#slice=2"], found["a.hdr#slice=2"])
    assert found["z.img"] == f"missing: there is no file {tmp_path}/z.hdr"
    for name in ("a.img", "*.img"):  # as INPUT
        assert list_and_read(tmp_path / name).keys() == {f"a.hdr#slice={number}" for number in range(4)}


def test_a_header_without_its_values_is_one_failed_row(tmp_path):
    (tmp_path / "a.hdr").write_bytes(save_pair("nifti1", BODY)[0])
    (tmp_path / "c.mhd").write_text(META + "ElementDataFile = gone.raw\n")
    (tmp_path / "d.mhd").write_text(META + "ElementDataFile = /etc/passwd\n")
    outside = "keeps its data in '/etc/passwd'; the data file must lie in the same folder"
    assert list_and_read(tmp_path) == {
        "a.hdr": f"missing: there is no file {tmp_path}/a.img",
        "c.mhd": f"missing: there is no file {tmp_path}/gone.raw",
        "d.mhd": f"unreadable: {tmp_path}/d.mhd {outside}",
    }


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_must_be_whole(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    whole = PACKINGS["local.mhd"][0].encode() + VALUES.tobytes()
    members = {
        "w.mha": whole,
        "n.nrrd": (NRRD + "encoding: raw\ndata file: e.raw\n").encode(),
        "e.raw": VALUES.tobytes(),
    }
    write_pairs(members.__setitem__)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in members.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(path, "w") as packed:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    found = list_and_read(path)
    refused = "keeps its values in a second file, which is not read inside a tar or zip; unpack it before the run"
    for name in ("a.hdr", "b.hdr", "c d%20.mhd", "e.nhdr"):
        assert found.pop(f"x.{kind}#{name}") == f"unreadable: {name} {refused}"
    assert {found.pop(f"x.{kind}#n.nrrd#slice={n}") for n in (0, 1)} == {f"unreadable: {path}#n.nrrd {refused}"}
    np.testing.assert_array_equal(np.stack(list(found.values())).ravel(), VALUES)


HOSTILE = {name: text.encode() + content for name, (text, content) in PACKINGS.items()} | {
    "place.nrrd": (
        NRRD + "encoding: raw\nkinds: domain domain domain\nspace: right-anterior-superior\n"
        "space directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (1,2,3)\n\n"
    ).encode() + VALUES.tobytes(),
    "place.mha": (
        META + "ElementSpacing = 1 2 3\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementDataFile = LOCAL\n"
    ).encode() + VALUES.tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@settings(max_examples=100, deadline=None)
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_volumes_are_pictures_or_errors_of_ours(name, changes, end):
    data, module = mutate(HOSTILE[name], changes, end), FORMATS[kind_of(name)].load()
    try:
        selectors, _ = module.list_images(io.BytesIO(data), name, None, Look())
        module.data_files(data, name)
        image = module.open_images(data, name, limits(max_bytes=1 << 20))(selectors[-1]).pixels
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large", "unreadable")
    else:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
