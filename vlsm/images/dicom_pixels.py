"""Decodes one frame of a DICOM object to its stored values. Unsafe data is refused before a decoder reads it."""

import struct

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import as_pixel_options, pixel_array

from vlsm.errors import ImageError
from vlsm.images.codestreams import check_lossless, codestream_size

# One decoder per transfer syntax: the strictest one for damaged data. GDCM is not strict, but has no alternative.
_PLUGINS = {
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}
_NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
_MAX_PALETTE = 1 << 16


def read_frame(dataset: Dataset, frame: int, name: str) -> np.ndarray:
    """Return the stored values of one frame; colours are RGB.

    Args:
        dataset: has the pixels and `file_meta`.
        frame: its number, from 0.
        name: the file's name in error messages.

    Returns:
        (H, W), or (H, W, 3) for colours, of any integer or float type.

    Raises:
        ImageError: "corrupt": no decoder supports the transfer syntax, or the codestream's size is not the header's.
        Exception: any error that a decoder raises for other damage.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _NATIVE:
        return pixel_array(dataset, index=frame)
    # No decoder with a free licence decodes 12 bits correctly.
    is_12_bit = syntax == uid.JPEGExtended12Bit and dataset.BitsStored > 8
    if is_12_bit or (syntax != uid.RLELossless and syntax not in _PLUGINS):
        syntax_name = syntax.name if syntax.name != syntax else "unknown"
        raise ImageError("corrupt", f"{name} is encoded in a way that is not supported: {syntax_name}")
    options = as_pixel_options(dataset)
    encoded = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=options["number_of_frames"],
        extended_offsets=options.get("extended_offsets"),
    )
    if syntax == uid.RLELossless:
        return _decode_rle(encoded, options)
    if codestream_size(encoded) != (options["rows"], options["columns"], options["samples_per_pixel"]):
        # A decoder allocates the size that the codestream has.
        raise ImageError("corrupt", f"{name}: the size of frame {frame} in its codestream is not that of its header")
    if _PLUGINS[syntax] == "gdcm":
        check_lossless(encoded, options["bits_allocated"])
    return pixel_array(dataset, index=frame, decoding_plugin=_PLUGINS[syntax])


def _decode_rle(encoded: bytes, options: dict) -> np.ndarray:  # type: ignore[type-arg]
    """Return a frame of RLE Lossless (DICOM PS3.5, annex G), (H, W) or (H, W, 3).

    pydicom's own decoder runs byte by byte in Python, and a segment can grow 64-fold before its size is checked.
    Pillow's PackBits is the same code in C, and it stops at the given size.
    """
    num_pixels, samples = options["rows"] * options["columns"], options["samples_per_pixel"]
    bytes_per_sample = options["bits_allocated"] // 8
    count, *offsets = struct.unpack_from("<16I", encoded)
    if count != samples * bytes_per_sample or not 1 <= count <= 15:
        raise ValueError("the number of RLE segments does not match samples x bytes per sample")
    planes = np.empty((samples, num_pixels, bytes_per_sample), np.uint8)
    for number, start in enumerate(offsets[:count]):
        end = offsets[number + 1] if number + 1 < count else len(encoded)
        row = Image.frombytes("L", (num_pixels, 1), encoded[start:end], "packbits", "L")
        # The first segment has the most significant bytes.
        planes[number // bytes_per_sample, :, bytes_per_sample - 1 - number % bytes_per_sample] = np.asarray(row)[0]
    plane_options = options | {"planar_configuration": 1, "number_of_frames": 1, "pixel_keyword": "PixelData"}
    plane_options.pop("transfer_syntax_uid", None)
    decoder = get_decoder(uid.ExplicitVRLittleEndian)
    return decoder.as_array(planes.tobytes(), index=0, **plane_options)[0]


def paint_palette(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return the palette colours of stored indices (H, W) as (H, W, 3) uint8.

    Raises:
        ValueError: a segmented palette has more than 65,536 colours, or has indirect segments.
        Exception: any error that pydicom raises for other damage.
    """
    depth = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    for colour in ("Red", "Green", "Blue"):
        if segments := dataset.get(f"Segmented{colour}PaletteColorLookupTableData"):
            _check_segments(np.frombuffer(segments, np.uint8 if depth == 8 else np.uint16))
    colours = apply_color_lut(stored, dataset)[..., :3]
    return (colours >> max(depth - 8, 0)).astype(np.uint8)


def _check_segments(words: np.ndarray) -> None:
    """Refuse a segmented palette that is too large: a segment of six bytes can expand to 65,535 colours."""
    position, num_colours = 0, 0
    while position + 1 < len(words) and num_colours <= _MAX_PALETTE:
        opcode, length = int(words[position]), int(words[position + 1])
        if opcode > 1:
            raise ValueError("indirect palette segments are not supported")
        num_colours += length
        position += 2 + (length if opcode == 0 else 1)
    if num_colours > _MAX_PALETTE:
        raise ValueError(f"the palette has more than {_MAX_PALETTE:,} colours")
