"""Decodes one frame of a DICOM object to its stored values. Unsafe data is refused before a decoder reads it."""

import struct
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space

from vlsm.errors import ImageError
from vlsm.images.codestreams import codestream_size, has_component_transform, is_lossless_jpeg, jpeg_colours
from vlsm.images.decode import is_whole_jpeg
from vlsm.images.dicom_form import HeaderError, PixelForm

_NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
# ITU-T T.81: baseline, extended, lossless, and the retired processes, which the codestream states too
_JPEG = {f"1.2.840.10008.1.2.4.{number}" for number in (*range(50, 67), 70)}
_JPEG_XL = {f"1.2.840.10008.1.2.4.{number}" for number in (110, 111, 112)}
# One decoder per transfer syntax: the strictest one for damaged data.
_PLUGINS = {
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}


def read_frame(dataset: Dataset, form: PixelForm, frame: int, name: str) -> np.ndarray:
    """Return the stored values of one frame; colours are RGB.

    A codestream decides what the header can only repeat. The colours of a JPEG are those that libjpeg infers, and the
    header decides where libjpeg would guess. The inverse colour transform of JPEG 2000 gives RGB. JPEG Lossless and
    JPEG-LS without a statement of their own, and uncompressed pixels, are what the header says.

    Args:
        dataset: has the pixels.
        form: how they are stored.
        frame: its number, from 0.
        name: the file's name in error messages.

    Returns:
        (H, W), or (H, W, 3) for colours, of any integer or float type.

    Raises:
        ImageError: "corrupt": no decoder supports the transfer syntax, or the codestream's size is not the header's.
        Exception: any error that a decoder raises for other damage.
    """
    if form.syntax in _NATIVE:
        return _to_rgb(_take_bits(_read_native(dataset, form, frame), form), form.photometric)
    if form.syntax not in {uid.RLELossless, *_PLUGINS} | _JPEG | _JPEG_XL:
        syntax_name = form.syntax.name if form.syntax.name != form.syntax else "unknown"
        raise ImageError("corrupt", f"{name} is encoded in a way that is not supported: {syntax_name}")
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    encoded = get_frame(
        dataset.PixelData, frame, number_of_frames=form.num_frames, extended_offsets=offsets if all(offsets) else None
    )
    if form.syntax == uid.RLELossless:
        return _to_rgb(_take_bits(_decode_rle(encoded, form), form), form.photometric)
    if form.syntax in _JPEG_XL:
        return _decode_jpeg_xl(encoded, form)
    if codestream_size(encoded) != (*form.size, form.samples):
        # A decoder allocates the size that the codestream has.
        raise ImageError("corrupt", f"{name}: the size of frame {frame} in its codestream is not that of its header")
    return _decode_jpeg(encoded, form) if form.syntax in _JPEG else _decode_by_plugin(dataset, form, frame, encoded)


def _options(form: PixelForm, **changes: Any) -> dict[str, Any]:
    """Return the description of one frame for pydicom's decoders."""
    height, width = form.size
    return {
        "rows": height,
        "columns": width,
        "samples_per_pixel": form.samples,
        "photometric_interpretation": "RGB" if form.samples == 3 else "MONOCHROME2",
        "planar_configuration": int(form.is_planar),
        "bits_allocated": form.allocated,
        "bits_stored": form.stored,
        "pixel_representation": int(form.is_signed),
        "number_of_frames": form.num_frames,
        "pixel_keyword": form.keyword,
    } | changes


def _read_native(dataset: Dataset, form: PixelForm, frame: int) -> np.ndarray:
    """Return the values of an uncompressed frame with all allocated bits."""
    content = dataset[form.keyword].value
    num_values = form.size[0] * form.size[1] * form.samples
    num_bits = num_values * form.num_frames * form.allocated
    is_half = form.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") and len(content) * 8 < num_bits
    if len(content) < -(-(num_bits * 2 // 3 if is_half else num_bits) // 8):  # in half, two pixels share a colour
        raise HeaderError("the file has fewer bytes than its pixels need")
    if form.allocated == 12:
        return _unpack_12_bits(content, num_values, frame).reshape(*form.size, *[form.samples] * (form.samples > 1))
    if is_half:  # else every pixel has its colour
        options = _options(form, photometric_interpretation="YBR_FULL_422", planar_configuration=0)
    else:
        options = _options(form)
    vr = dataset[form.keyword].VR
    unsigned = {"pixel_representation": 0, "correct_unused_bits": False, "pixel_vr": vr}
    return get_decoder(form.syntax).as_array(content, index=frame, raw=True, **options | unsigned)[0]


def _unpack_12_bits(content: bytes, num_values: int, frame: int) -> np.ndarray:
    """Return values that were packed without gaps, two in three bytes, the lowest bit first (DICOM PS3.5, 8.1.1)."""
    first = frame * num_values
    triples = np.frombuffer(content, np.uint8, -(-(first + num_values) // 2) * 3).reshape(-1, 3).astype(np.uint16)
    low, middle, high = triples.T
    values = np.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], axis=1).ravel()
    return values[first : first + num_values]


def _take_bits(values: np.ndarray, form: PixelForm) -> np.ndarray:
    """Return the stored bits of values with all their allocated bits. The other bits may hold anything."""
    if values.dtype.kind == "f" or form.allocated == 1:
        return values
    bits = values.dtype.itemsize * 8
    stored, high_bit = (form.stored, form.high_bit) if form.high_bit < bits else (min(form.stored, bits), bits - 1)
    values = values.view(f"{values.dtype.byteorder}u{values.dtype.itemsize}")
    if high_bit < bits - 1:
        values = values << (bits - 1 - high_bit)
    if form.is_signed:
        values = values.view(f"{values.dtype.byteorder}i{values.dtype.itemsize}")
    return values >> (bits - stored) if stored < bits else values


def _decode_rle(encoded: bytes, form: PixelForm) -> np.ndarray:
    """Return a frame of RLE Lossless (DICOM PS3.5, annex G), (H, W) or (H, W, 3), with all allocated bits.

    pydicom's own decoder runs byte by byte in Python, and a segment can grow 64-fold before its size is checked.
    Pillow's PackBits is the same code in C, and it stops at the given size.
    """
    num_pixels, bytes_per_sample = form.size[0] * form.size[1], form.allocated // 8
    count, *offsets = struct.unpack_from("<16I", encoded)
    if count != form.samples * bytes_per_sample or not 1 <= count <= 15:
        raise ValueError("the number of RLE segments does not match samples x bytes per sample")
    planes = np.empty((form.samples, num_pixels, bytes_per_sample), np.uint8)
    for number, start in enumerate(offsets[:count]):
        end = offsets[number + 1] if number + 1 < count else len(encoded)
        row = Image.frombytes("L", (num_pixels, 1), encoded[start:end], "packbits", "L")
        # The first segment has the most significant bytes.
        planes[number // bytes_per_sample, :, bytes_per_sample - 1 - number % bytes_per_sample] = np.asarray(row)[0]
    values = planes.view(f"<u{bytes_per_sample}").reshape(form.samples, *form.size)
    return values[0] if form.samples == 1 else np.moveaxis(values, 0, -1)


def _decode_jpeg(encoded: bytes, form: PixelForm) -> np.ndarray:
    """Return a frame of any JPEG process, with 2 to 16 bits."""
    from imagecodecs import jpeg8_decode

    if not is_whole_jpeg(encoded):
        raise HeaderError("its JPEG codestream ends early")
    if form.samples == 1:
        values = jpeg8_decode(encoded)
        if not is_lossless_jpeg(encoded):  # all bits of a lossy process count, whatever the header says
            precision = 12 if values.dtype.itemsize > 1 else 8
            form = replace(form, stored=precision, high_bit=precision - 1)
        return _take_bits(values, form)
    colours = jpeg_colours(encoded) or ("RGB" if form.photometric == "RGB" else "YCBCR")
    if not is_lossless_jpeg(encoded):
        return jpeg8_decode(encoded, colorspace=colours, outcolorspace="RGB")
    values = _take_bits(jpeg8_decode(encoded, colorspace="RGB", outcolorspace="RGB"), form)
    return _to_rgb(values, "RGB" if colours == "RGB" else "YBR_FULL")


def _decode_jpeg_xl(encoded: bytes, form: PixelForm) -> np.ndarray:
    from imagecodecs import jpegxl_decode

    shape = form.size if form.samples == 1 else (*form.size, form.samples)
    out = np.empty(shape, np.uint8 if form.stored <= 8 else np.uint16)  # no other size is decoded
    return _take_bits(jpegxl_decode(encoded, numthreads=1, out=out), form)


def _decode_by_plugin(dataset: Dataset, form: PixelForm, frame: int, encoded: bytes) -> np.ndarray:
    """Return a frame of JPEG-LS, JPEG 2000 or HTJ2K. pydicom gives the values the header's sign."""
    options = _options(form)
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    if all(offsets):
        options["extended_offsets"] = offsets
    decoder = get_decoder(form.syntax)
    values = decoder.as_array(
        dataset.PixelData, index=frame, raw=True, decoding_plugin=_PLUGINS[form.syntax], **options
    )[0]
    if form.samples == 1:
        return values
    colours = "RGB" if has_component_transform(encoded) else jpeg_colours(encoded)
    return _to_rgb(values, {"RGB": "RGB", "YCBCR": "YBR_FULL", None: form.photometric}[colours])


def _to_rgb(values: np.ndarray, photometric: str) -> np.ndarray:
    """Return the colours of a colour space as RGB; grey values and indices unchanged."""
    if values.ndim == 2 or not photometric.startswith(("YBR_FULL", "YBR_PARTIAL")):
        return values
    if values.dtype != np.uint8:
        raise ValueError("colours with a luminance must have 8 bits")
    if photometric.startswith("YBR_FULL"):
        return convert_color_space(values, "YBR_FULL", "RGB")
    # PS3.3, C.7.6.3.1.2 of 2016: luminance from 16 to 235, colours from 16 to 240
    full = (values.astype(np.float32) - (16, 128, 128)) * (255 / 219, 255 / 224, 255 / 224) + (0, 128, 128)
    return convert_color_space(np.clip(np.rint(full), 0, 255).astype(np.uint8), "YBR_FULL", "RGB")
