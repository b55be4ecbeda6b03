import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from vlsm.errors import ImageError
from vlsm.images.decode import decode_image, decode_mask_file, decode_picture, list_images
from vlsm.images.formats import Look
from vlsm.images.preprocess import ImageSpec, Square


def encode(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def picture():
    """Left half red, right half blue, top row white: orientation and channels can be told."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = 200
    pixels[:, 30:, 2] = 200
    pixels[:8] = 255
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_decode_to_the_same_pixels(picture, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(Image.fromarray(picture), kind, **options), "x")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(picture, decoded)


def test_jpeg_decodes_close_to_the_original(picture):
    decoded = decode_image(encode(Image.fromarray(picture), "JPEG", quality=98, subsampling=0), "x")
    assert np.abs(decoded.astype(int) - picture).mean() < 3


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_jpegs_have_the_pixels_that_pillow_gives(mode, options):
    smooth = Image.fromarray(np.random.default_rng(3).integers(0, 255, (9, 7, 3), dtype=np.uint8)).resize((61, 83))
    data = encode(smooth.convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(expected, decode_image(data, "x"))
    np.testing.assert_array_equal(expected, decode_image(data + b"what cameras append", "x"))


def test_alpha_is_dropped_not_blended(picture):
    rgba = np.dstack([picture, np.full(picture.shape[:2], 10, np.uint8)])
    np.testing.assert_array_equal(picture, decode_image(encode(Image.fromarray(rgba)), "x"))


def test_palette_becomes_rgb(picture):
    palette = Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(np.asarray(palette.convert("RGB")), decode_image(encode(palette), "x"))


def test_cmyk_jpeg_keeps_its_colours(picture):
    decoded = decode_image(encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=98), "x")
    assert np.abs(decoded.astype(int) - picture).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_full_range(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode_image(encode(Image.fromarray(ramp), kind), "x")
    np.testing.assert_array_equal(np.arange(256).reshape(16, 16), decoded[..., 0])
    assert (decoded == decoded[..., :1]).all()


def test_float_tiff_is_scaled_from_its_minimum_to_its_maximum():
    values = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)
    decoded = decode_image(encode(Image.fromarray(values), "TIFF"), "x")
    assert (decoded.min(), decoded.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_have_three_equal_channels(mode):
    grey = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (6, 3))).convert(mode)
    decoded = decode_image(encode(grey), "x")
    np.testing.assert_array_equal(np.tile([0, 255], (6, 3)), decoded[..., 0])
    assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(picture, orientation):
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](picture)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(picture, decode_image(encode(stored, exif=exif), "x"))


def test_one_pixel_is_an_image():
    assert (1, 1, 3) == decode_image(encode(Image.new("RGB", (1, 1), "red")), "x").shape


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello, I am no image at all", "x.png is not a JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "x.png"),
        (b"GIF89a" + b"\0" * 100, "x.png is not a JPEG"),
    ],
)
def test_what_is_no_image_is_corrupt(data, words):
    with pytest.raises(ImageError, match=words) as caught:
        decode_image(data, "x.png")
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_a_truncated_file_is_corrupt_not_half_an_image(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(ImageError, match=r"^corrupt: scan\.jpg"):
        decode_image(data[: len(data) // 2], "scan.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encode(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match="too_large"):
        decode_image(bomb, "bomb.png")


def test_the_pixel_limit_is_the_callers():
    image = encode(Image.new("L", (50, 40)))
    assert decode_image(image, "x", max_pixels=2000).shape == (40, 50, 3)
    with pytest.raises(ImageError, match=r"50 x 40 = 2,000 pixels; max_pixels is 1,999"):
        decode_image(image, "x", max_pixels=1999)


DEEP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG2000"])
@pytest.mark.parametrize(
    ("values", "rule"),
    [(DEEP * 16, "full range"), (DEEP, "contrast"), (DEEP + 20_000, "contrast"), (DEEP >> 2, "contrast")],
)
def test_16_bits_with_a_narrow_range_have_contrast(kind, values, rule):
    picture = decode_picture(encode(Image.fromarray(values), kind), "x")
    assert picture.rule == rule
    span = 65535 if rule == "full range" else values.max() - values.min()
    expected = (values - (0 if rule == "full range" else values.min())) / span * 255
    assert np.abs(picture.pixels[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_colours_are_not_cut_to_their_high_byte(channels):
    values = np.stack([DEEP, DEEP.T, DEEP[::-1], np.full_like(DEEP, 7)], axis=-1)[..., :channels]
    if channels == 2:
        values = np.stack([DEEP, np.full_like(DEEP, 7)], axis=-1)
    pixels = decode_image(imagecodecs.png_encode(np.ascontiguousarray(values.squeeze())), "x")
    expected = (values[..., :3] if channels > 2 else np.dstack([DEEP] * 3)) / 4095 * 255
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000"])
def test_more_formats_that_pillow_reads(picture, kind):
    options = {"GIF": {}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}, "JPEG2000": {"irreversible": False}}[kind]
    decoded = decode_image(encode(Image.fromarray(picture), kind, **options), "x")
    assert np.abs(decoded.astype(int) - picture).max() <= (6 if kind == "AVIF" else 0)


def chunk(kind, content, is_damaged=False):
    checksum = zlib.crc32(kind + content) ^ is_damaged
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0text", is_damaged=True),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + b"no zlib data"),
        chunk(b"iCCP", b"profile\0\0" + b"no zlib data"),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA", b"\0", is_damaged=True),
    ],
    ids=lambda extra: extra[4:8].decode(),
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_damage_in_ancillary_chunks_of_a_png_leaves_the_pixels(depth, extra, place):
    data = encode(Image.fromarray(DEEP if depth == 16 else (DEEP >> 4).astype(np.uint8)))
    at = 33 if place == "before" else data.index(b"IEND") - 4
    expected = decode_image(data, "x")
    damaged = data[:at] + extra + data[at:]
    np.testing.assert_array_equal(expected, decode_image(damaged, "x"))
    assert list_images(io.BytesIO(damaged), "x.png", None, Look())[1] == (64, 64)
    broken = bytearray(damaged)
    broken[broken.index(b"IDAT") + 20] ^= 255
    with pytest.raises(ImageError, match="^corrupt"):
        decode_image(bytes(broken), "x")


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_lacks_only_its_end_or_is_corrupt(depth):
    data = encode(Image.fromarray(DEEP if depth == 16 else (DEEP >> 4).astype(np.uint8)))
    for end in (-1, -5, -8, -12):
        np.testing.assert_array_equal(decode_image(data, "x"), decode_image(data[:end], "x"))
    for end in (-40, -len(data) // 3):
        with pytest.raises(ImageError, match="^corrupt"):
            decode_image(data[:end], "x")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_lacks_only_its_end_marker_or_is_corrupt(mode, options):
    noise = np.random.default_rng(3).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).resize((160, 120)).convert(mode), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    for end in (-2, -1):
        np.testing.assert_array_equal(decode_image(data, "x"), decode_image(data[:end], "x"))
    for end in (-6, -40, -len(data) // 3):
        with pytest.raises(ImageError, match="^corrupt"):
            decode_image(data[:end], "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG2000"])
def test_labels_of_16_bits_are_compared_as_they_are_stored(kind):
    labels = np.array([[0, 1, 127, 200, 256, 300, 65535]] * 8, np.uint16)
    for threshold in (0, 127, 200):
        np.testing.assert_array_equal(
            labels > threshold, decode_mask_file(encode(Image.fromarray(labels), kind), "x", threshold)
        )


def test_black_and_white_masks_are_255_and_palettes_count_by_colour():
    values = np.array([[0, 1, 1, 0]] * 4, bool)
    np.testing.assert_array_equal(values, decode_mask_file(encode(Image.fromarray(values)), "x", 127))
    palette = Image.fromarray(values.astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 0, 200, 0])
    np.testing.assert_array_equal(values, decode_mask_file(encode(palette), "x", 127))


def test_normalized_images_are_what_the_formula_says():
    import torch

    images = np.random.default_rng(1).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    spec = ImageSpec(4, (0.5, 0.4, 0.3), (0.2, 0.1, 0.4))
    expected = ((images / 255 - np.array(spec.mean)) / np.array(spec.std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(spec.normalize(torch.from_numpy(images)).numpy(), expected, atol=1e-5)


def test_resizing_averages_instead_of_skipping_pixels():
    checkers = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))
    resized = Square(16).resize_image(np.dstack([checkers] * 3))
    assert resized.shape == (16, 16, 3)
    assert np.abs(resized.astype(int) - 127).max() < 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (33, 31), (64, 64), (531, 622)])
@pytest.mark.parametrize("size", [64, 224])
def test_resized_images_are_a_level_from_pillows_at_most(shape, size):
    noise = np.random.default_rng(2).integers(0, 2, (*shape, 3), dtype=np.uint8) * 255
    expected = np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(Square(size).resize_image(noise[:, ::-1][:, ::-1]).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("bits", "channels"), [(12, 3), (16, 3), (16, 4), (12, 1), (16, 2)])
def test_deep_jpeg_2000_has_its_highest_values(bits, channels):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    values = np.stack([levels, levels.T, levels[::-1], levels[:, ::-1]], axis=-1)[..., :channels]
    deep = (values * ((2**bits - 1) / 255)).round().astype(np.uint16)
    data = imagecodecs.jpeg2k_encode(deep.squeeze(), level=0, bitspersample=bits, codecformat="jp2", reversible=True)
    expected = values[..., :3] if channels > 2 else np.dstack([levels] * 3)
    np.testing.assert_array_equal(expected, decode_image(data, "x.jp2"))  # Pillow: 65535 becomes 0


def interlaced(values):
    """A 16-bit PNG with the seven passes of Adam7 (PNG, 8.2)."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes() for x, y, right, down in passes for row in values[y::down, x::right]
    )
    head = struct.pack(">IIBBBBB", *values.shape[::-1], 16, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_deep_pngs_write_nothing_to_stderr(capfd):
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(DEEP)), "x"), decode_image(interlaced(DEEP), "x"))
    colours = imagecodecs.png_encode(np.dstack([DEEP] * 3))
    for extra in (chunk(b"iCCP", b"x\0\0no profile"), chunk(b"gAMA", b"1")):
        np.testing.assert_array_equal(
            decode_image(colours, "x"), decode_image(colours[:33] + extra + colours[33:], "x")
        )
    assert capfd.readouterr().err == ""


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
LEVELS_12 = (LEVELS * (4095 / 255)).round().astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "expected", "most"),
    [
        (imagecodecs.jpeg8_encode(LEVELS_12, level=100, bitspersample=12), LEVELS, 1),
        (imagecodecs.jpeg8_encode(np.dstack([LEVELS_12] * 3), level=100, bitspersample=12), LEVELS, 2),
        (imagecodecs.jpeg8_encode(LEVELS_12, bitspersample=12, lossless=True), LEVELS, 0),
        (imagecodecs.jpeg8_encode(LEVELS.astype(np.uint16) * 257, bitspersample=16, lossless=True), LEVELS, 0),
        (imagecodecs.jpegls_encode(LEVELS), LEVELS, 0),
        (imagecodecs.jpegls_encode(LEVELS.astype(np.uint16) * 257), LEVELS, 0),
        (imagecodecs.jpegls_encode(np.dstack([LEVELS] * 3)), LEVELS, 0),
    ],
)
def test_jpegs_of_other_processes(data, expected, most):
    np.testing.assert_allclose(decode_image(data, "x.jpg"), np.dstack([expected] * 3), atol=most)
    assert list_images(io.BytesIO(data), "x.jpg", None, Look())[1] == (16, 16)
    with pytest.raises(ImageError, match="^too_large"):
        decode_image(data, "x.jpg", max_pixels=255)
    with pytest.raises(ImageError, match="^corrupt"):
        decode_image(data[: len(data) // 2], "x.jpg")
    with pytest.raises(ImageError, match="^corrupt"):
        decode_image(data[:-20], "x.jpg")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("colour", [0, 200])
def test_a_mask_may_be_in_the_alpha_channel_only(colour, channels, depth):
    mask = np.eye(8, dtype=bool)
    values = np.full((8, 8, channels), colour, np.uint16 if depth == 16 else np.uint8)
    values[..., -1] = mask * (2**depth - 1)
    np.testing.assert_array_equal(mask, decode_mask_file(imagecodecs.png_encode(values), "x.png", 127))
    values[:4, :, 0] = colour + 50  # the colours say something: alpha does not count
    expected = values[..., :-1].max(axis=2) > 127
    np.testing.assert_array_equal(expected, decode_mask_file(imagecodecs.png_encode(values), "x.png", 127))


def test_a_jpeg_2000_whose_codestream_is_larger_than_its_header_is_refused():
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    data = bytearray(imagecodecs.jpeg2k_encode(levels, level=0, codecformat="jp2"))
    assert decode_picture(bytes(data), "x.jp2").pixels.shape == (64, 64, 3)
    place = data.index(b"ihdr") + 4
    data[place : place + 8] = struct.pack(">II", 8, 8)
    with pytest.raises(ImageError):
        decode_picture(bytes(data), "x.jp2", max_pixels=100)  # else 4,096 pixels were decoded
