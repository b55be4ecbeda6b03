"""Colours of DICOM objects: what a codestream states is stronger than the header, and palettes of every form."""

import io
import struct

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.pixels.processing import convert_color_space

from tests.images.test_dicom import compressed, decode, jpeg, make, save
from vlsm.errors import ImageError
from vlsm.images.codestreams import codestream_size
from vlsm.images.dicom import count_frames

ROWS, COLUMNS = np.mgrid[:40, :60]
PICTURE = np.stack([COLUMNS * 4, ROWS * 6, 255 - COLUMNS * 4], axis=-1).astype(np.uint8)
PICTURE[10:20, 10:30] = (200, 30, 60)
LUMINANCE = convert_color_space(PICTURE, "RGB", "YBR_FULL")
HEADERS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT")


def segments(stream):
    position = 2
    while True:
        length = 2 + struct.unpack_from(">H", stream, position + 2)[0]
        yield stream[position + 1], position, length
        if stream[position + 1] == 0xDA:
            return
        position += length


def bare(stream):
    """The codestream without JFIF and Adobe segments."""
    kept = [stream[at : at + length] for marker, at, length in segments(stream) if marker not in (0xE0, 0xEE)]
    _, at, length = list(segments(stream))[-1]
    return stream[:2] + b"".join(kept) + stream[at + length :]


def with_ids(stream, ids):
    changed = bytearray(stream)
    for marker, at, _ in segments(stream):
        for number, name in enumerate(ids):
            if 0xC0 <= marker <= 0xC3:
                changed[at + 10 + 3 * number] = name
            elif marker == 0xDA:
                changed[at + 5 + 2 * number] = name
    return bytes(changed)


def with_adobe(stream, transform):
    return stream[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + stream[2:]


YCC = bare(jpeg(PICTURE))
RGB = bare(imagecodecs.jpeg8_encode(PICTURE, level=95, colorspace="RGB", outcolorspace="RGB"))
STREAMS = {
    "JFIF": jpeg(PICTURE),
    "ids 1 2 3": with_ids(YCC, b"\1\2\3"),
    "ids R G B": with_ids(RGB, b"RGB"),
    "ids r g b": with_ids(RGB, b"rgb"),
    "Adobe 0": with_adobe(with_ids(RGB, b"\1\2\3"), 0),
    "Adobe 1": with_adobe(with_ids(YCC, b"\1\2\3"), 1),
    "Adobe 1, ids R G B": with_adobe(with_ids(YCC, b"RGB"), 1),
}


def is_the_picture(dataset, tolerance=2.0):
    """The wrong colour space differs by 55 or more on average."""
    return np.abs(decode(dataset).astype(int) - PICTURE).mean() <= tolerance


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("stream", STREAMS)
def test_jpeg_colours_are_those_that_libjpeg_infers(stream, header):
    assert is_the_picture(compressed([STREAMS[stream]], 40, 60, PhotometricInterpretation=header))
    if stream != "ids r g b":  # here libjpeg guesses YCbCr
        peer = np.asarray(Image.open(io.BytesIO(STREAMS[stream])).convert("RGB"))
        assert np.abs(peer.astype(int) - PICTURE).mean() < 2


@pytest.mark.parametrize(("stream", "header"), [(YCC, "YBR_FULL_422"), (RGB, "RGB")])
def test_the_header_decides_where_libjpeg_would_guess(stream, header):
    assert is_the_picture(compressed([with_ids(stream, b"\0\1\2")], 40, 60, PhotometricInterpretation=header))


@pytest.mark.parametrize("header", (*HEADERS, "YBR_RCT"))
@pytest.mark.parametrize("is_reversible", [True, False])
def test_jpeg_2000_with_a_component_transform_is_rgb(header, is_reversible):
    stream = imagecodecs.jpeg2k_encode(
        PICTURE, level=0 if is_reversible else 60, codecformat="J2K", mct=True, reversible=is_reversible
    )
    syntax = uid.JPEG2000Lossless if is_reversible else uid.JPEG2000
    assert is_the_picture(compressed([stream], 40, 60, syntax, PhotometricInterpretation=header))


@pytest.mark.parametrize(
    ("pixels", "header"), [(PICTURE, "RGB"), (PICTURE, "YBR_RCT"), (LUMINANCE, "YBR_FULL")], ids=["RGB", "RCT", "YBR"]
)
@pytest.mark.parametrize("codec", ["jpeg2k", "jpegls", "lossless"])
def test_other_codecs_without_a_transform_follow_the_header(pixels, header, codec):
    if codec == "jpeg2k":
        stream = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="J2K", mct=False, reversible=True)
    elif codec == "jpegls":
        stream = imagecodecs.jpegls_encode(pixels)
    else:
        stream = imagecodecs.jpeg8_encode(pixels, lossless=True, colorspace="RGB", outcolorspace="RGB")
        stream = with_ids(bare(stream), b"\1\2\3")
    syntax = {"jpeg2k": uid.JPEG2000Lossless, "jpegls": uid.JPEGLSLossless, "lossless": uid.JPEGLosslessSV1}[codec]
    if header == "YBR_RCT" and codec == "lossless":
        header = "RGB"
    assert is_the_picture(compressed([stream], 40, 60, syntax, PhotometricInterpretation=header), 0.5)


def test_htj2k_and_jpeg_xl():
    stream = imagecodecs.htj2k_encode(PICTURE)
    high = save(compressed([stream], 40, 60, uid.HTJ2KLossless, PhotometricInterpretation="YBR_RCT"))
    assert is_the_picture(high, 0)
    # pydicom cannot write the transfer syntax of JPEG XL; it is as long as that of HTJ2K
    for pixels in (PICTURE, PICTURE[..., 0]):
        stream = imagecodecs.jpegxl_encode(pixels, lossless=True)
        dataset = compressed([stream], 40, 60, uid.HTJ2KLossless, SamplesPerPixel=pixels.ndim * 2 - 3)
        dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        image = decode(save(dataset).replace(b"1.2.4.201", b"1.2.4.110"))
        np.testing.assert_array_equal(pixels if pixels.ndim == 3 else np.dstack([pixels] * 3), image)
    wrong = compressed([imagecodecs.jpegxl_encode(PICTURE[:20], lossless=True)], 40, 60, uid.HTJ2KLossless)
    with pytest.raises(ImageError, match=r"^corrupt: x\.dcm: frame 0"):
        decode(save(wrong).replace(b"1.2.4.201", b"1.2.4.110"))


def halved(pixels):
    """The layout of YBR_FULL_422: two luminances, then the colour of the first (PS3.3, C.7.6.3.1.2)."""
    pairs = pixels.reshape(40, 30, 2, 3)
    return np.stack([pairs[:, :, 0, 0], pairs[:, :, 1, 0], pairs[:, :, 0, 1], pairs[:, :, 0, 2]], axis=-1).tobytes()


def test_uncompressed_luminance():
    assert is_the_picture(make(LUMINANCE, PhotometricInterpretation="YBR_FULL"), 0.5)
    planes = np.ascontiguousarray(LUMINANCE.transpose(2, 0, 1)).tobytes()
    planar = make(LUMINANCE, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=1, PixelData=planes)
    assert is_the_picture(planar, 0.5)
    assert is_the_picture(make(LUMINANCE, PhotometricInterpretation="YBR_FULL_422", PixelData=halved(LUMINANCE)))
    # software that decompresses often leaves the name: the number of bytes tells
    assert is_the_picture(make(LUMINANCE, PhotometricInterpretation="YBR_FULL_422"), 0.5)
    partial = np.rint((LUMINANCE - (0.0, 128, 128)) * (219 / 255, 224 / 255, 224 / 255) + (16, 128, 128))
    partial = halved(partial.astype(np.uint8))
    assert is_the_picture(make(LUMINANCE, PhotometricInterpretation="YBR_PARTIAL_422", PixelData=partial))


def test_jpegs_of_12_bits_and_of_other_processes():
    grey = (COLUMNS * 60 + ROWS * 5).astype(np.uint16)
    for syntax, options in ((uid.JPEGExtended12Bit, {"level": 100}), (uid.JPEGLosslessSV1, {"lossless": True})):
        stream = imagecodecs.jpeg8_encode(grey, bitspersample=12, **options)
        dataset = compressed([stream], 40, 60, syntax, SamplesPerPixel=1, BitsAllocated=16, BitsStored=12, HighBit=11)
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 2048, 4096, "LINEAR_EXACT"
        assert np.abs(decode(dataset)[..., 0].astype(int) - grey / 4096 * 255).max() <= 1
    with open(get_testdata_file("JPGExtended.dcm", download=False), "rb") as file:
        shown = decode(file.read())[..., 0]
    uncompressed = pydicom.dcmread(get_testdata_file("JPEG-lossy.dcm", download=False))
    assert shown.shape == (uncompressed.Rows, uncompressed.Columns) and np.ptp(shown) > 100


def test_a_sequence_delimiter_inside_of_a_codestream_is_part_of_it():
    stream = imagecodecs.jpeg2k_encode(PICTURE, level=0, codecformat="J2K", mct=True, reversible=True)
    comment = b"\xff\x64" + struct.pack(">HH", 12, 0) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    place = stream.index(b"\xff\x52")
    stream = stream[:place] + comment + stream[place:]
    assert codestream_size(stream) == (40, 60, 3)
    assert is_the_picture(compressed([stream], 40, 60, uid.JPEG2000Lossless), 0)


WORDS = np.array([0, 0x4000, 0x8000, 0xFFFF])
LOW = np.array([0, 64, 128, 255])
SYNTAXES = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)


def palette(entries, depth, data, syntax=uid.ExplicitVRLittleEndian, indices=(0, 1, 2, 3), first=0, prefix=""):  # noqa: PLR0913
    dataset = make(np.atleast_2d(np.array(indices)), syntax, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [entries, first, depth])
        setattr(dataset, f"{prefix}{colour}PaletteColorLookupTableData", data)
        dataset[f"{prefix}{colour}PaletteColorLookupTableData"].VR = "OW"
    return dataset


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("form", ["16", "low bytes", "8 in 16", "8 in 8", "16 with 8 in 8", "segmented"])
def test_every_form_of_a_palette(form, syntax):
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    depth = 8 if form.startswith("8") else 16
    data = (WORDS if form == "16" else LOW).astype(f"{order}u2").tobytes()
    indices, prefix, entries = np.arange(4, dtype=np.uint8), "", 4
    if form.endswith("8 in 8"):  # two entries in each word
        data = LOW.astype(np.uint8).view(np.uint16).astype(f"{order}u2").tobytes()
    if form == "segmented":
        data = np.array([0, 1, 0, 1, 255, 65535]).astype(f"{order}u2").tobytes()
        indices, prefix, entries = np.array([0, 64, 128, 255], np.uint8), "Segmented", 256
    image = decode(palette(entries, depth, data, syntax, indices, prefix=prefix))
    assert image.tolist() == [[[0] * 3, [64] * 3, [128] * 3, [255] * 3]]


def test_indices_outside_of_a_palette():
    data = WORDS.astype("<u2").tobytes()
    below = palette(4, 16, data, indices=np.array([5, 10, 11, 12, 13, 99], np.uint8), first=10)
    assert decode(below)[..., 0].tolist() == [[0, 0, 64, 128, 255, 255]]
    negative = palette(4, 16, data, indices=np.array([-9, -3, -2, -1, 0, 9], np.int16), first=-3)
    assert decode(negative)[..., 0].tolist() == [[0, 0, 64, 128, 255, 255]]
    odd = palette(3, 8, bytes([0, 100, 255, 0]), indices=np.array([0, 1, 2, 9], np.uint8))
    assert decode(odd)[..., 0].tolist() == [[0, 100, 255, 255]]
    with pytest.raises(ImageError, match="its RedPaletteColorLookupTableData does not match its descriptor"):
        decode(palette(9, 16, data, indices=np.array([0], np.uint8)))


@pytest.mark.parametrize("depth", [8, 16])
def test_segments_of_a_palette_may_be_copied(depth):
    words = [0, 2, 10, 20, 1, 3, 50]  # 10, 20, then in three steps to 50
    words += [2, 2, 0, 0] if depth == 16 else [2, 2, 0, 0, 0, 0]  # both again, from offset 0
    words += [2, 1, 8, 0] if depth == 16 else [2, 1, 4, 0, 0, 0]  # the second again: from 50 to 50
    data = np.array(words, np.uint8 if depth == 8 else "<u2").tobytes()
    indices = np.arange(13, dtype=np.uint8)
    dataset = palette(13, depth, data + b"\0" * (len(data) % 2), indices=indices, prefix="Segmented")
    assert decode(dataset)[0, :, 0].tolist() == [10, 20, 30, 40, 50] * 2 + [50] * 3


def test_a_real_palette_is_the_same_in_big_endian():
    path = get_testdata_file("examples_palette.dcm", download=False)
    dataset = pydicom.dcmread(path)
    keywords = [f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")]
    for keyword in (*keywords, "PixelData"):  # OW is words also where the values are bytes
        setattr(dataset, keyword, np.frombuffer(dataset[keyword].value, "<u2").byteswap().tobytes())
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    sink = io.BytesIO()
    pydicom.dcmwrite(sink, dataset, implicit_vr=False, little_endian=False, force_encoding=True)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(decode(file.read()), decode(sink.getvalue()))


def test_supplemental_palettes_colour_the_values_from_their_first_entry_on():
    stored = np.array([0, 500, 999, 1000, 1001, 1003], np.uint16)
    dataset = palette(4, 16, WORDS.astype("<u2").tobytes(), indices=stored, first=1000)
    dataset.PhotometricInterpretation, dataset.PixelPresentation = "MONOCHROME2", "MIXED"
    dataset.WindowCenter, dataset.WindowWidth = 500, 1000
    dataset.BluePaletteColorLookupTableData = bytes(8)
    assert decode(dataset)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3, [0, 0, 0], [64, 64, 0], [255, 255, 0]]


def test_frames_with_shared_colours_are_counted():
    frames = make(np.stack([LUMINANCE] * 3), frames=3, PhotometricInterpretation="YBR_FULL_422")
    frames.Rows, frames.Columns, frames.SamplesPerPixel, frames.PlanarConfiguration = 40, 60, 3, 0
    frames.PixelData = halved(LUMINANCE) * 3
    data = save(frames)
    assert count_frames(io.BytesIO(data)) == 3
    assert np.abs(decode(data, 2).astype(int) - PICTURE).mean() < 2


@pytest.mark.parametrize(("marker", "pixels"), [(0, PICTURE), (1, LUMINANCE)])
def test_an_adobe_segment_states_the_colours_of_jpeg_ls(marker, pixels):
    stream = with_adobe(imagecodecs.jpegls_encode(pixels), marker)
    for header in ("RGB", "YBR_FULL"):
        assert is_the_picture(compressed([stream], 40, 60, uid.JPEGLSLossless, PhotometricInterpretation=header), 0.5)
