import gzip
import io
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_hostile import edits, mutate
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.formats import Look
from vlsm.images.nifti import data_files, list_images, open_images, read_header

RAS = np.diag([1.0, 1, 1, 1])


def save(array, affine=RAS, kind=nib.Nifti1Image, slope=None, cal=(0, 0)):
    image = kind(array, affine, dtype=array.dtype)
    if slope:
        image.header.set_slope_inter(*slope)
    image.header["cal_min"], image.header["cal_max"] = cal
    return image.to_bytes()


def limits(axis="axial", window=None, max_pixels=100_000, max_bytes=1 << 31):
    run = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    changed = {"slices": axis, "window": window, "max_pixels": max_pixels, "max_image_bytes": max_bytes}
    return run.model_copy(update=changed)


def decode(data, selector="slice=0", axis="axial", window=None):
    return open_images(data, "x.nii", limits(axis, window))(selector).pixels


def read_grid(file, name, axis):
    return read_header(file, name, axis).grid


def list_slices(file, name, axis):
    return read_grid(file, name, axis).selectors()


def grey(*args, **options):
    image = decode(*args, **options)
    assert image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    return image[..., 0]


# Every voxel of 2 x 3 x 4 has its own value: 100 x + 10 y + z, towards right, front and head.
BODY = (100 * np.arange(2)[:, None, None] + 10 * np.arange(3)[:, None] + np.arange(4)).astype(np.uint8)

SHOWN = {
    ("axial", 1): [[121, 21], [111, 11], [101, 1]],  # front row first, right column first; z is 1
    ("coronal", 2): [[123, 23], [122, 22], [121, 21], [120, 20]],  # head first, right first; y is 2
    ("sagittal", 1): [[123, 113, 103], [122, 112, 102], [121, 111, 101], [120, 110, 100]],  # head, front; x is 1
}

# The same body, stored otherwise: which axis of the body each stored axis follows, and in which direction.
STORED = {
    "right, front, head": ([0, 1, 2], [1, 1, 1]),
    "left, back, head (as DICOM)": ([0, 1, 2], [-1, -1, 1]),
    "front, foot, right": ([1, 2, 0], [1, -1, 1]),
    "foot, left, back": ([2, 0, 1], [-1, -1, -1]),
}


def store(order, directions, tilt=0.0):
    array = np.ascontiguousarray(BODY.transpose(order)[tuple(slice(None, None, way) for way in directions)])
    affine = np.zeros((4, 4))
    for stored, (body, way) in enumerate(zip(order, directions, strict=True)):
        affine[body, stored] = way * (0.5 + stored)  # voxels are no cubes
        affine[(body + 1) % 3, stored] = tilt
    affine[:, 3] = 7, -8, 9, 1
    return array, affine


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tilt", [0.0, 0.1])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_body_is_shown_the_same_however_it_is_stored(stored, tilt, kind):
    array, affine = store(*STORED[stored], tilt)
    data = save(array, affine, kind, cal=(0, 255))
    for (axis, number), expected in SHOWN.items():
        for content in (data, gzip.compress(data)):
            np.testing.assert_array_equal(expected, grey(content, f"slice={number}", axis))
    canonical = nib.as_closest_canonical(kind(array, affine))
    np.testing.assert_array_equal(np.asarray(canonical.dataobj), BODY)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_masks_of_slices_go_back_to_where_they_came_from(stored, axis):
    array, affine = store(*STORED[stored])
    data = save(array, affine, cal=(0, 255))
    grid = read_grid(io.BytesIO(data), "x", axis)
    back = np.zeros((*grid.shape, grid.num_volumes), np.uint8)
    for selector in grid.selectors():
        grid.slice_of(back, selector)[...] = grey(data, selector, axis)
    np.testing.assert_array_equal(back[..., 0], array)
    assert grid.affine.tolist() == affine.tolist()


def test_selectors_name_every_slice_along_the_axis():
    array, affine = store(*STORED["front, foot, right"])
    data = io.BytesIO(save(array, affine))
    assert list_slices(data, "x", "sagittal") == ["slice=0", "slice=1"]
    assert list_slices(data, "x", "coronal") == ["slice=0", "slice=1", "slice=2"]
    four = gzip.compress(save(np.zeros((2, 3, 2, 2), np.int16)))
    assert list_slices(io.BytesIO(four), "x", "axial") == [
        f"volume={volume},slice={number}" for volume in (0, 1) for number in (0, 1)
    ]
    assert list_slices(io.BytesIO(save(np.zeros((2, 3, 2, 1), np.int16))), "x", "axial") == ["slice=0", "slice=1"]
    assert list_slices(io.BytesIO(save(np.zeros((2, 3), np.int16))), "x", "axial") == ["slice=0"]


def test_listing_reads_the_header_only():
    class Lazy(io.BytesIO):
        num_read = 0

        def read(self, size=-1):
            content = super().read(size)
            self.num_read += len(content)
            return content

    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 50), dtype=np.uint8)
    for data in (save(noise), gzip.compress(save(noise))):
        file = Lazy(data)
        assert len(list_slices(file, "x", "axial")) == 50
        assert file.num_read < 150_000


def test_each_volume_has_its_own_slices_and_range():
    both = np.stack([BODY, BODY // 2], axis=3)
    data = save(both)
    np.testing.assert_array_equal(grey(data, "volume=0,slice=1"), grey(save(BODY), "slice=1"))
    np.testing.assert_array_equal(grey(data, "volume=1,slice=1"), grey(save(BODY // 2), "slice=1"))


LINE = np.array([[[0], [50], [100], [150], [200]]], np.int16)  # one column, from the back to the front


def column(*args, **options):
    return grey(*args, **options)[::-1, 0].tolist()


def test_windows_are_in_scaled_units():
    data = save(LINE, slope=(2, -1000))
    assert column(data, window=(-800, 400)) == [0, 64, 128, 191, 255]
    assert column(data, window=(-800, 200)) == [0, 0, 128, 255, 255]


def test_the_headers_display_range_counts_and_then_the_contrast():
    assert column(save(LINE, cal=(50, 150))) == [0, 0, 128, 255, 255]
    assert column(save(LINE, cal=(150, 50))) == column(save(LINE))
    assert column(save(LINE)) == [0, 64, 128, 191, 255]
    assert column(save(LINE + 1000, cal=(0, 255))) == column(save(LINE)), "a range without values is ignored"
    for useless in ((0, np.inf), (-1e30, 1e30), (100, 100), (np.nan, np.nan)):
        assert column(save(LINE, cal=useless)) == column(save(LINE)), "a range that shows nearly one level is ignored"
    rare = np.zeros((40, 40, 1), np.float32)
    rare[3, 5] = 7
    assert grey(save(rare)).max() == 255
    assert grey(save(np.zeros((4, 4, 1), np.float32))).max() == 0


def test_what_is_no_number_is_black():
    values = LINE.astype(np.float32)
    values[0, 1], values[0, 3] = np.nan, np.inf
    assert column(save(values), window=(100, 200)) == [0, 0, 128, 0, 255]
    assert column(save(values))[1::2] == [0, 0]


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.float64, ">i2", ">f4"]
)
def test_every_kind_of_number_is_shown_alike(dtype):
    assert column(save((LINE // 2).astype(dtype)), window=(50, 100)) == [0, 64, 128, 191, 255]


def test_a_large_volume_is_sampled_evenly_and_the_same_each_time():
    ramp = np.broadcast_to(np.arange(512, dtype=np.uint16)[:, None, None], (512, 128, 64))  # along the rows
    data = save(np.asfortranarray(ramp))
    row = grey(data, "slice=3")[0, ::-1].astype(int)
    assert np.abs(row - np.clip((np.arange(512) - 2) * 255 / 507, 0, 255)).max() <= 2
    np.testing.assert_array_equal(grey(data, "slice=3"), grey(data, "slice=3"))


def test_no_float_copy_of_a_volume_is_made():
    data = save(np.zeros((256, 256, 128), np.uint16))
    tracemalloc.start()
    open_images(data, "x", limits("sagittal", (0, 1)))("slice=5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colours_stay_as_they_are(channels):
    pixels = np.zeros((2, 3, 1), [(channel, "u1") for channel in channels])
    pixels[1, 2, 0] = tuple(range(10, 10 + len(channels)))
    shown = decode(save(pixels))
    assert shown.shape == (3, 2, 3)
    assert shown[0, 0].tolist() == [10, 11, 12]


def header(**fields):
    data = bytearray(save(BODY))
    head = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        head[name] = value
    data[:348] = head.binaryblock
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt"),
        (b"hello, I am no volume", "corrupt"),
        (save(BODY)[:-1], "corrupt"),
        (gzip.compress(save(BODY))[:-30], "corrupt"),
        (gzip.compress(save(BODY))[:-8] + bytes(8), "corrupt"),  # the checksum
        (header(magic=b"ni1"), "corrupt"),
        (header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "corrupt"),
        (header(dim=[3, -2, 3, 4, 1, 1, 1, 1]), "corrupt"),
        (header(dim=[0] * 8), "corrupt"),
        (header(datatype=77), "unreadable"),
        (header(datatype=1), "unreadable"),  # bits
        (header(vox_offset=np.nan), "corrupt"),
        (header(vox_offset=0), "corrupt"),
        (header(vox_offset=1e9), "corrupt"),
        (save(np.zeros((400, 300, 1), np.uint8)), "too_large"),
        (gzip.compress(save(np.zeros((1, 1, 1_500_000), np.uint8), kind=nib.Nifti2Image)), "too_large"),
        (gzip.compress(save(np.zeros((300, 300, 300), np.uint8))), "too_large"),
    ],
    ids=lambda value: f"{len(value)}_bytes" if isinstance(value, bytes) else value,  # gzip writes the time
)
def test_what_is_damaged_or_too_large_is_an_error_of_ours(data, reason):
    with pytest.raises(ImageError, match=rf"^{reason}: x\.nii") as caught:
        open_images(data, "x.nii", limits(max_bytes=20_000_000))("slice=0")
    assert caught.value.__cause__ is None


def test_a_bomb_is_not_unpacked():
    bomb = gzip.compress(header(dim=[3, 2, 3, 4, 1, 1, 1, 1]) + bytes(100 << 20))
    large = gzip.compress(save(np.zeros((256, 256, 999), np.uint8)))
    tracemalloc.start()
    assert grey(bomb).shape == (3, 2)  # what the header does not tell of is not looked at
    with pytest.raises(ImageError, match="too_large"):
        open_images(large, "x", limits(max_pixels=10**6, max_bytes=1 << 20))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


TURNED = np.array([[0, 0, -2.0, 5], [-3, 0, 0, 6], [0, 4, 0, 7], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("fields", "affine"),
    [
        ({"sform_code": 1, "srow_x": [0] * 4, "qform_code": 1}, TURNED),
        ({"sform_code": 1, "srow_y": [np.nan] * 4, "qform_code": 3}, TURNED),
        ({"sform_code": 4, "srow_x": [1, 0, 0, 0], "srow_y": [1, 0, 0, 0], "qform_code": 1}, TURNED),  # rank 2
        ({"sform_code": 2, "srow_z": [np.inf, 0, 0, 0], "qform_code": 0}, None),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": np.nan}, None),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 7}, None),  # no rotation
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 2, 0, 0, 0, 0, 0, 0]}, TURNED),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, np.nan, -3, np.inf, 0, 0, 0, 0]}, TURNED),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [0] * 8}, None),
        ({"sform_code": 2, "qform_code": 0, "qoffset_x": np.nan}, TURNED),
        ({"sform_code": 2, "srow_x": [*TURNED[0, :3], np.nan]}, TURNED),  # a place that is none; the directions count
    ],
    ids=str,
)
def test_an_affine_that_is_none_is_passed_over_for_the_next_one(fields, affine):
    """sform, then qform, then the voxel sizes, as ITK does for zeros; sizes of 0 are 1, as nibabel and ITK do."""
    image = nib.Nifti1Image(BODY, TURNED)
    image.header.set_qform(TURNED, 1)
    image.header.set_sform(TURNED, 1)
    data = bytearray(image.to_bytes())
    head = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        head[name] = value
    data[:348] = head.binaryblock
    expected = nib.Nifti1Image(BODY, affine)  # without an affine, nibabel takes the voxel sizes
    for axis in ("axial", "coronal", "sagittal"):
        np.testing.assert_array_equal(grey(bytes(data), axis=axis), grey(expected.to_bytes(), axis=axis))


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, ">c8"])
def test_complex_numbers_are_shown_as_their_magnitude(dtype):
    levels = np.arange(0, 256, 5)[None, :, None]
    data = save((levels * np.exp(1j * levels / 30)).astype(dtype))
    np.testing.assert_allclose(np.abs(np.asarray(nib.Nifti1Image.from_bytes(data).dataobj)), levels, rtol=1e-6)
    assert column(data) == column(data, window=(127.5, 255)) == levels.ravel().tolist()


PAIRS = {
    "nifti1": nib.Nifti1Pair,
    "nifti2": nib.Nifti2Pair,
    "analyze": nib.AnalyzeImage,
    "spm99": nib.Spm99AnalyzeImage,
    "spm2": nib.Spm2AnalyzeImage,
}


def save_pair(kind, array, affine=None):
    """The (header, values) of a pair."""
    image = PAIRS[kind](array, affine)
    image.file_map = {name: nib.FileHolder(fileobj=io.BytesIO()) for name in image.file_map}
    image.to_file_map()
    return tuple(image.file_map[name].fileobj.getvalue() for name in ("header", "image"))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_is_one_volume(kind, is_packed):
    affine = TURNED if kind.startswith("nifti") else None
    header, values = save_pair(kind, BODY.astype(np.int16), affine)
    expected = save(BODY.astype(np.int16), affine)
    if is_packed:
        values = gzip.compress(values)
    for content, name in ((header, "x.hdr"), (gzip.compress(header), "x.hdr.gz")):
        assert list_slices(io.BytesIO(content), name, "axial") == list_slices(io.BytesIO(expected), "x.nii", "axial")
        decode_pair = open_images(content, name, limits(), values)
        for selector in list_slices(io.BytesIO(content), name, "axial"):
            np.testing.assert_array_equal(decode_pair(selector).pixels[..., 0], grey(expected, selector))
        with pytest.raises(ImageError, match="corrupt: x.hdr"):
            open_images(content, name, limits(), values[:-3])


def test_the_names_of_the_second_file_follow_the_first():
    header, _ = save_pair("nifti1", BODY)
    assert data_files(header, "a/x.hdr") == ("x.img", "x.img.gz")
    assert data_files(gzip.compress(header), "x.hdr.gz") == ("x.img.gz", "x.img")
    assert data_files(header, "X.HDR") == ("X.IMG", "X.IMG.gz")
    assert data_files(save(BODY), "x.hdr") == ()  # a whole file of another name
    assert data_files(save(BODY), "x.nii") == ()


@pytest.mark.parametrize("content", [b"#?RADIANCE\nFORMAT", b"ENVI\nsamples = 3"])
def test_headers_of_other_formats_hold_no_images(content):
    assert list_images(io.BytesIO(content), "x.hdr", None, Look()) == ([], (0, 0))


@pytest.mark.parametrize("selector", ["slice=4", "volume=1,slice=0", "frame=0", "slice=-1", "slice=1x", ""])
def test_a_slice_that_is_not_there_is_corrupt(selector):
    with pytest.raises(ImageError, match=r"corrupt: x\.nii has no"):
        decode(save(BODY), selector)


FILES = {
    "nii": save(BODY.astype(np.int16), slope=(2, -1000)),
    "gz": gzip.compress(save(BODY)),
    "nii2": save(BODY.astype(np.float32), kind=nib.Nifti2Image),
    "complex": save(BODY.astype(np.complex64)),
}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=300, deadline=None)
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_volumes_are_pictures_or_errors_of_ours(kind, changes, end):
    data = mutate(FILES[kind], changes, end)
    try:
        selectors = list_slices(io.BytesIO(data), "x", "axial")
        image = open_images(data, "x", limits(max_bytes=1 << 20))(selectors[-1]).pixels
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large", "unreadable")
    else:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


@pytest.mark.parametrize("kind", ["nifti1", "spm2"])
@settings(max_examples=200, deadline=None)
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_pairs_are_pictures_or_errors_of_ours(kind, changes, end):
    header, values = save_pair(kind, BODY)
    header = mutate(header, changes, end)
    try:
        selectors, _ = list_images(io.BytesIO(header), "x.hdr", None, Look())
        if selectors:
            second = values if data_files(header, "x.hdr") else None
            image = open_images(header, "x.hdr", limits(max_bytes=1 << 20), second)(selectors[-1]).pixels
            assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large", "unreadable")
