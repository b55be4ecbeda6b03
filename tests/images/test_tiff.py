"""TIFF files of every depth, layout and meaning. tifffile writes them; the expected levels are computed here."""

import io
import itertools
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.images.test_decode import encode
from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.decode import decode_image, decode_mask_file, decode_picture
from vlsm.images.formats import Look
from vlsm.images.grey_levels import CONTRAST, FULL_RANGE, STORED, WINDOW
from vlsm.images.tiff import list_images, open_images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=-1)


def write(*pages, **options):
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=options.pop("bigtiff", False)) as tiff:
        for page in pages:
            values, *rest = page if isinstance(page, tuple) else (page,)
            tiff.write(values, **{"contiguous": False, "metadata": None, **options, **(rest[0] if rest else {})})
    return file.getvalue()


def decode(data, window=None):
    picture = decode_picture(data, "x.tif", window=window)
    assert picture.pixels.dtype == np.uint8 and picture.pixels.ndim == 3
    return picture


def assert_close(expected, pixels, most=1):
    np.testing.assert_allclose(pixels[..., 0].astype(int), expected, atol=most)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (RAMP, STORED),
        (RAMP.astype(np.uint16) * 257, FULL_RANGE),
        (RAMP.astype(np.uint16) * 16, CONTRAST),  # 12 bits in 16
        (RAMP.astype(np.uint16) * 16 + 32768, CONTRAST),  # the same as some microscopes write it
        (RAMP.astype(np.uint32) * 16843009, FULL_RANGE),
        (RAMP.astype(np.uint32) * 40, CONTRAST),
        (RAMP.astype(np.int16) - 128, CONTRAST),
        ((RAMP.astype(np.int16) - 128).astype(np.int8), FULL_RANGE),
        (RAMP.astype(np.int32) * 8 - 1024, CONTRAST),
        (RAMP.astype(np.int64) * 8, CONTRAST),
        (RAMP.astype(np.float16) / 255, CONTRAST),
        (RAMP.astype(np.float32) * 15.7 - 1000, CONTRAST),
        (RAMP.astype(np.float64) * 1e30, CONTRAST),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
@pytest.mark.parametrize("is_white_zero", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
def test_every_depth_shows_the_whole_ramp(values, rule, is_white_zero, compression):
    data = write(values, photometric="miniswhite" if is_white_zero else "minisblack", compression=compression)
    picture = decode(data)
    assert picture.rule == rule
    assert_close(255 - RAMP if is_white_zero else RAMP, picture.pixels)


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
@pytest.mark.parametrize("is_white_zero", [False, True])
def test_packed_bits_are_levels_of_their_range(bits, is_white_zero):
    values = (RAMP.astype(np.uint16) >> (8 - bits) if bits < 8 else RAMP.astype(np.uint16) << (bits - 8)).astype(
        np.uint8 if bits < 8 else np.uint16
    )
    packed = imagecodecs.packints_encode(values, bits) if bits >= 8 else None
    if packed is None:
        data = write(values.astype(bool) if bits == 1 else values, photometric="minisblack", bitspersample=bits)
    else:
        data = packed_tiff(values.shape, bits, packed)
    if is_white_zero:  # the tag has a value of two bytes behind its head
        at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
        data = data[:at] + b"\0\0" + data[at + 2 :]
    expected = np.round(values / values.max() * 255)
    picture = decode(data)
    assert picture.rule == (STORED if bits < 8 else FULL_RANGE)
    assert_close(255 - expected if is_white_zero else expected, picture.pixels)


def packed_tiff(shape, bits, packed):
    """A TIFF with one strip of packed big-endian integers; tifffile writes none."""
    tags = [(256, shape[1]), (257, shape[0]), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, shape[0])]
    tags.append((279, len(packed)))
    padded = packed + bytes(len(packed) % 2)
    entries = b"".join(
        struct.pack("<HHIHxx" if tag not in (273, 279) else "<HHII", tag, 3 if tag not in (273, 279) else 4, 1, value)
        for tag, value in tags
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("values", [COLOURS, COLOURS.astype(np.uint16) * 257, COLOURS.astype(np.uint32) * 16843009])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "lzw"}, {"compression": "zlib", "predictor": 2}, {"tile": (16, 16)}]
)
def test_colours_of_every_depth_and_layout(values, planar, options):
    if "predictor" in options and values.dtype == np.uint32 and planar == "separate":
        options = {"compression": "zlib"}
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    data = write(stored, photometric="rgb", planarconfig=planar, **options)
    np.testing.assert_array_equal(COLOURS, decode(data).pixels)


def test_narrow_deep_colours_keep_their_hue():
    assert_close(COLOURS[..., 0], decode(write(COLOURS.astype(np.uint16) * 16, photometric="rgb")).pixels)
    np.testing.assert_allclose(
        decode(write(COLOURS.astype(np.float32) / 255, photometric="rgb")).pixels, COLOURS, atol=1
    )


@pytest.mark.parametrize(
    ("extra", "channels"), [("unassalpha", 4), ("assocalpha", 4), ("unspecified", 4), ("unassalpha", 2)]
)
def test_alpha_is_dropped(extra, channels):
    alpha = np.full((16, 16, 1), 255 if extra == "assocalpha" else 9, np.uint8)
    values = np.concatenate([COLOURS if channels == 4 else RAMP[..., None], alpha], axis=-1)
    data = write(
        values, photometric="rgb" if channels == 4 else "minisblack", extrasamples=[extra], planarconfig="contig"
    )
    np.testing.assert_array_equal(
        values[..., : channels - 1] if channels == 4 else np.dstack([RAMP] * 3), decode(data).pixels
    )


CFA_TAGS = [(33421, 3, 2, (2, 2), True), (33422, 1, 4, b"\0\1\1\2", True)]


def test_colours_that_were_multiplied_with_alpha_are_as_before():
    alpha = np.full((16, 16, 1), 128, np.uint8)
    values = np.concatenate([(COLOURS * (128 / 255)).round().astype(np.uint8), alpha], axis=-1)
    data = write(values, photometric="rgb", extrasamples=["assocalpha"], planarconfig="contig")
    assert np.abs(decode(data).pixels.astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "words"),
    [
        ((8, 8, 4), "u1", {"photometric": "minisblack", "planarconfig": "contig"}, "with 4 channels"),
        ((5, 8, 8), "u2", {"photometric": "minisblack", "planarconfig": "separate"}, "with 5 channels"),
        ((8, 8, 2), "u1", {"photometric": "minisblack", "planarconfig": "contig"}, "with 2 channels"),
        ((8, 8, 5), "u1", {"photometric": "rgb", "planarconfig": "contig"}, "with 5 channels"),
        ((8, 8, 6), "u1", {"photometric": "rgb", "planarconfig": "contig"}, "with 6 channels"),
        ((8, 8), "c8", {"photometric": "minisblack"}, "with complex values"),
        ((8, 8), "u2", {"photometric": "cfa", "extratags": CFA_TAGS}, "with colours of the kind CFA"),
        ((4, 16, 16), "u1", {"photometric": "minisblack", "volumetric": True, "tile": (4, 16, 16)}, "with 4 planes"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_its_name(shape, dtype, options, words):
    with pytest.raises(ImageError, match=f"^unreadable: x.tif is a TIFF {words}"):
        decode_image(write(np.zeros(shape, dtype), **options), "x.tif")


def test_values_that_are_no_values_do_not_count():
    values = RAMP.astype(np.float32)
    for odd in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max, -np.finfo(np.float32).max):
        with_odd = values.copy()
        with_odd[3, :8] = odd
        pixels = decode(write(with_odd)).pixels
        assert_close(np.delete(RAMP, 3, axis=0), np.delete(pixels, 3, axis=0))
    declared = values - 5000 * (RAMP < 100)
    pixels = decode(write(np.where(RAMP < 100, -9999, values), extratags=[(42113, 2, 6, "-9999", True)])).pixels
    assert declared.min() < 0 and pixels[RAMP < 100].max() == 0
    assert (pixels[RAMP == 255].max(), pixels[RAMP == 100].min()) == (255, 0)
    spoiled = values.copy()
    spoiled[0, 0] = -1e6  # no tag declares it
    assert_close(RAMP[1:], decode(write(spoiled)).pixels[1:], most=2)


def test_a_window_replaces_the_rule_for_deep_grey_values_only():
    picture = decode(write(RAMP.astype(np.int16) * 10), window=(1275, 510))
    assert picture.rule == WINDOW
    assert_close(np.clip((RAMP.astype(float) * 10 - 1020) / 2, 0, 255), picture.pixels)
    assert decode(write(RAMP), window=(10, 10)).rule == STORED


@pytest.mark.parametrize("entries", [257, 1])
def test_palettes_of_16_and_of_8_bits(entries):
    colours = COLOURS.reshape(256, 3)
    data = write(RAMP, photometric="palette", colormap=colours.T.astype(np.uint16) * entries)
    np.testing.assert_array_equal(COLOURS, decode(data).pixels)


@pytest.mark.parametrize("compression", ["jpeg", "webp", "jpeg2000", "packbits", "lzma"])
def test_more_compressions_are_read(compression):
    smooth = np.asarray(Image.fromarray(COLOURS[:4, :4]).resize((64, 64)))
    pixels = decode(write(smooth, photometric="rgb", compression=compression)).pixels
    assert np.abs(pixels.astype(int) - smooth).mean() < 4


@pytest.mark.parametrize("kind", ["group3", "group4", "tiff_lzw"])
def test_black_and_white_pages_are_levels_and_masks(kind):
    values = np.kron(np.eye(4), np.ones((8, 8))).astype(bool)
    data = encode(Image.fromarray(values), "TIFF", compression=kind)
    np.testing.assert_array_equal(values * 255, decode(data).pixels[..., 0])
    np.testing.assert_array_equal(values, decode_mask_file(data, "x", 127))


def test_pillows_other_colours_are_read():
    for mode, most in (("CMYK", 2), ("YCbCr", 3), ("LAB", 3)):
        image = Image.fromarray(COLOURS)
        stored = image.convert(mode) if mode != "LAB" else lab(image)
        expected = np.asarray(stored.convert("RGB"))
        assert np.abs(decode(encode(stored, "TIFF")).pixels.astype(int) - expected).max() <= most


def lab(image):
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 1, 200, 300, 65535]], np.uint16),
        np.array([[0, 1, 200, 256, 70000]], np.int32),
        np.array([[0, 1, 200, 256, 70000]], np.uint32),
        np.array([[0, 1, 200, 256, 70000]], np.float32),
        np.array([[0, 1, 128, 200, 255]], np.uint8),
    ],
)
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_labels_are_compared_as_they_are_stored(values, photometric):
    data = write(values, photometric=photometric)
    for threshold in (0, 127, 200):
        np.testing.assert_array_equal(values > threshold, decode_mask_file(data, "x", threshold))


def listed(data):
    return list_images(io.BytesIO(data), "x.tif", len(data), Look())[0]


@pytest.mark.parametrize("bigtiff", [False, True])
def test_pages_have_their_own_depth(bigtiff):
    settings = SegmentSettings(input="", output="", members=[{"checkpoint": "x"}])
    data = write((RAMP,), (RAMP.astype(np.uint16) * 16,), (COLOURS, {"photometric": "rgb"}), bigtiff=bigtiff)
    assert listed(data) == ["page=0", "page=1", "page=2"]
    read = open_images(data, "x.tif", settings)
    assert [read(f"page={page}").rule for page in range(3)] == [STORED, CONTRAST, STORED]
    np.testing.assert_array_equal(COLOURS, read("page=2").pixels)


def page(side, **options):
    return np.zeros((side, side), np.uint8), options


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([page(64, tile=(16, 16)), page(32), page(16)], [None]),
        ([page(64), page(32), page(16)], [None]),
        ([page(63, tile=(16, 16)), page(31)], [None]),
        ([page(64, tile=(16, 16)), page(16), page(4)], [None]),
        ([page(64), page(32)], ["page=0", "page=1"]),  # perhaps two images
        ([page(64), page(64), page(32)], ["page=0", "page=1", "page=2"]),
        ([page(64), page(40), page(16)], ["page=0", "page=1", "page=2"]),
        ([page(64), page(32), page(16), page(50)], ["page=0", "page=3"]),
        ([page(64), page(32, subfiletype=1), page(60)], ["page=0", "page=2"]),
        ([(np.zeros((64, 64), bool), {"subfiletype": 4}), page(64)], ["page=1"]),
    ],
)
def test_reduced_copies_are_no_images_with_and_without_tags(pages, expected):
    assert listed(write(*pages)) == expected


def test_a_list_of_pages_that_breaks_off_is_an_error_and_a_circle_ends_it():
    data = bytearray(write(RAMP, RAMP, RAMP))
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        offsets = [one.offset for one in tiff.pages]
        count = len(tiff.pages[1].tags)
    link = offsets[1] + 2 + 12 * count
    assert struct.unpack_from("<I", data, link)[0] == offsets[2]
    for target, outcome in ((0, 2), (offsets[0], 2), (len(data) + 10, None)):
        struct.pack_into("<I", data, link, target)
        if outcome is None:
            with pytest.raises(ImageError, match="list of pages breaks off"):
                listed(bytes(data))
        else:
            assert len(listed(bytes(data))) == outcome


def test_a_store_that_fails_while_pages_are_listed_does_not_look_like_the_end():
    class Failing(io.BytesIO):
        reads = itertools.count()

        def read(self, size=-1):
            if next(self.reads) == 12:
                raise OSError("the store is away")
            return super().read(size)

    with pytest.raises(ImageError, match="the store is away"):
        list_images(Failing(write(*[RAMP] * 30)), "x.tif", None, Look())


def test_missing_strips_and_bombs_are_errors():
    data = write(np.tile(RAMP, (4, 1)), rowsperstrip=8)
    with pytest.raises(ImageError, match="lies outside"):
        decode_image(data[:-64], "x.tif")  # tifffile writes the pixels behind the tags
    for compression in (8, 5, 50000, 34925, 32773):
        with pytest.raises(ImageError, match=r"^corrupt"):
            decode_image(bomb(compression), "x.tif")


def bomb(compression):
    """A TIFF of 16 x 16 pixels whose strip unpacks to 80 MB."""
    encoders = {8: "zlib", 5: "lzw", 50000: "zstd", 34925: "lzma"}
    if compression == 32773:
        strip = b"\x81\0" * (80 << 13)  # each pair is 128 zeros
    else:
        strip = getattr(imagecodecs, f"{encoders[compression]}_encode")(bytes(80 << 20))
    tags = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, compression),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 16),
        (279, len(strip)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(strip) + len(strip) % 2)
    return head + strip + bytes(len(strip) % 2) + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.uint16) * 16,
        RAMP.astype(np.int16) * 4,
        RAMP.astype(np.uint32) * 16,
        np.dstack([RAMP.astype(np.uint16) * 16] * 3),
    ],
    ids=str,
)
def test_hot_pixels_do_not_make_a_picture_black(values):
    limits = np.iinfo(values.dtype)
    values = np.tile(values, (8, 8) + (1,) * (values.ndim - 2))
    values[0, 0], values[5, 7] = limits.max, limits.min
    picture = decode(write(values, photometric="rgb" if values.ndim == 3 else "minisblack"))
    assert picture.rule == CONTRAST
    assert_close(np.tile(RAMP, (8, 8))[16:], picture.pixels[16:], most=2)


@pytest.mark.parametrize("kind", ["imagej", "shaped"])
@pytest.mark.parametrize("colours", [False, True])
def test_images_behind_the_only_page_are_read(kind, colours):
    planes = np.stack([RAMP, RAMP[::-1], RAMP.T])
    stored = np.stack([planes] * 3, axis=-1) if colours else planes.astype(np.uint16) * 257
    file, options = io.BytesIO(), {"imagej": True} if kind == "imagej" else {}
    tifffile.imwrite(file, stored, truncate=True, photometric="rgb" if colours else "minisblack", **options)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        assert len(tiff.pages) == 1
    assert listed(data) == ["page=0", "page=1", "page=2"]
    read = open_images(data, "x.tif", SegmentSettings(input="", output="", members=[{"checkpoint": "x"}]))
    for number, plane in enumerate(planes):
        assert_close(plane, read(f"page={number}").pixels, most=0)
    with pytest.raises(ImageError, match="^corrupt"):
        read("page=3")


def test_a_mask_may_be_in_the_alpha_channel_only():
    values = np.zeros((16, 16, 4), np.uint8)
    values[..., 3] = RAMP
    data = write(values, photometric="rgb", extrasamples=["unassalpha"], planarconfig="contig")
    np.testing.assert_array_equal(RAMP > 127, decode_mask_file(data, "x", 127))


@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_a_jpeg_tile_that_ends_early_is_corrupt_and_one_without_end_marker_is_whole(photometric):
    smooth = np.asarray(Image.fromarray(COLOURS[:4, :4]).resize((64, 64)))
    values = smooth if photometric == "rgb" else smooth[..., 0]
    data = bytearray(write(values, photometric=photometric, compression="jpeg", tile=(64, 64)))
    expected = decode(bytes(data)).pixels
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        end = tiff.pages[0].dataoffsets[0] + tiff.pages[0].databytecounts[0]
    assert data[end - 2 : end] == b"\xff\xd9"
    data[end - 2 : end] = bytes(2)
    np.testing.assert_array_equal(expected, decode(bytes(data)).pixels)
    data[end - 60 : end] = bytes(60)
    with pytest.raises(ImageError, match=r"^corrupt: x.tif: the JPEG of a strip or tile ends early"):
        decode(bytes(data))


class CountedFile(io.BytesIO):
    """A file that counts the bytes that are read."""

    num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_bytes += len(data)
        return data


def chain(num_pages, num_shared=0, subfile_type=0):
    """A TIFF of 4 x 4 pages that follow each other. Their values lie in the same num_shared x 4 bytes."""
    page_bytes = 2 + 6 * 12 + 4
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(num_pages):
        offsets = (4, num_shared or 1, 8 + num_pages * page_bytes)
        tags = [
            (254, 4, 1, subfile_type),
            (256, 4, 1, 4),
            (257, 4, 1, 4),
            (258, 3, 1, 8),
            (262, 3, 1, 1),
            (273, *offsets),
        ]
        data += struct.pack("<H", 6) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data += struct.pack("<I", 0 if number == num_pages - 1 else len(data) + 4)
    return bytes(data) + bytes(4 * num_shared)


def test_the_pages_of_a_long_chain_are_counted_without_their_values():
    file = CountedFile(chain(2000, num_shared=100_000))  # 2,000 pages that share 400 kB
    selectors, size = list_images(file, "x.tif", None, Look())
    assert (len(selectors), selectors[-1], size) == (2000, "page=1999", (4, 4))
    assert file.num_bytes < 10 * len(file.getvalue())  # all values of all pages would be 800 MB


def test_a_circle_of_pages_ends():
    data = bytearray(chain(150))
    data[-4:] = struct.pack("<I", 8 + 120 * 78)
    assert len(list_images(io.BytesIO(bytes(data)), "x.tif", None, Look())[0]) == 150


def test_more_pages_than_the_limit_are_an_error(monkeypatch):
    monkeypatch.setattr("vlsm.images.tiff_pages.MAX_IMAGES", 20)
    assert len(list_images(io.BytesIO(chain(20)), "x.tif", None, Look())[0]) == 20
    with pytest.raises(ImageError, match="more than 20 pages"):
        list_images(io.BytesIO(chain(21)), "x.tif", None, Look())


def test_a_page_with_too_many_tags_is_an_error():
    data = b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(65535 * 12 + 4)
    with pytest.raises(ImageError, match="tags"):
        list_images(io.BytesIO(data), "x.tif", None, Look())


@pytest.mark.parametrize("bigtiff", [False, True])
def test_a_late_page_that_pillow_decodes_is_the_right_one(bigtiff):
    pages = [np.full((16, 16, 3), 10 * number, np.uint8) for number in range(5)]
    data = write(*pages, photometric="cielab", bigtiff=bigtiff)
    shown = [
        open_images(data, "x.tif", SegmentSettings(input="", output="", members=[{"checkpoint": ""}]))(f"page={n}")
        for n in (1, 4)
    ]
    assert shown[0].pixels.mean() < shown[1].pixels.mean()
