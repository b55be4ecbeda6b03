"""Lists the images in tar and zip archives from their headers. `vlsm.images.formats` lists those in other files."""

import contextlib
import functools
import gzip
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO

from vlsm.errors import ImageError
from vlsm.images.formats import (
    Inside,
    Look,
    Open,
    describe_other,
    file_name,
    is_archive,
    is_header,
    kind_of,
    list_frames,
)
from vlsm.images.samples import Members, choose_fields

_LARGEST_READ = 1 << 26  # bytes; a tar header that asks for more is damaged
_MOST_ZEROS = 1 << 27  # a tar with more consecutive zero bytes is damaged
_MOST_NAME_BYTES = 8192  # the same limit as for an image_id in a manifest

_UTF8_FLAG = 0x800  # of a zip member's name

Listed = tuple[Members, list[Inside]]  # the images of each member, and the problem of a damaged archive


def list_images(
    open_file: Open, name: str, look: Look, skipped: Counter[str], size_bytes: int | None = None
) -> list[Inside]:
    """Return the images in a file, from its headers.

    Args:
        open_file: opens the file. It may read lazily; only the headers are read if the format allows it.
        name: the file's name. It decides the format, and messages use it.
        look: options for listing.
        skipped: counter of skipped files and members, by description; this function adds to it.
        size_bytes: the file's size, or None to ask the file.

    Raises:
        ImageError: the file cannot be read in the format of its name.
        OSError: the store fails.
    """
    if is_archive(name):
        with open_file() as file:
            members, problems = (_list_tar if kind_of(name) == "tar" else _list_zip)(file, name, look, skipped)
        members = choose_fields(members, look.fields, kind_of(name) == "tar", skipped)
        images = [image for found in members.values() for image in found] + problems
        if not images:
            skipped[f"{describe_other(name)} without images"] += 1
        return images
    return list_frames(open_file, name, size_bytes, look, skipped)


def is_compressed_tar(name: str) -> bool:
    """Return whether a tar of this name is compressed, so that it can only be read from its beginning."""
    return file_name(name).endswith(("gz", ".tgz"))


def check_zip_member(name: str, info: zipfile.ZipInfo) -> None:
    """Raise an ImageError if a zip member is encrypted or uses another compression than deflate.

    Only stored and deflated members can be unpacked in bounded memory.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ImageError(
            "unreadable", f"{name} has the compression method {info.compress_type}; it must be stored or deflated"
        )
    if info.flag_bits & 1:
        raise ImageError("unreadable", f"{name} is encrypted; only members without a password are read")


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip whose members have their right names, where the zip does not say in which code its names are.

    A name is UTF-8 if a field of Info-ZIP says so, or if its bytes are valid UTF-8: macOS writes it without the flag.
    Else it is read as code page 437, as the standard demands. `getinfo` also finds a member by its name in this code
    page, under which earlier versions listed it.

    Raises:
        zipfile.BadZipFile and others: the file is no valid zip.
    """
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if not (info.flag_bits & _UTF8_FLAG or info.filename.isascii()):
            raw = info.filename.encode("cp437")
            with contextlib.suppress(UnicodeDecodeError):
                info.filename = (_unicode_path(info.extra, raw) or raw).decode("utf-8")
    archive.NameToInfo |= {info.filename: info for info in archive.infolist()}
    return archive


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """Return the UTF-8 name in the extra field 0x7075 of Info-ZIP, if it belongs to the member's raw name."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        value, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 0x7075 and len(value) > 5 and value[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return value[5:]
    return None


def _list_member(look_into: Callable[[], list[Inside]], member: str, skipped: Counter[str]) -> list[Inside]:
    """Return the images in one member of a tar or zip. A damaged member gives one item with a problem."""
    is_of_macos = "__MACOSX" in member.split("/")[:-1]  # a folder of attributes, not of images
    if kind_of(member) is None or is_archive(member) or is_of_macos:
        skipped[describe_other(member)] += 1
        return []
    if len(member.encode("utf-8", "surrogateescape")) > _MOST_NAME_BYTES:
        skipped["name that is too long"] += 1
        return []
    try:
        images = look_into()
    except ImageError as error:
        images = [Inside(problem=str(error))]
    except Exception as error:  # damage of any kind; the file object records the errors of its store
        images = [Inside(problem=str(ImageError("corrupt", f"{member}: {error or type(error).__name__}")))]
    if images and is_header(member) and images[0].problem is None:
        images = [Inside(problem=f"unreadable: {whole_member(member)}")]
    return [replace(image, selector=f"{member}#{image.selector}" if image.selector else member) for image in images]


def whole_member(member: str) -> str:
    """Return the sentence that refuses a member whose values are in another member."""
    return (
        f"{member} keeps its values in a second file, which is not read inside a tar or zip; unpack it before the run"
    )


def _list_zip(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> Listed:
    """Return the images in a zip, by the names of its members, and no problem."""
    members: Members = {}

    def look_into(info: zipfile.ZipInfo) -> list[Inside]:
        check_zip_member(f"{name}#{info.filename}", info)
        open_member: Any = functools.partial(archive.open, info)
        return list_frames(open_member, info.filename, info.file_size, look, skipped)

    try:
        with open_zip(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    images = _list_member(functools.partial(look_into, info), info.filename, skipped)
                    _add(members, info.filename, images, skipped)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise ImageError("corrupt", f"{name} cannot be read as a zip: {error}") from error
    return members, []


def _add(members: Members, name: str, images: list[Inside], skipped: Counter[str]) -> None:
    """Add a member's images. If two members share a path, the last one is used, as unpacking would do."""
    path = _unpacked_path(name)
    if members.pop(path, None):
        skipped["member replaced by a later one with the same name"] += 1
    members[path] = images


def _unpacked_path(name: str) -> str:
    """Return the path to which a member is unpacked: a/b.png for ./a/b.png and /a/b.png."""
    return posixpath.normpath(name).lstrip("/")


def _list_tar(file: BinaryIO, name: str, look: Look, skipped: Counter[str]) -> Listed:
    """Return the images in a tar, by the paths of its members. A damaged tar also gives one item with a problem."""
    members: Members = {}
    walk = _Walk(gzip.GzipFile(fileobj=file) if is_compressed_tar(name) else file)
    try:
        # ignore_zeros: continue after damage, and after the end of a tar to which another tar was appended
        with tarfile.TarFile(fileobj=walk, ignore_zeros=True) as archive:  # type: ignore[arg-type]
            _walk_tar(archive, walk, look, members, skipped)
    except Exception as error:  # damage of any kind; the file object records the errors of its store
        # Bytes after the end of a complete tar are not damage.
        if not (isinstance(error, gzip.BadGzipFile) and walk.num_zeros):
            walk.problem = f"it breaks off: {error or type(error).__name__}"
    return members, [Inside(problem=f"corrupt: {name}: {walk.problem}")] if walk.problem else []


def _walk_tar(archive: tarfile.TarFile, walk: "_Walk", look: Look, members: Members, skipped: Counter[str]) -> None:
    """Add the images of every member of a tar to `members`."""
    spans: dict[str, tuple[int, int]] = {}  # the path of a member to offset and length of its bytes
    end = 0
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # tarfile would keep all headers in memory
        walk.check_gap(end, member.offset)
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name!r} has a negative size; it must be 0 bytes or more")
        end = walk.marked_offset = archive.offset
        if member.islnk() and (target := _unpacked_path(member.linkname)) in spans:  # a hard link to an earlier member
            member.type, (member.offset_data, member.size) = tarfile.REGTYPE, spans[target]
        if member.isreg():
            spans[_unpacked_path(member.name)] = span = member.offset_data, member.size
            images = _list_member(
                functools.partial(_look_into_tar, archive, member, look, skipped), member.name, skipped
            )
            _add(members, member.name, [replace(image, offset=span[0], length=span[1]) for image in images], skipped)
        elif not member.isdir():
            skipped["link or device"] += 1
    walk.check_gap(end, None)


def _look_into_tar(
    archive: tarfile.TarFile, member: tarfile.TarInfo, look: Look, skipped: Counter[str]
) -> list[Inside]:
    if member.issparse():
        raise ImageError("unreadable", f"{member.name} is a sparse member; only plain members are read")
    open_member: Any = functools.partial(archive.extractfile, member)
    return list_frames(open_member, member.name, member.size, look, skipped)


class _Walk:
    """A file object that tarfile reads from header to header. It refuses huge reads, which damaged headers cause.

    Attributes:
        marked_offset: offset at which the next member should begin. The block read there is kept.
        num_zeros: length in bytes of the run of zeros that was read last.
        problem: description of the first damage, or None.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._marked: bytes = b""
        self.marked_offset, self.num_zeros = 0, 0
        self.problem: str | None = None

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ValueError(f"a header asks for {size:,} bytes; {_LARGEST_READ:,} are the most")
        is_marked = self._file.tell() == self.marked_offset
        data = bytes(self._file.read(size))
        if is_marked:
            self._marked = data
        self.num_zeros = 0 if not data or data.strip(b"\0") else self.num_zeros + len(data)
        if self.num_zeros > _MOST_ZEROS:
            raise ValueError(f"more than {_MOST_ZEROS:,} zero bytes in a row")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def seekable(self) -> bool:
        return True

    def check_gap(self, end: int, begin: int | None) -> None:
        """Note the problem if the next member does not begin at `end`, unless the tar has its end mark there."""
        if begin == end or self.problem:
            return
        block = self._marked[: tarfile.BLOCKSIZE]
        if not block:
            self.problem = "it breaks off between two members"
        elif block.strip(b"\0") and not _is_header(block):
            self.problem = f"the member at byte {end:,} cannot be read"


def _is_header(block: bytes) -> bool:
    """Return whether a block is a valid header, also of a kind that tarfile skips, such as git's global header."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
