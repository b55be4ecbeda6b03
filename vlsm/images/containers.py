"""What is inside of tar and zip archives, from their headers; of any other file, see `vlsm.images.formats`."""

import functools
import gzip
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO

from vlsm.errors import ImageError
from vlsm.images.formats import Inside, Look, Open, describe_other, is_archive, kind_of, list_frames

_LARGEST_READ = 1 << 26  # that a tar's headers may ask for
_MOST_ZEROS = 1 << 27  # bytes of nothing, after which a tar is taken to be damaged
_MOST_NAME_BYTES = 8192  # as of an image_id in a list

Members = dict[str, list[Inside]]


def list_images(
    open_file: Open, name: str, look: Look, skipped: Counter[str], size_bytes: int | None = None
) -> list[Inside]:
    """The images of a file, from its headers.

    Args:
        open_file: opens it; the file may read lazily, and is not read whole where its format allows it.
        name: its name, which tells its kind, for messages too.
        look: how it is looked into.
        skipped: takes the count of what is passed over.
        size_bytes: of it; the file is asked where None.

    Raises:
        ImageError: it cannot be read as what its name says.
        OSError: its store fails.
    """
    if is_archive(name):
        with open_file() as file:
            found = (_list_tar if kind_of(name) == "tar" else _list_zip)(file, name, look, skipped)
        if not found:
            skipped[f"{describe_other(name)} without images"] += 1
        return found
    found = list_frames(open_file, name, size_bytes, look)
    if not found:
        skipped[describe_other(name) + ("" if kind_of(name) == "dicom?" else " without pixels")] += 1
    return found


def is_compressed_tar(name: str) -> bool:
    """Whether a tar of this name can only be read from its beginning."""
    return name.lower().endswith(("gz", ".tgz"))


def check_zip_member(name: str, info: zipfile.ZipInfo) -> None:
    """Nothing, or an ImageError for what cannot be unpacked in bounded memory."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ImageError("unreadable", f"{name} is neither stored nor deflated in its zip")
    if info.flag_bits & 1:
        raise ImageError("unreadable", f"{name} is encrypted")


def _list_member(look_into: Callable[[], list[Inside]], member: str, skipped: Counter[str]) -> list[Inside]:
    """The images of one member of a tar or zip; one that cannot be looked into is a problem of its own."""
    if kind_of(member) is None or is_archive(member):
        skipped[describe_other(member)] += 1
        return []
    if len(member.encode("utf-8", "surrogateescape")) > _MOST_NAME_BYTES:
        skipped["name that is too long"] += 1
        return []
    try:
        found = look_into()
    except ImageError as error:
        found = [Inside(problem=str(error))]
    except Exception as error:  # damage of any kind; what a store does is told by the file itself
        found = [Inside(problem=str(ImageError("corrupt", f"{member}: {error or type(error).__name__}")))]
    if not found:
        skipped[describe_other(member)] += 1
    return [replace(one, selector=f"{member}#{one.selector}" if one.selector else member) for one in found]


def _list_zip(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    found: Members = {}

    def look_into(info: zipfile.ZipInfo) -> list[Inside]:
        check_zip_member(f"{name}#{info.filename}", info)
        open_member: Any = functools.partial(archive.open, info)
        return list_frames(open_member, info.filename, info.file_size, look)

    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    own = _list_member(functools.partial(look_into, info), info.filename, skipped)
                    _add(found, info.filename, own, skipped)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise ImageError("corrupt", f"{name} is no zip that can be read: {error}") from error
    return [inside for own in found.values() for inside in own]


def _add(found: Members, member: str, own: list[Inside], skipped: Counter[str]) -> None:
    """Of several members of one name the last counts, as for whoever unpacks them."""
    if found.pop(member, None):
        skipped["member of a name that stands there again"] += 1
    found[member] = own


def _list_tar(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> list[Inside]:
    """The images of a tar; where it is damaged, what stands before and behind, and a problem for the rest."""
    found: Members = {}
    walk = _Walk(gzip.GzipFile(fileobj=file) if is_compressed_tar(name) else file)
    try:
        # ignore_zeros: beyond damage, and beyond the end of tars that were put one behind the other
        with tarfile.TarFile(fileobj=walk, ignore_zeros=True) as archive:  # type: ignore[arg-type]
            _walk_tar(archive, walk, look, found, skipped)
    except Exception as error:  # damage of any kind; what a store does is told by the file itself
        if not (isinstance(error, gzip.BadGzipFile) and walk.num_zeros):  # of what stands behind a tar that has ended
            walk.problem = f"it breaks off: {error or type(error).__name__}"
    images = [inside for own in _without_parts(found, skipped).values() for inside in own]
    return [*images, Inside(problem=f"corrupt: {name}: {walk.problem}")] if walk.problem else images


def _walk_tar(archive: tarfile.TarFile, walk: "_Walk", look: Look, found: Members, skipped: Counter[str]) -> None:
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # it would keep them all
        walk.check_gap(end, member.offset)
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name!r} has a negative size")
        end = walk.marked_offset = archive.offset
        if member.islnk() and member.linkname in spans:  # a second name of a file that stands before it
            member.type, (member.offset_data, member.size) = tarfile.REGTYPE, spans[member.linkname]
        if member.isreg():
            spans[member.name] = span = member.offset_data, member.size
            own = _list_member(functools.partial(_look_into_tar, archive, member, look), member.name, skipped)
            _add(found, member.name, [replace(one, offset=span[0], length=span[1]) for one in own], skipped)
        elif not member.isdir():
            skipped["link or device"] += 1
    walk.check_gap(end, None)


def _look_into_tar(archive: tarfile.TarFile, member: tarfile.TarInfo, look: Look) -> list[Inside]:
    if member.issparse():
        raise ImageError("unreadable", f"{member.name} is a sparse member")
    open_member: Any = functools.partial(archive.extractfile, member)
    return list_frames(open_member, member.name, member.size, look)


def _without_parts(found: Members, skipped: Counter[str]) -> Members:
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


class _Walk:
    """A tar being read from header to header, forwards only, and in modest pieces: damage may ask for anything.

    Attributes:
        marked_offset: where the next member should begin; the block that is read there is kept.
        num_zeros: bytes of nothing that were read last.
        problem: the first thing that is wrong.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._marked: bytes = b""
        self.marked_offset, self.num_zeros = 0, 0
        self.problem: str | None = None

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ValueError(f"a header of {size:,} bytes")
        is_marked = self._file.tell() == self.marked_offset
        data = bytes(self._file.read(size))
        if is_marked:
            self._marked = data
        self.num_zeros = 0 if not data or data.strip(b"\0") else self.num_zeros + len(data)
        if self.num_zeros > _MOST_ZEROS:
            raise ValueError(f"{_MOST_ZEROS:,} bytes of nothing")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def seekable(self) -> bool:
        return True

    def check_gap(self, end: int, begin: int | None) -> None:
        """Note what is wrong where a member ends and the next does not begin; nothing, where the tar says it ends."""
        if begin == end or self.problem:
            return
        block = self._marked[: tarfile.BLOCKSIZE]
        if not block:
            self.problem = "it breaks off between two members"
        elif block.strip(b"\0") and not _is_header(block):
            self.problem = f"what begins at byte {end:,} cannot be read"


def _is_header(block: bytes) -> bool:
    """Whether it is one that tarfile passes over, such as git's global one."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
