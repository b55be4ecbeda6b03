import gzip
import io
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_hostile import edits, mutate
from vlsm.errors import ImageError
from vlsm.images.nifti import NiftiImages, list_slices, read_grid

RAS = np.diag([1.0, 1, 1, 1])


def save(array, affine=RAS, kind=nib.Nifti1Image, slope=None, cal=(0, 0)):
    image = kind(array, affine, dtype=array.dtype)
    if slope:
        image.header.set_slope_inter(*slope)
    image.header["cal_min"], image.header["cal_max"] = cal
    return image.to_bytes()


def decode(data, selector="slice=0", axis="axial", window=None):
    return NiftiImages(data, "x.nii", 100_000, window, axis).decode(selector).pixels


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
    NiftiImages(data, "x", 100_000, (0, 1), "sagittal").decode("slice=5")
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
        (header(datatype=77), "corrupt"),
        (header(datatype=32), "corrupt"),  # complex
        (header(vox_offset=np.nan), "corrupt"),
        (header(vox_offset=0), "corrupt"),
        (header(vox_offset=1e9), "corrupt"),
        (header(sform_code=1, srow_x=[np.nan] * 4), "corrupt"),
        (header(sform_code=1, srow_x=[0] * 4), "corrupt"),
        (save(np.zeros((400, 300, 1), np.uint8)), "too_large"),
        (gzip.compress(save(np.zeros((1, 1, 1_500_000), np.uint8), kind=nib.Nifti2Image)), "too_large"),
        (gzip.compress(save(np.zeros((300, 300, 300), np.uint8))), "too_large"),
    ],
    ids=lambda value: f"{len(value)}_bytes" if isinstance(value, bytes) else value,  # gzip writes the time
)
def test_what_is_damaged_or_too_large_is_an_error_of_ours(data, reason):
    with pytest.raises(ImageError, match=rf"^{reason}: x\.nii") as caught:
        NiftiImages(data, "x.nii", 100_000, None, "axial", max_bytes=20_000_000).decode("slice=0")
    assert caught.value.__cause__ is None


def test_a_bomb_is_not_unpacked():
    bomb = gzip.compress(header(dim=[3, 2, 3, 4, 1, 1, 1, 1]) + bytes(100 << 20))
    large = gzip.compress(save(np.zeros((256, 256, 999), np.uint8)))
    tracemalloc.start()
    assert grey(bomb).shape == (3, 2)  # what the header does not tell of is not looked at
    with pytest.raises(ImageError, match="too_large"):
        NiftiImages(large, "x", 10**6, None, "axial", 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("selector", ["slice=4", "volume=1,slice=0", "frame=0", "slice=-1", "slice=1x", ""])
def test_a_slice_that_is_not_there_is_corrupt(selector):
    with pytest.raises(ImageError, match=r"corrupt: x\.nii has no"):
        decode(save(BODY), selector)


FILES = {
    "nii": save(BODY.astype(np.int16), slope=(2, -1000)),
    "gz": gzip.compress(save(BODY)),
    "nii2": save(BODY.astype(np.float32), kind=nib.Nifti2Image),
}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=300, deadline=None)
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_volumes_are_pictures_or_errors_of_ours(kind, changes, end):
    data = mutate(FILES[kind], changes, end)
    try:
        selectors = list_slices(io.BytesIO(data), "x", "axial")
        image = NiftiImages(data, "x", 100_000, None, "axial", max_bytes=1 << 20).decode(selectors[-1]).pixels
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large")
    else:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
