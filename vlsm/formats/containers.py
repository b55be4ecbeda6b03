"""What is inside of a file that may hold several images: tar, zip, DICOM, NIfTI and TIFF with pages.

A selector names one of them: "a/b.png" in a tar or zip, "frame=3" of a DICOM file, "page=2" of a TIFF, "slice=17" of a
volume, or both: "a/b.dcm#frame=3". An image that is alone in its file has none.
"""

import contextlib
import functools
import gzip
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from PIL import Image

from vlsm.config import TileSettings
from vlsm.errors import ImageError
from vlsm.images import EXTENSIONS
from vlsm.tiles import plan_windows

_ENDINGS = {
    "tiff": (".tif", ".tiff"),
    "image": EXTENSIONS,
    "dicom": (".dcm", ".dicom"),
    "nifti": (".nii", ".nii.gz"),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "zip": (".zip",),
}
_LARGEST_READ = 1 << 26  # that a tar's headers may ask for
_REDUCED_OR_MASK = 0b101  # TIFF 6.0, tag NewSubfileType
_SUBFILE_TYPE = 254
_FRAME = re.compile(r"(?:(.*)#)?((?:frame|page|slice)=\d+|volume=\d+,slice=\d+)", re.DOTALL)

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


def is_compressed_tar(name: str) -> bool:
    """Whether a tar of this name can only be read from its beginning."""
    return name.lower().endswith(("gz", ".tgz"))


def split_selector(selector: str | None) -> tuple[str | None, str | None]:
    """The member of a tar or zip, and the frame, page or slice in it or in the file itself."""
    found = _FRAME.fullmatch(selector or "")
    return (found[1], found[2]) if found else (selector, None)


def describe_other(name: str) -> str:
    """What a count of files that are passed over calls one of this name."""
    base = name.rsplit("/", 1)[-1]
    return "." + base.rsplit(".", 1)[-1].lower() if "." in base else "no extension"


def list_images(open_file: Open, name: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    """The images of a file, from its headers.

    Args:
        open_file: opens it; the file may read lazily, and is not read whole where its format allows it.
        name: its name, which tells its kind, for messages too.
        look: how it is looked into.
        skipped: takes the count of what is passed over.

    Raises:
        ImageError: it cannot be read as what its name says.
        OSError: its store fails.
    """
    kind = kind_of(name)
    if is_archive(name):
        with open_file() as file:
            found = (_list_tar if kind == "tar" else _list_zip)(file, name, look, skipped)
        if not found:
            skipped[f"{describe_other(name)} without images"] += 1
        return found
    found = _list_frames(open_file, name, kind, look)
    if not found:
        skipped[describe_other(name) if kind == "dicom?" else f"{describe_other(name)} without pixels"] += 1
    return found


def _list_frames(open_file: Open, name: str, kind: str | None, look: Look) -> list[Inside]:
    """The images of a file that is no archive; none where it holds no pixels."""
    selectors = _select_frames(open_file, name, kind, look.axis)
    num_windows = 1
    if look.tile.size is not None and selectors:
        with contextlib.suppress(Exception), open_file() as file:  # damage of any kind: reading it will say what
            num_windows = len(plan_windows(_read_size(file, kind), look.tile.size, look.tile.overlap))
    return [Inside(selector, num_windows=num_windows) for selector in selectors]


def _read_size(file: BinaryIO, kind: str | None) -> tuple[int, int]:
    """Height and width of what a file shows, from its header; slices of volumes are small."""
    if kind in ("dicom", "dicom?"):
        from vlsm.formats.dicom import read_size

        return read_size(file)
    if kind == "nifti":
        return 1, 1
    with Image.open(file) as image:
        return image.height, image.width


def _select_frames(open_file: Open, name: str, kind: str | None, axis: str) -> Sequence[str | None]:
    if kind == "image":
        return [None]
    with open_file() as file:
        if kind == "tiff":
            pages = _list_pages(file, name)
            return [f"page={page}" for page in pages] if len(pages) > 1 else [None]
        if kind == "nifti":
            from vlsm.formats.nifti import list_slices

            return list_slices(file, name, axis)
        from vlsm.formats.dicom import count_frames, is_dicom

        if kind == "dicom?" and not is_dicom(file.read(132)):
            return []
        file.seek(0)
        count = count_frames(file, name)
        return [f"frame={frame}" for frame in range(count)] if count > 1 else [None] * count


def _list_pages(file: BinaryIO, name: str) -> list[int]:
    """The pages of a TIFF, but for masks and smaller copies of another page."""
    try:
        with Image.open(file, formats=["TIFF"]) as image:
            pages = []
            for page in range(getattr(image, "n_frames", 1)):
                image.seek(page)
                if not int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & _REDUCED_OR_MASK:  # type: ignore[attr-defined]
                    pages.append(page)
    except Exception as error:  # decoders meet damage with every error that there is
        raise ImageError("corrupt", f"{name}: {error or type(error).__name__}") from error
    return pages or [0]


def _list_member(open_file: Open, member: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    """The images of one member of a tar or zip; one that cannot be looked into fails later, when it is read."""
    kind = kind_of(member)
    if kind is None or is_archive(member):
        skipped[describe_other(member)] += 1
        return []
    found = [Inside()]
    with contextlib.suppress(Exception):  # damage of any kind: reading it will say what
        found = _list_frames(open_file, member, kind, look)
    if not found:
        skipped[describe_other(member)] += 1
    return [
        replace(inside, selector=member if inside.selector is None else f"{member}#{inside.selector}")
        for inside in found
    ]


def _list_zip(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    found: dict[str, list[Inside]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    # of several members of one name the last counts, as for whoever unpacks it
                    open_member: Any = functools.partial(archive.open, info)
                    found[info.filename] = _list_member(open_member, info.filename, look, skipped)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise ImageError("corrupt", f"{name} is no zip that can be read: {error}") from error
    return [inside for own in found.values() for inside in own]


def _list_tar(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    """The images of a tar; where it is damaged, what stands before and behind, and a problem for the rest."""
    found: dict[str, list[Inside]] = {}
    problem = None
    try:
        plain: Any = _Modest(gzip.GzipFile(fileobj=file) if is_compressed_tar(name) else file)
        # ignore_zeros: beyond damage, and beyond the end of tars that were put one behind the other
        with tarfile.TarFile(fileobj=plain, ignore_zeros=True) as archive:
            end = 0
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # it would keep them all
                if member.offset > end:
                    problem = problem or _describe_gap(plain, end)
                end = archive.offset
                if member.isreg():
                    open_member: Any = functools.partial(archive.extractfile, member)
                    own = _list_member(open_member, member.name, look, skipped)
                    found[member.name] = [
                        replace(inside, offset=member.offset_data, length=member.size) for inside in own
                    ]
            problem = problem or _describe_gap(plain, end)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        problem = f"it breaks off: {error}"
    images = [inside for own in _without_parts(found, skipped).values() for inside in own]
    return [*images, Inside(problem=f"corrupt: {name}: {problem}")] if problem else images


def _describe_gap(file: Any, offset: int) -> str | None:
    """What is wrong with a tar where no member begins; nothing, where it says that it ends there."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return "it breaks off between two members"
    return f"what begins at byte {offset:,} cannot be read" if block.strip(b"\0") else None


def _without_parts(found: dict[str, list[Inside]], skipped: Counter[str]) -> dict[str, list[Inside]]:
    """Without the other pictures of a WebDataset sample: beside 7.jpg, 7.seg.png is its label and no image."""
    plain = {_sample_of(name)[0] for name, own in found.items() if own and "." not in _sample_of(name)[1]}
    kept = {}
    for name, own in found.items():
        key, field = _sample_of(name)
        if own and "." in field and key in plain and kind_of(name) in ("image", "tiff"):
            skipped[f".{field} of a sample"] += 1
        else:
            kept[name] = own
    return kept


def _sample_of(name: str) -> tuple[str, str]:
    """A member's key and field as WebDataset has them: the name up to the first dot of its last part, and the rest."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return f"{folder}{slash}{key}", field


class _Modest:
    """A file of which nobody reads more at once than a header can need: damage may ask for anything."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ValueError(f"a header of {size:,} bytes")
        return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())
