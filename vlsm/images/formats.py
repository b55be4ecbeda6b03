"""The table of file formats, and the images of one file: a single image, or frames, pages or slices.

A selector names one of several images in a file: "frame=3" in DICOM and videos, "page=2" in TIFF, "slice=17" in a
volume. In a tar or zip it begins with the member's name: "a/b.png", "a/b.dcm#frame=3", in Parquet with the row:
"row=17". The only image of a file has no selector.

Which files are images, and of which format:

1. A name with the ending of a format has this format. A name with an extension that the table of media types knows for
   something else (.txt, .json, .pdf, .mp3) is passed over, and not read. All other names are looked into: those without
   an extension, with a number or a part of a UID as extension, and with an unknown extension. That is a read of the
   first bytes of each such file.
2. Content is stronger than a name: bytes with the signature of another format have that format, if they lack the
   signature of the format that the name states.
3. A listing does not open files with the name of a one-image format (.png, .jpg). Each counts as one image; its content
   is looked at when it is decoded.
"""

import functools
import mimetypes
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from vlsm.config import SegmentSettings, TileSettings
from vlsm.images.decode import EXTENSIONS
from vlsm.images.grey_levels import Decoded
from vlsm.images.stored import Stored
from vlsm.images.windows import count_windows

HEAD_BYTES = 348  # at the start of a file, enough to recognise a format: the header of a NIfTI volume

Open = Callable[[], BinaryIO]
Decode = Callable[[str | None], Decoded]  # an image by its selector; raises ImageError
Labels = Callable[[str | None], np.ndarray]  # (H, W) labels of an image by its selector; raises ImageError


class NoImages(Exception):
    """A file is of a kind that is no picture. The text is a label of the kind, for counting."""


class FormatModule(Protocol):
    """The functions that the module of a format defines. Each raises ImageError for a damaged file."""

    def list_images(
        self, file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
    ) -> tuple[Sequence[str | None], tuple[int, int]]:
        """Return the selector of each image, from the file's header, and (height, width) of the images in pixels.

        A file with one image has the selector None.

        Raises:
            NoImages: the file is of a kind that is no picture.
            ImageError: the file is damaged.

        Args:
            file: opened at its start. It may read lazily.
            name: of the file, for messages.
            size_bytes: of the file; None if unknown.
            look: how to slice volumes and tile images.
        """

    def open_images(self, data: bytes, name: str, settings: SegmentSettings) -> Decode:
        """Return the function that decodes the images of a file, by their selectors.

        Args:
            data: the content of the file.
            name: of the file, for messages.
            settings: limits, and how to slice volumes and map grey values to 8 bits.
        """


class LabelModule(FormatModule, Protocol):
    """The functions of a format whose files can be masks."""

    def open_labels(self, data: bytes, name: str, settings: SegmentSettings) -> Labels:
        """Return the function that reads the labels of an image, by its selector: stored values, never scaled.

        Arguments as for `open_images`, also of a PairedModule.
        """


class ColourModule(LabelModule, Protocol):
    """The functions of a format whose masks can have colours or a palette."""

    def open_stored(self, data: bytes, name: str, settings: SegmentSettings) -> Callable[[str | None], Stored]:
        """Return the function that reads the values of an image, by its selector.

        Arguments as for `open_images`.
        """


class PairedModule(FormatModule, Protocol):
    """The functions of a format whose files can keep their values in a second file."""

    def data_files(self, header: bytes, name: str) -> Sequence[str]:
        """Return the possible names of the file with the values, relative to the folder of the header.

        It is empty if the values follow the header.

        Args:
            header: the content of the file, or its start.
            name: of the file.
        """

    def open_images(self, data: bytes, name: str, settings: SegmentSettings, values: bytes | None = None) -> Decode:
        """As for FormatModule; `values` is the content of the second file, if there is one."""


@dataclass(frozen=True)
class Format:
    """A file format, a row of the table FORMATS.

    Attributes:
        endings: endings of file names, in lower case.
        module: name of its FormatModule, which is imported at the first file of the format.
        selector: a regular expression for the selectors of its images.
        is_sniffed: whether the module also has `sniff(head: bytes) -> bool`, for files whose names state no format. Its
            argument is the first HEAD_BYTES bytes.
        signature: a regular expression for the first HEAD_BYTES bytes that only files of this format begin with, or "".
        headers: those of the endings whose files keep their values in a second file. The module is a PairedModule.
    """

    endings: tuple[str, ...]
    module: str
    selector: str = ""
    is_sniffed: bool = False
    signature: bytes = b""
    headers: tuple[str, ...] = ()

    def begins(self, head: bytes) -> bool:
        """Return whether bytes begin with the signature of the format."""
        return bool(self.signature and re.match(self.signature, head, re.DOTALL))

    def load(self) -> FormatModule:
        """Import the module."""
        return cast(FormatModule, import_module(self.module))


_TIFF = rb"II[*+]\0|MM\0[*+]"
_IMAGE = (
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|BM.{4}\0{4}.{3}\0[\x0c-\x7c]\0\0\0|GIF8[79]a"
    rb"|\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51|.{4}ftypavi[fs]"
)
_VIDEO = rb".{4}ftyp(?:isom|iso[2-9]|mp4[12]|avc1|M4V|qt  |MSNV)|RIFF.{4}AVI |\x1aE\xdf\xa3|\0\0\x01[\xba\xb3]"
_NIFTI = rb"(?:\x5c\x01\0\0|\0\0\x01\x5c).{340}n[+]1\0|(?:\x1c\x02\0\0|\0\0\x02\x1c)n[+]2\0"
_SLICE = r"(?:volume=\d+,)?slice=\d+"
FORMATS = {
    # DICOM comes first: the 128 bytes before its signature may be those of a TIFF
    "dicom": Format((".dcm", ".dicom"), "vlsm.images.dicom", r"frame=\d+", is_sniffed=True, signature=rb".{128}DICM"),
    "tiff": Format((".tif", ".tiff"), "vlsm.images.tiff", r"page=\d+", signature=_TIFF),
    "image": Format(EXTENSIONS, "vlsm.images.decode", signature=_IMAGE),
    "nifti": Format(
        (".nii", ".nii.gz", ".hdr", ".hdr.gz"),
        "vlsm.images.nifti",
        _SLICE,
        signature=_NIFTI,
        headers=(".hdr", ".hdr.gz"),
    ),
    "nrrd": Format((".nrrd", ".nhdr"), "vlsm.images.nrrd", _SLICE, signature=rb"NRRD000", headers=(".nhdr",)),
    "metaimage": Format((".mha", ".mhd"), "vlsm.images.metaimage", _SLICE, headers=(".mhd",)),
    "video": Format(
        (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"),
        "vlsm.images.video",
        r"frame=\d+",
        signature=_VIDEO,
    ),
}
_ARCHIVES = {"tar": (".tar", ".tar.gz", ".tgz"), "zip": (".zip",), "parquet": (".parquet",)}
UNNAMED = "unnamed"  # the kind of a file whose name states no format
_URL = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class Look:
    """Settings for listing the images of a file.

    Attributes:
        axis: the axis along which volumes are sliced: "axial", "coronal" or "sagittal".
        tile: how images are cut into windows. Without a tile size, the sizes of images do not matter.
        fields: which members of a WebDataset sample are images, such as "image.png"; empty for all.
        columns: the setting `columns`: names of a list's columns, and of the images in Parquet.
        frames: which frames of videos and of objects with several frames are images, as the setting `frames`.
        allow: the setting `run.allow`: redirects of HTTP may lead there.
    """

    axis: str = "axial"
    tile: TileSettings = field(default_factory=TileSettings)
    fields: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    frames: str | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inside:
    """One image of a file.

    Attributes:
        selector: of the image; None if it is the only image of the file.
        offset, length: position and number of the member's bytes in a tar (after decompression).
        problem: why this image, or the rest of the file, cannot be read: "REASON: message".
        num_windows: number of its windows, according to the file's header.
        sample_field: the field of a WebDataset sample that this image is, if no field was chosen.
        stated: columns of the plan that the file itself states for this image: prompts, image_id.
    """

    selector: str | None = None
    offset: int | None = None
    length: int | None = None
    problem: str | None = None
    num_windows: int = 1
    sample_field: str | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)


def file_name(uri: str) -> str:
    """Return the last part of a path or URI in lower case, without the query of a URL, such as a signature."""
    return (re.split("[?#]", uri, maxsplit=1)[0] if _URL.match(uri) else uri).rsplit("/", 1)[-1].lower()


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name: a key of FORMATS or _ARCHIVES, UNNAMED, or None for another format.

    UNNAMED is for names that state no format; see the rule of this module.
    """
    lower = file_name(name)
    if not lower or lower.startswith("._"):  # macOS writes ._x.jpg beside x.jpg on foreign disks
        return None
    for kind, known in FORMATS.items():  # every listed file comes here: nothing is built for it
        if lower.endswith(known.endings):
            return kind
    for kind, endings in _ARCHIVES.items():
        if lower.endswith(endings):
            return kind
    return None if _is_known(lower.rpartition(".")[1:]) else UNNAMED


@functools.lru_cache(maxsize=1024)
def _is_known(extension: tuple[str, str]) -> bool:
    """Return whether an extension (dot, text) stands for a media type, or for a compression."""
    suffix, table = "".join(extension), _media_types()
    media_type = table.types_map[True].get(suffix) or table.types_map[False].get(suffix)
    return suffix in table.encodings_map or media_type not in (None, "application/octet-stream")


@functools.cache
def _media_types() -> mimetypes.MimeTypes:
    """Return Python's own table, which does not depend on the machine."""
    return mimetypes.MimeTypes()


def sniff_kind(head: bytes, name: str = "") -> str | None:
    """Return the kind of a file by its first HEAD_BYTES bytes and its name, or None for an unknown format.

    Bytes that agree with the name, or with no format, have the format of the name.
    """
    named = kind_of(name)
    if named in FORMATS and FORMATS[named].begins(head):
        return named
    for kind, known in FORMATS.items():
        if known.begins(head):
            return kind
    if named in FORMATS:
        return named
    for kind, known in FORMATS.items():
        if known.is_sniffed and import_module(known.module).sniff(head):
            return kind
    return None


def is_archive(name: str) -> bool:
    """Return whether a file of this name holds other files: a tar, a zip, or a Parquet file."""
    return kind_of(name) in _ARCHIVES


def is_header(name: str) -> bool:
    """Return whether a file of this name describes images, while their values are in a second file."""
    return name.lower().endswith(tuple(ending for known in FORMATS.values() for ending in known.headers))


def header_of(uri: str) -> str | None:
    """Return the location of the header of a NIfTI or Analyze pair from that of its `.img` file, else None."""
    if not uri.lower().endswith((".img", ".img.gz")):
        return None
    start = uri.lower().rindex(".img")
    return uri[:start] + (".HDR" if uri[start + 1].isupper() else ".hdr") + uri[start + 4 :]


def data_uris(header: bytes, uri: str) -> list[str]:
    """Return the possible locations of the second file of a file, or an empty list if it is whole.

    Args:
        header: the content of the file, or its start.
        uri: its location.

    Raises:
        ImageError: the header is damaged, or names a file in another folder.
    """
    known = FORMATS.get(kind_of(uri) or "")
    if known is None or not known.headers:
        return []
    names = cast(PairedModule, known.load()).data_files(header, uri)
    return [f"{uri[: uri.rfind('/') + 1]}{name}" for name in names]


def split_selector(uri: str, selector: str | None) -> tuple[str | None, str | None]:
    """Return the member of a tar or zip, or the row of a Parquet file, and the frame, page or slice in it.

    Each is None if there is none.
    """
    if selector is None:
        return None, None
    if not is_archive(uri):
        return None, selector
    member, separator, frame = selector.rpartition("#")
    if separator and any(known.selector and re.fullmatch(known.selector, frame) for known in FORMATS.values()):
        return member, frame
    return selector, None


def describe_other(name: str) -> str:
    """Return the label of a skipped file for counting: its extension, or "no extension".

    A number or a long text is no extension: it may be different for each of many files.
    """
    _, dot, extension = file_name(name).rpartition(".")
    return dot + extension if dot and len(extension) <= 10 and not extension[:1].isdecimal() else "no extension"


def list_frames(
    open_file: Open,
    name: str,
    size_bytes: int | None,
    look: Look,
    skipped: Counter[str] | None = None,
    kind: str | None = None,
) -> list[Inside]:
    """Return the images of a file that is not an archive, from its header. A file without pixels has no images.

    Args:
        open_file: opens the file, which may read lazily. If the format allows it, only a part is read.
        name: of the file. It determines the kind together with the content, and appears in error messages.
        size_bytes: of the file; None if unknown, then the opened file is asked.
        look: how to slice volumes and tile images.
        skipped: counter of files without images, by description; this function adds to it.
        kind: of the file, if its name does not state it.

    Raises:
        ImageError: the file is not a valid file of its format.
    """
    if (kind or kind_of(name)) == "image" and look.tile.size is None:
        return [Inside()]
    with open_file() as file:
        kind = kind or sniff_kind(file.read(HEAD_BYTES), name)
        file.seek(0)
        try:
            if kind is None:
                raise NoImages(describe_other(name))
            selectors, size = FORMATS[kind].load().list_images(file, name, size_bytes, look)
        except NoImages as error:
            if skipped is not None:
                skipped[str(error)] += 1
            return []
    count = min(count_windows(size, look.tile.size, look.tile.overlap), look.tile.max_windows)
    return [Inside(selector, num_windows=count) for selector in selectors]
