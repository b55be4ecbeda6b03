"""The pages of TIFF files, except masks and reduced copies of other pages."""

import io
from typing import Any, BinaryIO

from PIL import Image

from vlsm.config import SegmentSettings
from vlsm.images.decode import decode_image, decode_opened, decoder_errors
from vlsm.images.formats import Decode, Look
from vlsm.images.grey_levels import STORED, Decoded

_REDUCED_OR_MASK = 0b101  # TIFF 6.0, tag NewSubfileType
_SUBFILE_TYPE = 254


def list_images(
    file: BinaryIO, name: str, size_bytes: int | None, look: Look
) -> tuple[list[str | None], tuple[int, int]]:
    """Return the pages, and the size of the first page; see `vlsm.images.formats.FormatModule`.

    A file of another format with the name of a TIFF has one image.
    """
    with decoder_errors(name), Image.open(file) as image:
        pages = _list_pages(image) if image.format == "TIFF" else [0]
        image.seek(pages[0])
        return [None] if pages == [0] else [f"page={page}" for page in pages], (image.height, image.width)


def _list_pages(image: Any) -> list[int]:
    pages = []
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        if not int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK:
            pages.append(page)
    return pages or [0]


def open_images(data: bytes, name: str, settings: SegmentSettings) -> Decode:
    """Return the decoder of the pages, by their selectors; see `vlsm.images.formats.FormatModule`."""
    opened: list[Image.Image] = []

    def decode(selector: str | None) -> Decoded:
        if selector is None:
            return Decoded(decode_image(data, name, settings.max_pixels), STORED)
        with decoder_errors(name):
            if not opened:
                opened.append(Image.open(io.BytesIO(data), formats=("TIFF",)))
            opened[0].seek(int(selector.partition("=")[2]))
            return Decoded(decode_opened(opened[0], name, settings.max_pixels), STORED)

    return decode
