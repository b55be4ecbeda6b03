"""Stored grey values of DICOM objects: bits, padding, missing elements, windows and tables."""

import imagecodecs
import numpy as np
import pytest
from pydicom import uid

from tests.images.test_dicom import ROW, compressed, decode, grey, items, make, save
from vlsm.errors import ImageError

TWELVE = np.array([[0, 1000, 2000, 4095]], np.uint16)
SIGNED = np.array([[-2048, -1, 0, 2047]], np.int16)
PADDED = np.array([[-2000, 0, 100, 200]], np.int16)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless])
@pytest.mark.parametrize("high_bit", [11, 13, 15])
def test_values_end_at_their_high_bit_and_other_bits_are_ignored(high_bit, syntax):
    shift = high_bit - 11
    noise = 0xFFFF >> 4 + shift << 12 + shift & 0xFFFF if shift < 4 else 0  # overlays once stood above the values
    for values, center, expected in ((TWELVE, 2048, [[0, 62, 125, 255]]), (SIGNED, 0, [[0, 127, 128, 255]])):
        stored = ((values.view(np.uint16) & 0xFFF) << shift | noise | (1 << shift) - 1).view(values.dtype)
        dataset = make(stored, uid.ExplicitVRLittleEndian if syntax == uid.RLELossless else syntax)
        dataset.BitsStored, dataset.HighBit, dataset.WindowCenter, dataset.WindowWidth = 12, high_bit, center, 4096
        if syntax == uid.RLELossless:
            dataset.compress(syntax, encoding_plugin="pydicom")
        assert grey(dataset) == expected


@pytest.mark.parametrize("high_bit", [0, 7, 16])
def test_a_high_bit_that_does_not_fit_is_taken_as_missing(high_bit):
    dataset = make(TWELVE, BitsStored=12, HighBit=high_bit, WindowCenter=2048, WindowWidth=4096)
    assert grey(dataset) == [[0, 62, 125, 255]]


def test_values_without_gaps():
    packed = bytes([0x01, 0xC0, 0xAB, 0x23, 0xF1, 0xFF, 0x00, 0x70, 0x00, 0])
    dataset = make(np.zeros((2, 3), np.uint16), BitsAllocated=12, BitsStored=12, HighBit=11, PixelData=packed)
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    values = np.array([[0x001, 0xABC, 0x123], [0xFFF, 0x000, 0x007]])
    assert grey(dataset) == (values / 4095 * 255 + 0.5).astype(int).tolist()
    bits = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1] + [0, 1, 1, 0, 1, 0, 0, 1, 1], np.uint8)  # frames begin inside bytes
    dataset = make(np.zeros((1, 9), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, NumberOfFrames=2)
    dataset.PixelData = np.packbits(bits, bitorder="little").tobytes() + b"\0"
    assert [grey(dataset, frame)[0] for frame in (0, 1)] == (bits.reshape(2, 9) * 255).tolist()


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<u8"])
def test_wide_integers(dtype):
    limits = np.iinfo(dtype)
    middle = limits.min // 2 + limits.max // 2 + 1
    assert grey(make(np.array([[limits.min, middle, limits.max]], dtype))) == [[0, 128, 255]]


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_floats_need_no_description_of_bits(keyword, dtype):
    dataset = make(ROW)
    for element in ("PixelData", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, element)
    setattr(dataset, keyword, np.array([[-1, 0, np.nan, np.inf, 1]], dtype).tobytes())
    assert grey(dataset) == [[0, 128, 0, 0, 255]]


def padded(pixels, vr, *values, syntax=uid.ExplicitVRLittleEndian, **elements):
    dataset = make(pixels, syntax, **elements)
    for tag, value in zip((0x00280120, 0x00280121), values, strict=False):
        dataset.add_new(tag, vr, value)
    return dataset


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (padded(PADDED, "US", 63536), [0, 0, 128, 255]),
        (padded(PADDED, "US", 63536, syntax=uid.ImplicitVRLittleEndian), [0, 0, 128, 255]),
        (padded(PADDED.view(np.uint16), "SS", -2000), [0, 0, 128, 255]),
        (padded(PADDED & 0xFFF, "US", 2096, BitsStored=12, HighBit=11), [0, 0, 128, 255]),
        (padded(PADDED.view(np.uint16), "US", 63536, BitsStored=12, HighBit=11), [0, 0, 128, 255]),
        (padded(PADDED, "SS", -32768, -1000), [0, 0, 128, 255]),
        (padded(PADDED, "SS", -1000, -32768), [0, 0, 128, 255]),
        (padded(PADDED, "US", 63536, 64536), [0, 0, 128, 255]),
        (padded(np.array([[65535, 0, 100, 200]], np.uint16), "US", 65535), [0, 0, 128, 255]),
        # 65535 is no padding of 12 bits: 4095 is the highest value too
        (padded(np.array([[0, 900, 3100, 4095]], np.uint16), "US", 65535, BitsStored=12), [0, 56, 193, 255]),
        (padded(np.array([[5, 5, 5, 5]], np.uint16), "US", 5), [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_padding_with_the_wrong_sign_or_width_is_padding(dataset, expected):
    assert grey(dataset) == [expected]


def test_padding_is_black_also_if_it_is_above_all_values_or_black_is_the_highest():
    pixels = np.array([[65535, 0, 100, 200]], np.uint16)
    assert grey(padded(pixels, "US", 65535, PhotometricInterpretation="MONOCHROME1")) == [[0, 255, 127, 0]]


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_missing_elements_have_the_value_that_nearly_all_objects_have(syntax):
    optional = ("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "HighBit", "PixelRepresentation")
    for missing in (*((keyword,) for keyword in optional), optional):
        dataset = padded(ROW, "US", 60_000, syntax=syntax)
        for keyword in missing:
            delattr(dataset, keyword)
        assert grey(dataset) == [[0, 64, 128, 191, 255]]
    colours = make(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), syntax)
    expected = colours.pixel_array
    del colours.PlanarConfiguration, colours.PhotometricInterpretation
    np.testing.assert_array_equal(expected, decode(colours))


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated"])
def test_a_missing_element_without_a_plain_default_is_named(keyword):
    dataset = make(ROW)
    delattr(dataset, keyword)
    with pytest.raises(ImageError, match=f"^corrupt: x.dcm: frame 0 cannot be decoded: its header has no {keyword}$"):
        grey(dataset)


def with_texts(center, width, slope="1", intercept="0"):
    data = save(
        make(ROW, WindowCenter="1111111", WindowWidth="2222222", RescaleSlope="33333", RescaleIntercept="444444")
    )
    for old, new in (("1111111", center), ("2222222", width), ("33333", slope), ("444444", intercept)):
        data = data.replace(old.encode(), new.ljust(len(old)).encode())
    return data


@pytest.mark.parametrize(
    "texts",
    [
        ("100,5", "201,0"),
        ("100.5", "201"),
        ("50,5", "101,0", "0,5"),
        ("1,005e2", "2,01E2"),
        ("\\100,5", "\\201"),  # the first window is empty
        ("7\\100.5", "0\\201"),  # its width is 0
        ("100.5\\7", "201"),
        ("", ""),  # the range of the values is the same
        ("100.5", ""),
        ("100.5", "-5"),
    ],
)
def test_windows_as_devices_write_them(texts):
    assert grey(with_texts(*texts)) == [[0, 64, 128, 191, 255]]


def test_a_slope_of_zero_counts_as_missing():
    assert grey(make(ROW, RescaleSlope=0, RescaleIntercept=-100)) == [[0, 64, 128, 191, 255]]


def test_a_text_that_is_no_number_is_named_but_not_quoted():
    with pytest.raises(ImageError, match="cannot be decoded: its WindowWidth is not a number$") as caught:
        grey(with_texts("100", "SMITH"))
    assert "SMITH" not in str(caught.value)


@pytest.mark.parametrize(
    ("depth", "entries"),
    [
        (8, [0, 85, 170, 255]),
        (12, [0, 1365, 2730, 4095]),
        (16, [0, 21845, 43690, 65535]),
        (16, [0, 85, 170, 255]),  # only low bytes
    ],
)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_lookup_tables_of_every_depth(keyword, syntax, depth, entries):
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    for data, vr in ((np.array(entries).astype(f"{order}u2").tobytes(), "OW"), (entries, "US")):
        table = items(LUTDescriptor=[4, 10, depth], LUTData=data)
        table[0]["LUTData"].VR = vr
        dataset = make(np.array([[0, 10, 11, 12, 13, 99]], np.uint16), syntax, **{keyword: table})
        assert grey(dataset) == [[0, 0, 85, 170, 255, 255]]


def test_a_table_may_begin_below_zero():
    table = items(LUTDescriptor=[4, -2, 8], LUTData=b"\x00\x10\x80\xff")
    table[0]["LUTData"].VR = "OW"
    stored = np.array([[-5, -2, -1, 0, 1, 9]], np.int16)
    assert grey(make(stored, VOILUTSequence=table)) == [[0, 0, 16, 128, 255, 255]]


def test_lossless_jpegs_of_every_precision():
    y, x = np.mgrid[:33, :47]
    for bits in (2, 8, 10, 12, 13, 16):
        values = ((x * 977 + y * 131) % (1 << bits)).astype(np.uint8 if bits <= 8 else np.uint16)
        stream = imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=bits)
        dataset = compressed([stream], 33, 47, uid.JPEGLosslessSV1, SamplesPerPixel=1, BitsStored=bits)
        dataset.PhotometricInterpretation, dataset.HighBit = "MONOCHROME2", bits - 1
        dataset.BitsAllocated = 8 if bits <= 8 else 16
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (bits - 1), 2**bits
        assert grey(dataset) == np.floor(values / (2**bits - 1) * 255 + 0.5).astype(int).tolist()


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"WindowCenter": 0, "WindowWidth": 1}, [0, 64, 128, 191, 255]),  # all of its values are white
        ({"WindowCenter": 1, "WindowWidth": 1}, [0, 255, 255, 255, 255]),
        ({"WindowCenter": 1 << 15, "WindowWidth": 1 << 16}, [0, 64, 128, 191, 255]),  # all of its values are black
        ({"WindowCenter": 100, "WindowWidth": 4000, "RescaleSlope": "0.0001"}, [0, 64, 128, 191, 255]),
        ({"WindowCenter": 100, "WindowWidth": 400}, [64, 96, 128, 160, 192]),
    ],
)
def test_a_window_that_shows_nearly_one_level_is_ignored(elements, expected):
    assert grey(make(ROW, **elements)) == [expected]
    dataset = make(np.full((1, 5), 7, np.uint16), **elements)
    assert len(set(grey(dataset)[0])) == 1


@pytest.mark.parametrize("bits_stored", [0, 17])
def test_a_number_of_bits_that_is_not_possible_counts_as_missing(bits_stored):
    assert grey(make(ROW, BitsStored=bits_stored)) == [[0, 64, 128, 191, 255]]


@pytest.mark.parametrize("end", [-2, -6])
def test_pixels_that_are_missing_are_said(end):
    dataset = make(ROW)
    dataset.PixelData = dataset.PixelData[:end]
    with pytest.raises(ImageError, match="cannot be decoded: the file has fewer bytes than its pixels need$"):
        grey(dataset)


@pytest.mark.parametrize("options", [{"level": 95}, {"level": 95, "bitspersample": 12}, {"lossless": True}])
def test_a_jpeg_that_ends_early_is_corrupt_not_half_a_picture(options):
    y, x = np.mgrid[:33, :47]
    bits = options.get("bitspersample", 8)
    values = (x * 4 + y).astype(np.uint8 if bits == 8 else np.uint16)
    stream = imagecodecs.jpeg8_encode(values, **options)
    syntax = {8: uid.JPEGBaseline8Bit, 12: uid.JPEGExtended12Bit}[bits]

    def frame(stream):
        dataset = compressed([stream], 33, 47, syntax, SamplesPerPixel=1, BitsStored=bits, HighBit=bits - 1)
        dataset.BitsAllocated, dataset.PhotometricInterpretation = 8 if bits == 8 else 16, "MONOCHROME2"
        return grey(dataset)

    whole = frame(stream)
    if options == {"level": 95}:
        assert frame(stream[:-2]) == whole
    for end in (-20, -len(stream) // 3):
        with pytest.raises(ImageError, match="^corrupt: .*its JPEG codestream ends early$"):
            frame(stream[:end])
