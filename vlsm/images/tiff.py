"""The pages of TIFF files, except masks and reduced copies of other pages."""

import io
import logging
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images import decode
from vlsm.images.codestreams import codestream_size
from vlsm.images.formats import Decode, Labels, Look
from vlsm.images.stored import Stored, check_pixels, decoder_errors, full_range
from vlsm.images.tiff_pages import find_pages, start_at
from vlsm.limits import MAX_IMAGES

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its warnings name no file; what matters is an error here

_MOST_LEVELS = 64  # of a pyramid
_GREY, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR, _LAB = (0, 1), 2, 3, 4, 5, 6, 8  # TIFF 6.0, tag PhotometricInterpretation
_OLD_JPEG, _JPEG, _JPEG_2000 = 6, 7, (33003, 33004, 33005, 34712)
_KEEPS_YCBCR = (1, 5, 8, 32946, 32773)  # compressions whose YCbCr values tifffile does not convert
# Byte-wise compressions: the decoder, and how many bytes one byte can become.
_UNPACKERS = {
    5: (imagecodecs.lzw_decode, 4096),
    8: (imagecodecs.zlib_decode, 1032),
    32946: (imagecodecs.zlib_decode, 1032),
    32773: (imagecodecs.packbits_decode, 64),
    34925: (imagecodecs.lzma_decode, 1 << 14),
    50000: (imagecodecs.zstd_decode, 1 << 15),
}
_IMAGE_CODECS = (2, 3, 4, _OLD_JPEG, _JPEG, 34887, 50001, 50002, *_JPEG_2000)
_GDAL_NO_DATA = 42113
_HARMLESS_BYTES = 64 << 20  # a strip or tile that cannot become larger is not checked


class TiffPages:
    """The pages of a TIFF file that is in memory.

    Args:
        data: the content of the file.
        name: the name of the file in error messages.
        max_pixels: pages with more pixels are refused before they are decoded.

    Raises:
        ImageError: "corrupt".
    """

    def __init__(self, data: bytes, name: str, max_pixels: int) -> None:
        self._data, self._name, self._max_pixels = data, name, max_pixels
        with decoder_errors(name):
            self._tiff = tifffile.TiffFile(io.BytesIO(data), name=name)
            self._num_planes = _count_planes(self._tiff, len(_find_pages(self._tiff)))

    def read(self, page: int | None) -> Stored:
        """Return the values of a page; None for the first one that is no mask and no reduced copy.

        Raises:
            ImageError: "too_large", "corrupt", or "unreadable" if the kind of page is not supported.
        """
        with decoder_errors(self._name):
            number = list_pages(self._tiff)[0] if page is None else page
            stored, orientation = self._read(number, self._tiff.pages[0 if self._num_planes > 1 else number])
            return stored.upright(orientation)

    def _read(self, number: int, page: Any) -> tuple[Stored, int]:
        check_pixels((page.imagelength, page.imagewidth), self._name, self._max_pixels)
        orientation = int(page.tags.valueof(274, 1))
        if _needs_pillow(page):
            with Image.open(io.BytesIO(start_at(self._data, page)), formats=("TIFF",)) as image:
                return Stored(np.asarray(image.convert("RGB"))), orientation
        if problem := _describe_unsupported(page):
            raise ImageError("unreadable", f"{self._name} is a TIFF {problem}; this is not supported")
        _check_segments(page, self._data)
        if self._num_planes > 1:
            dtype = page.dtype.newbyteorder(self._tiff.byteorder)
            values = np.ndarray(page.shaped, dtype, self._data, page.dataoffsets[0] + number * page.nbytes)
            values = values.astype(page.dtype)[:, 0]
        else:
            values = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # (separate samples, H, W, joined samples)
        values = values[..., 0].transpose(1, 2, 0) if values.shape[0] > 1 else values[0]
        return _to_stored(page, values), orientation


def _needs_pillow(page: Any) -> bool:
    """Return whether a page has colours that only Pillow (libtiff) converts."""
    is_ycbcr = page.photometric == _YCBCR and page.compression in _KEEPS_YCBCR
    return page.compression == _OLD_JPEG or is_ycbcr or (page.photometric == _LAB and page.bitspersample == 8)


def _describe_unsupported(page: Any) -> str | None:
    """Return why a page cannot be shown, such as "with 5 channels", or None."""
    photometric, channels = page.photometric, page.samplesperpixel
    # three channels without a colour space are shown as RGB
    expected = {_RGB: (3,), _YCBCR: (3,), _CMYK: (4,)}.get(photometric, (1, 3) if photometric in _GREY else (1,))
    is_alpha = photometric in (_RGB, _YCBCR, _CMYK) or page.extrasamples[:1] in ((1,), (2,))  # tag ExtraSamples
    if is_alpha and channels == expected[0] + 1:
        channels -= 1
    if photometric not in (*_GREY, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR):
        return f"with colours of the kind {getattr(photometric, 'name', photometric)}"
    if page.compression not in (1, *_UNPACKERS, *_IMAGE_CODECS):
        return f"with the compression {getattr(page.compression, 'name', page.compression)}"
    if channels not in expected:
        return f"with {channels} channels"
    if page.imagedepth > 1:
        return f"with {page.imagedepth} planes in a page"
    if page.dtype is None or page.dtype.kind not in "buif":
        kind = "complex" if page.sampleformat in (5, 6) else f"{page.bitspersample}-bit"
        return f"with {kind} values"
    return None


def _check_segments(page: Any, data: bytes) -> None:
    """Refuse strips and tiles that are missing, incomplete or far larger than the page once they are unpacked.

    Raises:
        ValueError: the page is damaged.
        Exception: any error of a decoder.
    """
    offsets, sizes = page.dataoffsets, page.databytecounts
    num_segments = int(np.prod(page.chunked))
    if min(len(offsets), len(sizes)) < num_segments:
        raise ValueError(f"it has {min(len(offsets), len(sizes))} of {num_segments} strips or tiles")
    if page.is_contiguous:  # its bytes are counted here: some software states a wrong number
        offsets, sizes, num_segments = offsets[:1], [page.nbytes], 1
    may_be_absent = page.tags.get(_GDAL_NO_DATA) is not None  # GDAL leaves out tiles without data
    for offset, size in zip(offsets[:num_segments], sizes[:num_segments], strict=True):
        if size == 0 and may_be_absent:
            continue
        if size <= 0 or offset + size > len(data):
            raise ValueError("a strip or tile lies outside of the file")
        _check_unpacked_size(page, data[offset : offset + size])


def _check_unpacked_size(page: Any, segment: bytes) -> None:
    """Refuse a strip or tile that unpacks to far more than its place in the page."""
    num_values = max(int(np.prod(page.chunks)), 1 << 16)
    if page.compression in (_JPEG, *_JPEG_2000):
        shape = codestream_size(segment)
        if shape is not None and int(np.prod(shape)) > 4 * num_values:
            raise ValueError("a strip or tile is larger than its page")
        if page.compression == _JPEG and not decode.is_whole_jpeg(segment, page.jpegtables or b""):
            raise ValueError("the JPEG of a strip or tile ends early")
    elif page.compression in _UNPACKERS:
        unpack, ratio = _UNPACKERS[page.compression]
        if len(segment) * ratio > _HARMLESS_BYTES:
            if page.fillorder == 2:
                segment = bytes(imagecodecs.bitorder_decode(segment))
            most = max(num_values * 16, _HARMLESS_BYTES)
            if len(unpack(segment, out=most)) >= most:  # some decoders stop there, others raise an error
                raise ValueError("a strip or tile unpacks to more than its page holds")


def _to_stored(page: Any, values: np.ndarray) -> Stored:
    """Return the values (H, W, channels) of a page with its meaning: palette, photometric interpretation, bits."""
    if page.photometric == _PALETTE:
        return Stored(_paint(values[..., 0], np.asarray(page.colormap)), indices=values[..., 0])
    if page.photometric == _CMYK:
        levels = values if values.dtype == np.uint8 else (values // 257).astype(np.uint8)
        return Stored(np.asarray(Image.fromarray(np.ascontiguousarray(levels[..., :4]), "CMYK").convert("RGB")))
    alpha = values[..., -1] if page.extrasamples in ((1,), (2,)) else None
    if page.extrasamples == (1,):
        values = _unmultiply(values)
    values = values[..., :3] if values.shape[-1] > 2 else values[..., 0]
    is_white_zero = page.photometric == 0
    bits = int(page.bitspersample)
    if values.dtype.kind in "bu" and bits < 8:
        values = (values.astype(np.uint8) * (255 // (2**bits - 1))).astype(np.uint8)
    elif values.dtype.kind == "u" and bits == 8:
        values = values.astype(np.uint8, copy=False)
    if bits == 1 and is_white_zero:
        return Stored(255 - values)
    return Stored(values, full_range(values.dtype, bits), is_white_zero, _no_data(page), alpha)


def _unmultiply(values: np.ndarray) -> np.ndarray:
    """Return the values before they were multiplied with their last channel, alpha (ExtraSamples 1), if integers."""
    alpha = values[..., -1:].astype(np.float64)
    if values.dtype.kind != "u" or not alpha.any():
        return values
    most = np.iinfo(values.dtype).max
    return np.where(alpha > 0, np.minimum(values * (most / np.maximum(alpha, 1)), most), 0).astype(values.dtype)


def _no_data(page: Any) -> float | None:
    """Return the value of pixels without data, by GDAL's tag."""
    try:
        return float(str(page.tags.valueof(_GDAL_NO_DATA)).strip("\0 "))
    except ValueError:
        return None


def _paint(indices: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return the colours (H, W, 3) uint8 of palette indices (H, W); the palette is (3, N) uint16."""
    if colours.max(initial=0) > 255:  # some software writes entries of 8 bits
        colours = colours >> 8
    return colours.T.astype(np.uint8)[indices.astype(np.intp)]


def list_pages(tiff: Any) -> list[int]:
    """Return the numbers of the pages that are images.

    Raises:
        ValueError: the list of pages is damaged, or too long.
    """
    are_images = _find_pages(tiff)
    if (num_planes := _count_planes(tiff, len(are_images))) > 1:
        return list(range(num_planes))
    numbers = [number for number, is_image in enumerate(are_images) if is_image]
    num_levels = _count_levels(tiff.pages[number] for number in numbers[:_MOST_LEVELS])
    return (numbers[:1] + numbers[num_levels:]) or [0]


def _find_pages(tiff: Any) -> list[bool]:
    return find_pages(tiff.filehandle, tiff.pages[0].offset, tiff.tiff)


def _count_planes(tiff: Any, num_pages: int) -> int:
    """Return how many images follow each other behind the only page of a file; 1 for all other files.

    ImageJ writes stacks of more than 4 GB so, and tifffile does on request. The description of the page tells it.
    """
    if not (tiff.is_imagej or tiff.is_shaped) or not tiff.pages[0].is_final or num_pages > 1:
        return 1
    num_planes: int = tiff.series[0].size // max(tiff.pages[0].size, 1)
    if num_planes > MAX_IMAGES:
        raise ValueError(f"it states {num_planes:,} images; {MAX_IMAGES:,} are the most")
    return num_planes


def _count_levels(pages: Iterable[Any]) -> int:
    """Return how many of the first pages are one image and reduced copies of it that no tag marks; at least 1.

    Such a pyramid has three levels or more, or tiles. Each level is the first page divided by a growing whole number.
    A page is loaded only as long as all pages before it are levels.
    """
    whole: Any = None
    count, last_factor = 0, 0
    for page in pages:
        whole = whole or page
        factor = round(whole.imagelength / max(page.imagelength, 1))
        matches = all(
            abs(side - full / max(factor, 1)) < 1
            for side, full in ((page.imagelength, whole.imagelength), (page.imagewidth, whole.imagewidth))
        )
        is_alike = (page.samplesperpixel, page.bitspersample) == (whole.samplesperpixel, whole.bitspersample)
        if page is not whole and (factor <= last_factor or not matches or not is_alike):
            break
        count, last_factor = count + 1, max(factor, 1)
    return count if count > 2 or (count > 1 and whole.is_tiled) else 1


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: Look
) -> tuple[list[str | None], tuple[int, int]]:
    """Return the pages, and the size of the first page; see `vlsm.images.formats.FormatModule`.

    A file of another format with the name of a TIFF has one image.
    """
    head = file.read(4)
    file.seek(0)
    if not decode.is_tiff(head):
        return decode.list_images(file, name, size_bytes, look)
    with decoder_errors(name), tifffile.TiffFile(file, name=name) as tiff:
        pages = list_pages(tiff)
        first: Any = tiff.pages[pages[0]]
        return [None] if pages == [0] else [f"page={page}" for page in pages], (first.imagelength, first.imagewidth)


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Decode:
    """Return the decoder of the pages, by their selectors; see `vlsm.images.formats.FormatModule`."""
    if not decode.is_tiff(data):
        return decode.open_images(data, name, settings)
    pages = TiffPages(data, name, settings.max_pixels)
    return lambda selector: pages.read(_page(selector)).show(settings.window)


def open_labels(data: bytes, name: str, settings: SegmentSettings) -> Labels:
    """Return the reader of the labels of a page, by its selector; see `vlsm.images.formats.LabelModule`."""
    read = open_stored(data, name, settings)
    return lambda selector: read(selector).labels()


def open_stored(data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Stored]:
    """Return the reader of the values of a page, by its selector; see `vlsm.images.formats.ColourModule`."""
    if not decode.is_tiff(data):
        return decode.open_stored(data, name, settings)
    pages = TiffPages(data, name, settings.max_pixels)
    return lambda selector: pages.read(_page(selector))


def _page(selector: str | None) -> int | None:
    return int(selector.partition("=")[2]) if selector else None
