import io
import logging
import struct
import threading
import warnings
import zlib

import gdcm
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array

from tests.test_hostile import edits, mutate
from vlsm.errors import ImageError
from vlsm.images.codestreams import codestream_size
from vlsm.images.dicom import DicomImages, count_frames, is_dicom

SECRET = "SECRET^PATIENT"


def make(pixels, syntax=uid.ExplicitVRLittleEndian, frames=None, **elements):
    """A secondary capture of (H, W), or (H, W, 3) as RGB; of several with frames."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.PatientName = SECRET
    one = pixels[0] if frames else pixels
    dataset.Rows, dataset.Columns = one.shape[:2]
    dataset.SamplesPerPixel = one.shape[2] if one.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if one.ndim == 3 else "MONOCHROME2"
    if one.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames:
        dataset.NumberOfFrames = frames
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset):
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def items(**elements):
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return [item]


def decode(dataset, frame=0, window=None):
    data = dataset if isinstance(dataset, bytes) else save(dataset)
    image = DicomImages(data, "x.dcm", 10_000_000, window).decode(frame).pixels
    assert image.dtype == np.uint8
    return image


def grey(dataset, frame=0, window=None):
    image = decode(dataset, frame, window)
    assert (image == image[..., :1]).all()
    return image[..., 0].tolist()


ROW = np.array([[0, 50, 100, 150, 200]], np.uint16)


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ],
)
def test_uncompressed_syntaxes_decode_to_the_same(syntax):
    data = save(make(ROW, syntax, WindowCenter=100.5, WindowWidth=201))
    assert count_frames(io.BytesIO(data)) == 1
    assert grey(data) == [[0, 64, 128, 191, 255]]


def test_without_a_window_values_go_from_minimum_to_maximum():
    assert grey(make(ROW + 1000)) == [[0, 64, 128, 191, 255]]
    assert grey(make(np.full((1, 3), 7, np.uint16))) == [[0, 0, 0]]


def test_8_bit_values_stay_as_they_are():
    assert grey(make(np.array([[3, 77, 200]], np.uint8))) == [[3, 77, 200]]


def test_padding_is_left_out_of_the_range():
    padded = np.array([[-2000, 0, 100, 200]], np.int16)
    assert grey(make(padded, PixelPaddingValue=-2000)) == [[0, 0, 128, 255]]
    two = np.array([[-2000, -1999, 0, 100, 200]], np.int16)
    assert grey(make(two, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1999)) == [[0, 0, 0, 128, 255]]


def test_windows_are_in_rescaled_units():
    # 2 x - 1000: -1000, -900, -800, -700, -600; the window -900 .. -700 by DICOM PS3.3 C.11.2.1.2.1, which ends there
    dataset = make(ROW, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=-799.5, WindowWidth=201)
    assert grey(dataset) == [[0, 0, 128, 255, 255]]
    dataset.WindowCenter, dataset.WindowWidth = [-799.5, 40], [201, 400]
    assert grey(dataset) == [[0, 0, 128, 255, 255]]
    assert grey(dataset, window=(-800, 400)) == [[0, 64, 128, 191, 255]]


def test_window_functions():
    dataset = make(ROW, WindowCenter=100, WindowWidth=100, VOILUTFunction="LINEAR_EXACT")
    assert grey(dataset) == [[0, 0, 128, 255, 255]]
    dataset.VOILUTFunction = "SIGMOID"  # 255 / (1 + exp(-4 (x - 100) / 100))
    assert grey(dataset) == [[5, 30, 128, 225, 250]]
    narrow = make(ROW, WindowCenter=100.5, WindowWidth=1)
    assert grey(narrow) == [[0, 0, 0, 255, 255]]


def test_signed_values_and_unused_bits():
    values = np.array([[-100, 0, 100]], np.int16)
    assert grey(make(values, WindowCenter=0, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")) == [[0, 128, 255]]
    twelve = make((values & 0x0FFF) | 0x3000, BitsStored=12, HighBit=11)  # what stands above is not the value's
    assert grey(twelve) == [[0, 128, 255]]


def test_monochrome1_is_inverted():
    assert grey(make(np.array([[0, 55, 255]], np.uint8), PhotometricInterpretation="MONOCHROME1")) == [[255, 200, 0]]


def test_one_bit_and_32_bits():
    one = make(np.array([[0b10100101]], np.uint8), Rows=1, Columns=8, BitsAllocated=1, BitsStored=1, HighBit=0)
    assert grey(one) == [[255, 0, 255, 0, 0, 255, 0, 255]]
    assert grey(make(np.array([[0, 1 << 31, 0xFFFFFFFF]], np.uint32))) == [[0, 128, 255]]


def test_float_pixels():
    dataset = make(ROW, BitsAllocated=32, BitsStored=32)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.FloatPixelData = np.array([[-1, 0, np.nan, np.inf, 1]], np.float32).tobytes()
    assert grey(dataset) == [[0, 128, 0, 0, 255]]


def test_lookup_tables():
    table = items(LUTDescriptor=[4, 10, 8], LUTData=b"\x00\x10\x80\xff")
    table[0]["LUTData"].VR = "OW"
    values = np.array([[0, 10, 11, 12, 13, 99]], np.uint16)
    assert grey(make(values, VOILUTSequence=table)) == [[0, 0, 16, 128, 255, 255]]
    words = items(LUTDescriptor=[3, 0, 16], LUTData=[0, 32768, 65535])
    words[0]["LUTData"].VR = "US"
    assert grey(make(np.array([[0, 1, 2]], np.uint16), ModalityLUTSequence=words)) == [[0, 128, 255]]


COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)


def test_rgb_of_both_planar_configurations():
    np.testing.assert_array_equal(COLOURS, decode(make(COLOURS)))
    planes = np.ascontiguousarray(COLOURS.transpose(2, 0, 1))
    np.testing.assert_array_equal(COLOURS, decode(make(COLOURS, PlanarConfiguration=1, PixelData=planes.tobytes())))


def test_16_bit_colours_are_scaled():
    assert decode(make(COLOURS.astype(np.uint16) * 257)).tolist() == COLOURS.tolist()


def test_ybr_becomes_rgb():
    # JFIF: Y, Cb, Cr of red, and of grey
    full = np.array([[[76, 85, 255], [128, 128, 128]]], np.uint8)
    shown = decode(make(full, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(shown.astype(int) - [[[254, 0, 0], [128, 128, 128]]]).max() <= 1
    half = make(full, PhotometricInterpretation="YBR_FULL_422", PixelData=bytes([76, 76, 85, 255]))
    assert np.abs(decode(half).astype(int) - [[[254, 0, 0]] * 2]).max() <= 1


def palette(depth=16, **elements):
    words = [np.array([0, 65535, 0]), np.array([0, 0, 65535]), np.array([25700, 0, 0])]
    tables = dict(zip(("Red", "Green", "Blue"), words, strict=True))
    dataset = make(np.array([[0, 1, 2, 9]], np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for name, table in tables.items():
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [3, 0, depth])
        setattr(dataset, f"{name}PaletteColorLookupTableData", table.astype("<u2").tobytes())
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def test_palettes_are_painted():
    assert decode(palette()).tolist() == [[[0, 0, 100], [255, 0, 0], [0, 255, 0], [0, 255, 0]]]


def segmented(words):
    dataset = palette()
    for name in ("Red", "Green", "Blue"):
        del dataset[f"{name}PaletteColorLookupTableData"]
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(dataset, f"Segmented{name}PaletteColorLookupTableData", np.array(words, "<u2").tobytes())
    return dataset


def test_segmented_palettes_are_painted_and_bombs_are_not():
    steps = [0, 1, 0, 1, 255, 65535]  # black, then 255 steps to white
    assert decode(segmented(steps)).tolist()[0][:3] == [[0] * 3, [1] * 3, [2] * 3]
    for bomb in (steps[:3] + [1, 65535, 9] * 1000, [2, 1, 0, 0]):
        with pytest.raises(ImageError, match=r"^corrupt: x\.dcm"):
            decode(segmented(bomb))


FRAMES = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5) * 100


def test_frames_are_decoded_one_by_one():
    data = save(make(FRAMES, frames=3, WindowCenter=3000, WindowWidth=6000, VOILUTFunction="LINEAR_EXACT"))
    assert count_frames(io.BytesIO(data)) == 3
    images = DicomImages(data, "x", 100, None)
    assert images.size() == (4, 5)
    for frame in (2, 0, 1):
        np.testing.assert_array_equal(
            (FRAMES[frame] * (255 / 6000) + 0.5).astype(np.uint8), images.decode(frame).pixels[..., 0]
        )
    for outside in (3, -1):
        with pytest.raises(ImageError, match=r"^corrupt: x has 3 frames and no frame"):
            images.decode(outside)


def test_functional_groups_tell_a_frame_its_own_window_and_rescale():
    enhanced = make(np.tile(ROW, (3, 1, 1)), frames=3)
    enhanced.SharedFunctionalGroupsSequence = items(
        FrameVOILUTSequence=items(WindowCenter=100.5, WindowWidth=201),
        PixelValueTransformationSequence=items(RescaleSlope=1, RescaleIntercept=0),
    )
    own = [{}, {"FrameVOILUTSequence": items(WindowCenter=50.5, WindowWidth=101)}]
    own.append({"PixelValueTransformationSequence": items(RescaleSlope=2, RescaleIntercept=0)})
    enhanced.PerFrameFunctionalGroupsSequence = [items(**groups)[0] for groups in own]
    data = save(enhanced)
    assert grey(data, 0) == [[0, 64, 128, 191, 255]]
    assert grey(data, 1) == [[0, 128, 255, 255, 255]]
    assert grey(data, 2) == [[0, 128, 255, 255, 255]]


def noise(dtype=np.uint16, shape=(33, 47)):
    low = 0 if np.dtype(dtype).kind == "u" else -1000
    smooth = np.add.outer(np.arange(shape[0]) * 5, np.arange(shape[1]) * 3)[..., None].repeat(
        shape[2] if len(shape) == 3 else 1, 2
    )
    values = smooth % 200 + np.random.default_rng(1).integers(0, 40, smooth.shape) + low
    return values.reshape(shape).astype(dtype)


# one each: GDCM's encoder aborts the process on such small images
ENCODERS = {uid.RLELossless: "pydicom", uid.JPEGLSLossless: "pyjpegls", uid.JPEG2000Lossless: "pylibjpeg"}


@pytest.mark.parametrize("syntax", ENCODERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, "colour"])
def test_lossless_compression_changes_nothing(syntax, dtype):
    pixels = noise(np.uint8, (33, 47, 3)) if dtype == "colour" else noise(dtype)
    plain = make(pixels)
    expected = decode(plain)
    plain.compress(syntax, encoding_plugin=ENCODERS[syntax])
    np.testing.assert_array_equal(expected, decode(plain))


def save_lossless(dataset, folder):
    """The same as JPEG Lossless, which nothing but GDCM writes."""
    (folder / "plain.dcm").write_bytes(save(dataset))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "lossless.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "lossless.dcm").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, "colour"])
def test_jpeg_lossless_changes_nothing(dtype, tmp_path):
    plain = make(noise(np.uint8, (32, 48, 3)) if dtype == "colour" else noise(dtype, (32, 48)))
    data = save_lossless(plain, tmp_path)
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == uid.JPEGLosslessSV1
    np.testing.assert_array_equal(decode(plain), decode(data))


@pytest.mark.parametrize("pixels", [noise(np.uint16, (32, 48)), noise(np.uint8, (32, 48, 3))], ids=["grey", "colour"])
def test_damaged_jpeg_lossless_never_reaches_its_decoder(pixels, tmp_path):
    data = save_lossless(make(pixels), tmp_path)
    start = data.index(b"\xff\xd8")
    for place in range(start, data.index(b"\xff\xda", start) + 14):
        for change in (0x01, 0x10, 0xFF):  # some of these once killed the process
            damaged = bytearray(data)
            damaged[place] ^= change
            try:
                decode(bytes(damaged))
            except ImageError as error:
                assert error.reason == "corrupt"


def jpeg(image):
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


def compressed(codestreams, rows, columns, syntax=uid.JPEGBaseline8Bit, **elements):
    dataset = make(np.zeros((rows, columns, 3), np.uint8), syntax, **elements)
    dataset.PixelData = encapsulate(codestreams)
    dataset["PixelData"].is_undefined_length = True
    return dataset


def test_jpeg_frames_are_close_to_the_originals():
    pictures = [noise(np.uint8, (33, 47, 3)), noise(np.uint8, (33, 47, 3))[::-1]]
    dataset = compressed(
        [jpeg(picture) for picture in pictures], 33, 47, NumberOfFrames=2, PhotometricInterpretation="YBR_FULL_422"
    )
    data = save(dataset)
    assert count_frames(io.BytesIO(data)) == 2
    for frame, picture in enumerate(pictures):
        assert np.abs(decode(data, frame).astype(int) - picture).mean() < 8


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "JPEG2000.dcm",
        "JPEGLSNearLossless_16.dcm",
        "SC_rgb_rle_16bit_2frame.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        "SC_rgb_jls_lossy_line.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "image_dfl.dcm",
        "examples_palette.dcm",
        "examples_ybr_color.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom's
def test_files_of_other_makers_have_the_pixels_that_pydicom_finds(name):
    path = get_testdata_file(name, download=False)
    with open(path, "rb") as file:
        assert count_frames(file) == int(pydicom.dcmread(path).get("NumberOfFrames", 1))
        file.seek(0)
        data = file.read()
    assert is_dicom(data[:132])
    shown, stored = decode(data), pixel_array(pydicom.dcmread(path), index=0)
    if stored.ndim == 3:
        np.testing.assert_array_equal(stored >> (8 * stored.dtype.itemsize - 8), shown)
    elif "palette" not in name:  # a window or range may cut and round, but it never changes the order of values
        order = np.argsort(stored.ravel(), kind="stable")
        assert (np.diff(shown[..., 0].ravel()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    "name",
    [
        *("rtplan.dcm", "rtstruct.dcm", "test-SR.dcm", "waveform_ecg.dcm", "reportsi.dcm"),
        *("liver_1frame.dcm", "rtdose_rle.dcm", "no_meta_group_length.dcm", "empty_charset_LEI.dcm", "DICOMDIR"),
    ],
)
def test_objects_that_are_no_images_have_no_frames(name):
    with open(get_testdata_file(name, download=False), "rb") as file:
        assert count_frames(file) == 0


class Lazy(io.BytesIO):
    """A file that counts what is read of it."""

    num_read = 0

    def read(self, size=-1):
        content = super().read(size)
        self.num_read += len(content)
        return content


def test_counting_reads_neither_pixels_nor_long_elements():
    dataset = make(np.zeros((500, 500), np.uint16), ImageComments="x" * 10_000)
    dataset.add_new(0x00091010, "OB", b"x" * 1_000_000)
    file = Lazy(save(dataset))
    assert count_frames(file) == 1
    assert file.num_read < 5_000


def test_what_is_dicom_is_told_by_its_beginning():
    data = save(make(ROW))
    assert is_dicom(data[:132])
    assert not is_dicom(data[:131])
    assert not is_dicom(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert not is_dicom(b"")
    bare = data[data.index(b"\x08\0\x16\0UI") :]
    assert is_dicom(bare[:132])
    assert count_frames(io.BytesIO(bare)) == 1
    assert grey(bare) == [[0, 64, 128, 191, 255]]


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "too_large", "60000 x 60000 = 3,600,000,000 pixels"),
        ({"Rows": 3000}, "corrupt", "frame 0 cannot be decoded"),
        ({"Rows": 0}, "corrupt", "frame 0 cannot be decoded"),
        ({"PhotometricInterpretation": "NONE OF IT"}, "corrupt", "frame 0 cannot be decoded"),
        ({"VOILUTSequence": items(LUTDescriptor=[0, 0, 16], LUTData=b"ab")}, "corrupt", "frame 0 cannot be"),
    ],
)
def test_damaged_headers_are_errors_of_ours(change, reason, words):
    dataset = make(ROW)
    for keyword, value in change.items():
        setattr(dataset, keyword, value)
    if "VOILUTSequence" in change:
        dataset.VOILUTSequence[0]["LUTData"].VR = "OW"
    with pytest.raises(ImageError, match=words) as caught:
        raise_or_show(save(dataset))
    assert caught.value.reason == reason


def raise_or_show(data):
    image = decode(data)
    raise AssertionError(image)


def test_what_nothing_decodes_is_named():
    data = save(compressed([b"x"], 2, 2, uid.JPIPHTJ2KReferenced))
    with pytest.raises(ImageError, match=r"is encoded in a way that is not supported: JPIP HTJ2K"):
        decode(data)


@pytest.mark.parametrize("wrong", [{"NumberOfFrames": 2_000_000_000}, {"Rows": 0}, {"Columns": 0}])
def test_frames_that_no_file_has_are_not_believed(wrong):
    with pytest.raises(ImageError, match=r"corrupt: many\.dcm has frames of no size, or more of them"):
        count_frames(io.BytesIO(save(make(ROW, **wrong))), "many.dcm")


def test_more_frames_than_bytes_are_not_believed():
    with pytest.raises(ImageError, match=r"corrupt: many\.dcm has fewer bytes than its 900,000 frames need"):
        count_frames(io.BytesIO(save(make(ROW, NumberOfFrames=900_000))), "many.dcm")
    with pytest.raises(ImageError, match="corrupt: the file has fewer bytes"):
        count_frames(io.BytesIO(save(compressed([jpeg(COLOURS)], 2, 2, NumberOfFrames=900_000))))


def test_a_file_that_ends_early_is_corrupt():
    data = save(make(noise()))
    for end in (140, 200, 300):
        with pytest.raises(ImageError, match=r"^corrupt: half\.dcm"):
            count_frames(io.BytesIO(data[:end]), "half.dcm")
    assert count_frames(io.BytesIO(data[:-9])) == 1
    with pytest.raises(ImageError, match=r"^corrupt: x\.dcm: frame 0"):
        decode(data[:-9])


def test_bombs_are_refused_before_they_go_off():
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = save(make(ROW, uid.DeflatedExplicitVRLittleEndian))
    start = data.index(uid.DeflatedExplicitVRLittleEndian.encode()) + 22
    body = save(make(ROW))
    element = b"\x09\0\x10\x10OB\0\0" + struct.pack("<I", 200 << 20)
    bomb = data[:start] + deflater.compress(element + bytes(200 << 20) + body[-60:]) + deflater.flush()
    assert len(bomb) < 1 << 20
    with pytest.raises(ImageError, match="holds more than 1,000,000 bytes"):
        DicomImages(bomb, "bomb.dcm", 100, None, max_bytes=1_000_000)
    with pytest.raises(ImageError, match="corrupt: bomb.dcm ends inside of its DICOM header"):
        count_frames(io.BytesIO(bomb), "bomb.dcm")
    with pytest.raises(ImageError, match="the size of frame 0 in its codestream is not that of its header"):
        decode(compressed([jpeg(np.zeros((3000, 3000, 3), np.uint8))], 2, 2))
    rle = make(np.zeros((10, 10), np.uint8), uid.RLELossless)
    rle.PixelData = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 100_000])
    rle["PixelData"].is_undefined_length = True
    assert decode(rle).shape == (10, 10, 3)  # what is too much is not unpacked


@pytest.mark.parametrize("size", [(0, 0, 3), (70, 90, 1), (1, 65535, 3)])
def test_codestreams_tell_their_size(size):
    head = struct.pack(">HHB", *size)
    assert codestream_size(b"\xff\xd8\xff\xe0\0\4ab\xff\xff\xc1\0\x11\x08" + head) == size
    assert codestream_size(b"\xff\xd8\xff\xf7\0\x11\x08" + head) == size
    siz = struct.pack(">4I", size[1] + 5, size[0] + 3, 5, 3)[:16]
    siz = struct.pack(">II", size[1] + 5, size[0] + 3) + struct.pack(">II", 5, 3) + bytes(16)
    stream = b"\xff\x4f\xff\x51\0\x29\0\0" + siz + struct.pack(">H", size[2])
    assert codestream_size(stream) == size[::1]
    box = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x0aftypxx" + b"\0\0\0\0jp2c"
    assert codestream_size(box + stream) == size
    assert codestream_size(b"\xff\xd8\xff\xe0") is None
    assert codestream_size(b"") is None


def test_nothing_of_a_patient_is_warned_of_logged_or_raised(caplog, recwarn):
    data = save(make(ROW, WindowCenter="1234567890.123", WindowWidth=2)).replace(b"1234567890.123", SECRET.encode())
    caplog.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(ImageError) as caught:
        decode(data)
    assert SECRET not in str(caught.value) + caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_pydicom_is_as_before_after_threads_have_read():
    data, log = save(make(noise())), logging.getLogger("pydicom")
    before = (log.level, pydicom.config.settings.reading_validation_mode, list(warnings.filters))
    threads = [threading.Thread(target=decode, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.level, pydicom.config.settings.reading_validation_mode, list(warnings.filters)) == before


def enhanced_rle():
    dataset = make(np.stack([noise(), noise()]), frames=2)
    dataset.SharedFunctionalGroupsSequence = items(FrameVOILUTSequence=items(WindowCenter=100.5, WindowWidth=201))
    dataset.PerFrameFunctionalGroupsSequence = [
        items(PixelValueTransformationSequence=items(RescaleSlope=2, RescaleIntercept=0))[0] for _ in range(2)
    ]
    dataset.compress(uid.RLELossless, encoding_plugin="pydicom")
    return dataset


MADE = {
    "plain": lambda: make(noise(), WindowCenter=100, WindowWidth=200, RescaleSlope=1, RescaleIntercept=-5),
    "deflated": lambda: make(noise(), uid.DeflatedExplicitVRLittleEndian),
    "palette": palette,
    "segmented": lambda: segmented([0, 1, 0, 1, 255, 65535]),
    "jpeg": lambda: compressed([jpeg(noise(np.uint8, (33, 47, 3)))], 33, 47),
    "enhanced": enhanced_rle,
}
FILES = {kind: save(build()) for kind, build in MADE.items()}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits, end=st.one_of(st.just(1.0), st.floats(0, 1)), in_header=st.booleans())
def test_mutated_objects_are_pictures_or_errors_of_ours(kind, changes, end, in_header):
    data = FILES[kind]
    if in_header:  # most bytes are pixels; damage is where the header is
        changes = [(place * 700 / len(data), content) for place, content in changes]
    data = mutate(data, changes, end)
    try:
        assert count_frames(io.BytesIO(data)) >= 0
        image = DicomImages(data, "x", 100_000, None, max_bytes=1 << 20).decode(0).pixels
    except ImageError as error:
        assert error.reason in ("corrupt", "too_large")
    else:
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def test_more_items_than_the_limit_are_refused_before_pydicom_keeps_them(monkeypatch):
    monkeypatch.setattr("vlsm.images.dicom.MAX_IMAGES", 50)
    data = save(make(np.zeros((8, 8), np.uint8)))
    place = data.rindex(b"\xe0\x7f\x10\x00")
    sequence = b"\x00\x52\x30\x92SQ\0\0\xff\xff\xff\xff%s\xfe\xff\xdd\xe0\0\0\0\0"
    item = b"\xfe\xff\x00\xe0\0\0\0\0"
    few, many = (data[:place] + sequence % (item * count) + data[place:] for count in (100, 101))
    assert DicomImages(few, "x", 100, None).num_frames == 1
    with pytest.raises(ImageError, match="too_large: x has 101 items; 100 are the most"):
        DicomImages(many, "x", 100, None)


@pytest.mark.parametrize("end", [b"", b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"])
def test_sequences_in_sequences_without_an_end_are_damage(end):
    data = save(make(np.zeros((8, 8), np.uint8)))
    place = data.rindex(b"\x28\x00\x02\x00")
    inner = b"\x20\x00\x10\x92SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    deep = data[:place] + inner * 10_000 + end * 10_000 + data[place:]
    for read in (lambda: count_frames(io.BytesIO(deep)), lambda: DicomImages(deep, "x", 100, None)):
        with pytest.raises(ImageError, match="corrupt"):
            read()
