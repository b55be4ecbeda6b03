"""The table of file formats, and the images of one file: one, or the frames, pages or slices of DICOM, TIFF and NIfTI.

A selector names one of several images: "frame=3" of a DICOM file, "page=2" of a TIFF, "slice=17" of a volume. In a tar
or zip it begins with the member's name: "a/b.png", "a/b.dcm#frame=3". An image that is alone in its file has none.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import BinaryIO, Protocol, cast

import numpy as np

from vlsm.config import SegmentSettings, TileSettings
from vlsm.images.decode import EXTENSIONS
from vlsm.images.windows import count_windows

HEAD_BYTES = 132  # of a file, by which a format knows it

Open = Callable[[], BinaryIO]
Decode = Callable[[str | None], np.ndarray]  # an image by its selector, (H, W, 3) uint8; raises ImageError


class FormatModule(Protocol):
    """What the module of a format defines. Every function raises ImageError for a damaged file."""

    def list_images(
        self, file: BinaryIO, name: str, size_bytes: int | None, look: "Look"
    ) -> tuple[Sequence[str | None], tuple[int, int]]:
        """Return the selector of each image, from the file's header, and (height, width) of the images in pixels.

        A file with one image has the selector None. A file without pixels has no images.

        Args:
            file: at its start; it may read lazily.
            name: of the file, for messages.
            size_bytes: of the file; None if nobody knows it.
            look: how the file is looked into.
        """

    def open_images(self, data: bytes, name: str, settings: SegmentSettings) -> Decode:
        """Return the function that decodes the images of a file, by their selectors.

        Args:
            data: the content of the file.
            name: of the file, for messages.
            settings: limits, and how volumes and grey values are shown.
        """


@dataclass(frozen=True)
class Format:
    """A file format: a line of the table.

    Attributes:
        endings: of the files' names, in lower case.
        module: a FormatModule by its name; it is imported when a file of the format is met.
        selector: a regular expression for the selectors of its images.
        is_sniffed: whether the module also has `sniff(head: bytes) -> bool`, for files whose names tell nothing. Its
            argument is the first HEAD_BYTES bytes.
    """

    endings: tuple[str, ...]
    module: str
    selector: str = ""
    is_sniffed: bool = False

    def load(self) -> FormatModule:
        """Import the module."""
        return cast(FormatModule, import_module(self.module))


FORMATS = {
    "tiff": Format((".tif", ".tiff"), "vlsm.images.tiff", r"page=\d+"),
    "image": Format(EXTENSIONS, "vlsm.images.decode"),
    "dicom": Format((".dcm", ".dicom"), "vlsm.images.dicom", r"frame=\d+", is_sniffed=True),
    "nifti": Format((".nii", ".nii.gz"), "vlsm.images.nifti", r"(?:volume=\d+,)?slice=\d+"),
}
_ARCHIVES = {"tar": (".tar", ".tar.gz", ".tgz"), "zip": (".zip",)}
UNNAMED = "unnamed"  # the kind of a file whose name tells nothing


@dataclass(frozen=True)
class Look:
    """How a file is looked into.

    Attributes:
        axis: along which volumes are sliced: "axial", "coronal" or "sagittal".
        tile: how images are cut into windows; without, their sizes do not matter.
    """

    axis: str = "axial"
    tile: TileSettings = field(default_factory=TileSettings)


@dataclass(frozen=True)
class Inside:
    """One image of a file.

    Attributes:
        selector: which one; None where it is alone.
        offset, length: where a tar has the member's bytes (after unpacking, where it is compressed).
        problem: why this, or what else the file may hold, cannot be read: "REASON: message".
        num_windows: into which it is cut, as far as its header tells.
    """

    selector: str | None = None
    offset: int | None = None
    length: int | None = None
    problem: str | None = None
    num_windows: int = 1


def kind_of(name: str) -> str | None:
    """The kind of a file by its name: a key of FORMATS, "tar", "zip", UNNAMED, or None for a file of no known format.

    Scanners give names that tell nothing: without an extension, or with a number for it.
    """
    lower = name.rsplit("/", 1)[-1].lower()
    if not lower or lower.startswith("._"):  # what macOS leaves beside x.jpg on foreign disks
        return None
    endings = {kind: known.endings for kind, known in FORMATS.items()} | _ARCHIVES
    for kind, known_endings in endings.items():
        if lower.endswith(known_endings):
            return kind
    suffix = lower.rpartition(".")[2]
    return UNNAMED if suffix == lower or suffix.isdecimal() else None


def sniff_kind(head: bytes) -> str | None:
    """The kind of an UNNAMED file by its first HEAD_BYTES bytes, or None for a file of no known format."""
    for kind, known in FORMATS.items():
        if known.is_sniffed and import_module(known.module).sniff(head):
            return kind
    return None


def is_archive(name: str) -> bool:
    """Whether a file of this name is a tar or zip, and its images are its members'."""
    return kind_of(name) in _ARCHIVES


def split_selector(uri: str, selector: str | None) -> tuple[str | None, str | None]:
    """The member of a tar or zip, and the frame, page or slice in it or in the file itself."""
    if selector is None:
        return None, None
    if not is_archive(uri):
        return None, selector
    member, separator, frame = selector.rpartition("#")
    is_frame = any(known.selector and re.fullmatch(known.selector, frame) for known in FORMATS.values())
    return (member, frame) if separator and is_frame else (selector, None)


def describe_other(name: str) -> str:
    """What a count of files that are passed over calls one of this name."""
    base = name.rsplit("/", 1)[-1]
    return "." + base.rsplit(".", 1)[-1].lower() if "." in base else "no extension"


def list_frames(open_file: Open, name: str, size_bytes: int | None, look: Look) -> list[Inside]:
    """The images of a file that is no archive, from its header; none where it holds no pixels.

    Args:
        open_file: opens it; the file may read lazily, and is not read whole where its format allows it.
        name: its name, which tells its kind, for messages too.
        size_bytes: of it; the file is asked where None.
        look: how it is looked into.

    Raises:
        ImageError: it cannot be read as what its name says.
    """
    kind = kind_of(name)
    if kind == "image" and look.tile.size is None:
        return [Inside()]
    with open_file() as file:
        if kind == UNNAMED:
            if (kind := sniff_kind(file.read(HEAD_BYTES))) is None:
                return []
            file.seek(0)
        selectors, size = FORMATS[kind or "image"].load().list_images(file, name, size_bytes, look)
    count = min(count_windows(size, look.tile.size, look.tile.overlap), look.tile.max_windows)
    return [Inside(selector, num_windows=count) for selector in selectors]
