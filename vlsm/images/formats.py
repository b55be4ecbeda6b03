"""The images of one file, by its kind: one, or the frames, pages or slices of DICOM, TIFF and NIfTI.

A selector names one of several: "frame=3" of a DICOM file, "page=2" of a TIFF, "slice=17" of a volume. In a tar or zip
it begins with the member's name: "a/b.png", "a/b.dcm#frame=3". An image that is alone in its file has none.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image

from vlsm.config import TileSettings
from vlsm.errors import ImageError
from vlsm.images.decode import EXTENSIONS
from vlsm.segmentation.tiles import count_windows

_ENDINGS = {
    "tiff": (".tif", ".tiff"),
    "image": EXTENSIONS,
    "dicom": (".dcm", ".dicom"),
    "nifti": (".nii", ".nii.gz"),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "zip": (".zip",),
}
_REDUCED_OR_MASK = 0b101  # TIFF 6.0, tag NewSubfileType
_SUBFILE_TYPE = 254
_FRAME = re.compile(r"(?:frame|page|slice)=\d+|volume=\d+,slice=\d+")

Open = Callable[[], BinaryIO]


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
    """What a file is by its name: "image", "tiff", "dicom", "nifti", "tar", "zip", or None for none of them.

    "dicom?" is one whose name tells nothing, as scanners name theirs: no extension, or a number for it.
    """
    lower = name.rsplit("/", 1)[-1].lower()
    if not lower or lower.startswith("._"):  # what macOS leaves beside x.jpg on foreign disks
        return None
    for kind, endings in _ENDINGS.items():
        if lower.endswith(endings):
            return kind
    suffix = lower.rpartition(".")[2]
    return "dicom?" if suffix == lower or suffix.isdecimal() else None


def is_archive(name: str) -> bool:
    """Whether a file of this name is a tar or zip, and its images are its members'."""
    return kind_of(name) in ("tar", "zip")


def split_selector(uri: str, selector: str | None) -> tuple[str | None, str | None]:
    """The member of a tar or zip, and the frame, page or slice in it or in the file itself."""
    if selector is None:
        return None, None
    if not is_archive(uri):
        return None, selector
    member, separator, frame = selector.rpartition("#")
    return (member, frame) if separator and _FRAME.fullmatch(frame) else (selector, None)


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
        if kind == "nifti":
            from vlsm.images.nifti import list_slices, read_grid

            selectors: Sequence[str | None] = list_slices(file, name, look.axis)
            file.seek(0)
            return _windowed(selectors, read_grid(file, name, look.axis).slice_shape, look)
        if kind in ("dicom", "dicom?"):
            return _list_dicom(file, name, size_bytes, look)
        return _list_pages(file, name, look)


def _windowed(selectors: Sequence[str | None], size: tuple[int, int], look: Look) -> list[Inside]:
    count = min(count_windows(size, look.tile.size, look.tile.overlap), look.tile.max_windows)
    return [Inside(selector, num_windows=count) for selector in selectors]


def _list_dicom(file: BinaryIO, name: str, size_bytes: int | None, look: Look) -> list[Inside]:
    from vlsm.images.dicom import is_dicom, read_shape

    if kind_of(name) == "dicom?" and not is_dicom(file.read(132)):
        return []
    file.seek(0)
    count, *size = read_shape(file, name, size_bytes)
    selectors = [f"frame={frame}" for frame in range(count)] if count > 1 else [None] * count
    return _windowed(selectors, (size[0], size[1]), look)


def _list_pages(file: BinaryIO, name: str, look: Look) -> list[Inside]:
    """An image, or the pages of a TIFF, but for masks and smaller copies of another page."""
    try:
        with Image.open(file) as image:
            pages = [0]
            if image.format == "TIFF":
                pages = []
                for page in range(getattr(image, "n_frames", 1)):
                    image.seek(page)
                    if not int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK:  # type: ignore[attr-defined]
                        pages.append(page)
                pages = pages or [0]
                image.seek(pages[0])
            size = image.height, image.width
    except Exception as error:  # decoders meet damage with every error that there is
        raise ImageError("corrupt", f"{name}: {error or type(error).__name__}") from error
    return _windowed([None] if pages == [0] else [f"page={page}" for page in pages], size, look)
