"""One frame of a DICOM object as its stored values, and what must be known before a decoder may see it."""

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

# One decoder each, and the one that minds damage the most; GDCM, which does not, where there is no other.
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
    """The values of one frame as they are stored; colours as RGB.

    Args:
        dataset: with its pixels and `file_meta`.
        frame: from 0.
        name: what error messages call the file.

    Returns:
        (H, W), or (H, W, 3) for colours, of any integer or float type.

    Raises:
        ImageError: "corrupt", of a transfer syntax that nothing decodes, or of a codestream of another size.
        Exception: whatever a decoder makes of other damage.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _NATIVE:
        return pixel_array(dataset, index=frame)
    is_12_bit = (
        syntax == uid.JPEGExtended12Bit and dataset.BitsStored > 8
    )  # no decoder under a free licence has it right
    if is_12_bit or (syntax != uid.RLELossless and syntax not in _PLUGINS):
        known = syntax.name if syntax.name != syntax else "unknown"
        raise ImageError("corrupt", f"{name} is encoded in a way that is not supported: {known}")
    options = as_pixel_options(dataset)
    encoded = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=options["number_of_frames"],
        extended_offsets=options.get("extended_offsets"),
    )
    if syntax == uid.RLELossless:
        return _decode_rle(encoded, options)
    found = codestream_size(encoded)
    if found != (options["rows"], options["columns"], options["samples_per_pixel"]):
        # a decoder allocates what the codestream asks for
        raise ImageError("corrupt", f"{name}: the size of frame {frame} in its codestream is not that of its header")
    if _PLUGINS[syntax] == "gdcm":
        check_lossless(encoded, options["bits_allocated"])
    return pixel_array(dataset, index=frame, decoding_plugin=_PLUGINS[syntax])


def _decode_rle(encoded: bytes, options: dict) -> np.ndarray:  # type: ignore[type-arg]
    """A frame of RLE Lossless (DICOM PS3.5, annex G).

    pydicom's own decoder runs byte by byte in Python and lets a segment grow 64-fold before it looks at its size;
    Pillow's PackBits is the same code, in C, and stops at the size that it is told.
    """
    num_pixels, samples = options["rows"] * options["columns"], options["samples_per_pixel"]
    bytes_per_sample = options["bits_allocated"] // 8
    count, *offsets = struct.unpack_from("<16I", encoded)
    if count != samples * bytes_per_sample or not 1 <= count <= 15:
        raise ValueError("the number of segments is not that of the pixels' bytes")
    planes = np.empty((samples, num_pixels, bytes_per_sample), np.uint8)
    for number, start in enumerate(offsets[:count]):
        end = offsets[number + 1] if number + 1 < count else len(encoded)
        row = Image.frombytes("L", (num_pixels, 1), encoded[start:end], "packbits", "L")
        # segments go from the most to the least significant byte
        planes[number // bytes_per_sample, :, bytes_per_sample - 1 - number % bytes_per_sample] = np.asarray(row)[0]
    told = options | {"planar_configuration": 1, "number_of_frames": 1, "pixel_keyword": "PixelData"}
    told.pop("transfer_syntax_uid", None)
    decoder = get_decoder(uid.ExplicitVRLittleEndian)
    return decoder.as_array(planes.tobytes(), index=0, **told)[0]


def paint_palette(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Indices (H, W) as the colours of the object's palette, (H, W, 3) uint8.

    Raises:
        ValueError: a segmented palette grows beyond 65,536 colours, or has indirect segments.
        Exception: whatever pydicom makes of other damage.
    """
    depth = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    for colour in ("Red", "Green", "Blue"):
        if segments := dataset.get(f"Segmented{colour}PaletteColorLookupTableData"):
            _check_segments(np.frombuffer(segments, np.uint8 if depth == 8 else np.uint16))
    colours = apply_color_lut(stored, dataset)[..., :3]
    return (colours >> max(depth - 8, 0)).astype(np.uint8)


def _check_segments(words: np.ndarray) -> None:
    """Refuse what would unfold to more than a palette holds: each segment of six bytes may stand for 65,535 colours."""
    place, total = 0, 0
    while place + 1 < len(words) and total <= _MAX_PALETTE:
        opcode, length = int(words[place]), int(words[place + 1])
        if opcode > 1:
            raise ValueError("indirect segments are not supported")
        total += length
        place += 2 + (length if opcode == 0 else 1)
    if total > _MAX_PALETTE:
        raise ValueError("the palette is larger than any can be")
