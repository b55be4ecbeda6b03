"""Images as callers of the library give them: each kind becomes what a run sees of the same file."""

import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from vlsm.errors import ImageError
from vlsm.images.decode import decode_image
from vlsm.images.given import as_list, open_given

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (14, 22, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def read(image):
    return open_given(image, "the image")()


def turned(mode, format_name, **options):
    """A file with an EXIF orientation, as bytes."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RGB).convert(mode).save(file, format_name, exif=exif, **options)
    return file.getvalue()


def saved(image, format_name, **options):
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


FILES = {
    "L": saved(Image.fromarray(GREY), "PNG"),
    "1": saved(Image.fromarray(GREY > 128), "PNG"),
    "LA": saved(Image.fromarray(RGB).convert("LA"), "PNG"),
    "RGB": saved(Image.fromarray(RGB), "PNG"),
    "RGBA": saved(Image.fromarray(np.dstack([RGB, GREY])), "PNG"),
    "P": saved(Image.fromarray(RGB).quantize(16), "PNG"),
    "P with transparency": saved(Image.fromarray(RGB).quantize(16), "PNG", transparency=3),
    "I;16": saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "I;16 of 12 bits": saved(Image.fromarray(GREY.astype(np.uint16) * 16), "PNG"),
    "I;16 in TIFF": saved(Image.fromarray(GREY.astype(np.uint16) * 16), "TIFF"),
    "F": saved(Image.fromarray(GREY.astype(np.float32) / 7 - 3), "TIFF"),
    "CMYK": saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "YCbCr": saved(Image.fromarray(RGB), "JPEG"),
    "turned": turned("RGB", "JPEG"),
    "turned grey": turned("L", "PNG"),
    "turned TIFF": turned("RGB", "TIFF"),
    "WebP": saved(Image.fromarray(RGB), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_way_to_give_a_file_shows_what_a_run_sees(kind, tmp_path):
    data = FILES[kind]
    expected = decode_image(data, kind)
    path = tmp_path / "x#1.bin"  # neither the ending nor the # matters
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as opened, path.open("rb") as file:
        for given in (data, bytearray(data), memoryview(data), file, opened, path, str(path), f"file://{path}"):
            np.testing.assert_array_equal(read(given), expected)
    assert expected.shape == ((22, 14, 3) if "turned" in kind else (14, 22, 3))


def test_an_image_of_pillow_that_never_was_a_file():
    np.testing.assert_array_equal(read(Image.fromarray(RGB)), RGB)
    np.testing.assert_array_equal(read(Image.fromarray(RGB).crop((2, 3, 9, 8))), RGB[3:8, 2:9])
    big_endian = Image.frombytes("I;16B", (22, 14), (GREY.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(read(big_endian)[..., 0], GREY)
    with pytest.raises(ValueError, match="the image has 0 x 5 pixels"):
        read(Image.new("RGB", (0, 5)))


def test_arrays_of_all_layouts():
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(read(GREY), expected)
    np.testing.assert_array_equal(read(GREY[..., None]), expected)
    np.testing.assert_array_equal(read(RGB[..., ::-1]), RGB[..., ::-1])
    np.testing.assert_array_equal(read(np.dstack([RGB, GREY])), RGB)
    np.testing.assert_array_equal(read(np.asfortranarray(RGB)), RGB)


@pytest.fixture
def files(tmp_path):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "three.tif", save_all=True, append_images=[Image.fromarray(RGB[::-1]), image])
    image.save(tmp_path / "one.tif")
    nib.save(nib.Nifti1Image(RNG.normal(size=(20, 30, 5)).astype(np.float32), np.eye(4)), tmp_path / "v.nii.gz")
    nib.save(nib.Nifti1Image(RNG.normal(size=(20, 30, 1)).astype(np.float32), np.eye(4)), tmp_path / "slice.nii")
    image.save(tmp_path / "moves.gif", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    (tmp_path / "run#2").mkdir()
    with zipfile.ZipFile(tmp_path / "run#2" / "z.zip", "w") as archive:
        archive.write(tmp_path / "three.tif", "a/three.tif")
        archive.writestr("a/x.png", FILES["RGB"])
    return tmp_path


def test_a_selector_says_which_image_of_a_file_is_meant(files):
    np.testing.assert_array_equal(read(f"{files}/three.tif#page=1"), RGB[::-1])
    np.testing.assert_array_equal(read(f"{files}/run#2/z.zip#a/x.png"), RGB)
    np.testing.assert_array_equal(read(f"{files}/run#2/z.zip#a/three.tif#page=1"), RGB[::-1])
    assert read(f"{files}/v.nii.gz#slice=2").shape == (30, 20, 3)


def test_the_only_image_of_a_file_needs_no_selector(files):
    np.testing.assert_array_equal(read(files / "one.tif"), RGB)
    assert read(files / "slice.nii").shape == (30, 20, 3)
    assert read(files / "moves.gif").shape == RGB.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three.tif", r"three\.tif holds 3 images; name one, as /.*/three\.tif#page=0, or"),
        ("v.nii.gz", r"v\.nii\.gz holds 5 images; name one, as /.*#slice=0"),
        ("run#2/z.zip", r"z\.zip is an archive; name an image of it"),
        ("run#2/z.zip#a/three.tif", r"a/three\.tif holds 3 images; name one, as /.*#a/three\.tif#page=0"),
        ("", "is a folder; give a list of its files"),
        ("no.png", "missing: there is no file"),
    ],
)
def test_files_that_are_not_one_image_say_so(files, name, message):
    with pytest.raises(ImageError, match=message) as caught:
        read(files / name)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_one_image_say_so(files):
    with pytest.raises(ImageError, match="the image holds 3 images; name one, as FILE#page=0"):
        read((files / "three.tif").read_bytes())
    with pytest.raises(ImageError, match="the image has 0 bytes"):
        read(b"")
    with pytest.raises(ImageError, match="the image is not a JPEG"):
        read(b"text")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RGB / 255, r"float64 of shape \(14, 22, 3\).*\(array \* 255\)\.round\(\)\.astype\('uint8'\)"),
        (RGB.astype(np.uint16), "uint16 .*a range that you choose"),
        (GREY > 3, r"bool .*: array\.astype\('uint8'\) \* 255"),
        (RGB.transpose(2, 0, 1), r"\(3, 14, 22\).*array\.transpose\(1, 2, 0\)"),
        (RGB[..., :2], r"\(14, 22, 2\).*give several as a list"),
        (RGB[:0], "a pixel at least"),
    ],
)
def test_arrays_that_need_a_decision_say_how_to_convert_them(array, message):
    with pytest.raises(ValueError, match=message):
        open_given(array, "the image")


def test_other_types_are_refused_in_one_sentence(tmp_path):
    import torch

    with pytest.raises(TypeError, match=r"image 1 has the type torch\.Tensor; .*permute\(1, 2, 0\)"):
        open_given(torch.zeros(3, 4, 4, dtype=torch.uint8), "image 1")
    with pytest.raises(TypeError, match=r"image 1 has the type list; give a path"):
        open_given([1, 2], "image 1")
    with pytest.raises(TypeError, match="open it with mode 'rb'"):
        open_given(io.StringIO("x"), "image 1")()
    for nothing in (None, 5, {"a": RGB}):
        with pytest.raises(TypeError, match=f"images has the type {type(nothing).__name__}; give a path"):
            as_list(nothing)


def test_one_image_is_told_from_many():
    one = [RGB, GREY, "x.png", b"", io.BytesIO(), Image.fromarray(RGB), np.array("x.png")]
    assert [len(as_list(image)[0]) for image in one if as_list(image)[1]] == [1] * len(one)
    many = [[RGB], (GREY,), np.stack([RGB]), np.array(["x.png"]), iter(["x.png"])]
    assert [(len(images), is_one) for images, is_one in map(as_list, many)] == [(1, False)] * len(many)


def test_the_limit_of_pillow_in_the_callers_program_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    (tmp_path / "x.png").write_bytes(FILES["RGB"])
    read(tmp_path / "x.png")
    assert Image.MAX_IMAGE_PIXELS == 12345


def test_a_url_is_an_image_too(files):
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=files)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            np.testing.assert_array_equal(read(f"{url}/one.tif?signature=1"), RGB)
            np.testing.assert_array_equal(read(f"{url}/three.tif#page=1"), RGB[::-1])
            with pytest.raises(ImageError, match="missing: there is no file http"):
                read(f"{url}/no.png")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_the_bytes_of_a_dicom_file_that_begins_as_a_tiff_are_dicom(name):
    path = Path(get_testdata_file(name))
    assert path.read_bytes().startswith(b"II*\0")
    np.testing.assert_array_equal(read(path.read_bytes()), read(path))
