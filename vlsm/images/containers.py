"""Lists the images in tar and zip archives from their headers. `vlsm.images.formats` lists those in other files."""

import contextlib
import functools
import gzip
import io
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, cast

from vlsm.errors import BeyondLimitError, ImageError
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
from vlsm.images.gunzip import Budget, open_gzip, open_member
from vlsm.images.samples import Members, choose_fields
from vlsm.images.spans import Spans
from vlsm.images.tar_walk import Walk
from vlsm.limits import MAX_MEMBERS, MAX_NAME_BYTES, MAX_ZIP_TABLE_BYTES

_UTF8_FLAG = 0x800  # of a zip member's name
_LOCAL_BYTES = 30  # of the header before a member
_ENTRY = b"PK\1\2"  # the start of a member in the table of a zip

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
            budget = Budget(file.seek(0, io.SEEK_END) if size_bytes is None else size_bytes)
            file.seek(0)
            list_members = _list_tar if kind_of(name) == "tar" else _list_zip
            members, problems = list_members(file, name, look, skipped, budget)
        members = choose_fields(members, look.fields, kind_of(name) == "tar", skipped)
        images = [image for found in members.values() for image in found] + problems
        if not images:
            skipped[f"{describe_other(name)} without images"] += 1
        return images
    return list_frames(open_file, name, size_bytes, look, skipped)


def is_compressed_tar(name: str) -> bool:
    """Return whether a tar of this name is compressed, so that it can only be read from its beginning."""
    return file_name(name).endswith(("gz", ".tgz"))


def check_zip_member(name: str, info: zipfile.ZipInfo, archive: zipfile.ZipFile) -> None:
    """Raise an ImageError if a zip member is encrypted, uses another compression than deflate, or lies outside the zip.

    Only stored and deflated members can be unpacked in bounded memory. A file refuses a place outside of it with the
    error of a store that is away, so such a place is found here.
    """
    if not 0 <= info.header_offset < archive.start_dir:  # where the table begins
        raise ImageError("corrupt", f"{name} begins at byte {info.header_offset:,}, which is outside of the zip")
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
    archive = zipfile.ZipFile(cast(BinaryIO, _Table(file)))
    if sum(info.compress_size for info in archive.infolist()) > file.seek(0, io.SEEK_END):
        raise zipfile.BadZipFile("its members overlap")
    for info in archive.infolist():
        if not (info.flag_bits & _UTF8_FLAG or info.filename.isascii()):
            raw = info.filename.encode("cp437")
            with contextlib.suppress(UnicodeDecodeError):
                info.filename = (_unicode_path(info.extra, raw) or raw).decode("utf-8")
    archive.NameToInfo |= {info.filename: info for info in archive.infolist()}
    return archive


class _Table:
    """The file of a zip. zipfile reads the table of all members at once, and would keep any number of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > MAX_ZIP_TABLE_BYTES:
            raise BeyondLimitError(f"its table has {size:,} bytes; {MAX_ZIP_TABLE_BYTES:,} are the most")
        data = self._file.read(size)
        if data.startswith(_ENTRY) and data.count(_ENTRY) > MAX_MEMBERS:
            raise BeyondLimitError(f"it has more than {MAX_MEMBERS:,} members, which are the most")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
    if is_long_name(member):
        skipped["name that is too long"] += 1
        return []
    try:
        images = look_into()
    except BeyondLimitError:
        raise  # a limit of the archive
    except ImageError as error:
        images = [Inside(problem=str(error))]
    except Exception as error:  # damage of any kind; the file object records the errors of its store
        images = [Inside(problem=str(ImageError("corrupt", f"{member}: {error or type(error).__name__}")))]
    if images and is_header(member) and images[0].problem is None:
        images = [Inside(problem=f"unreadable: {whole_member(member)}")]
    return [replace(image, selector=f"{member}#{image.selector}" if image.selector else member) for image in images]


def is_long_name(member: str) -> bool:
    """Return whether a name is longer than an image_id may be. tarfile and zipfile accept any name."""
    return len(member.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES


def whole_member(member: str) -> str:
    """Return the sentence that refuses a member whose values are in another member."""
    return (
        f"{member} keeps its values in a second file, which is not read inside a tar or zip; unpack it before the run"
    )


def _list_zip(file: BinaryIO, name: str, look: Look, skipped: Counter[str], budget: Budget) -> Listed:
    """Return the images in a zip, by the names of its members, and a problem if it is beyond a limit."""
    members: Members = {}

    def look_into(info: zipfile.ZipInfo) -> list[Inside]:
        check_zip_member(f"{name}#{info.filename}", info, archive)

        def opening() -> BinaryIO:
            member = archive.open(info)
            if info.compress_type == zipfile.ZIP_STORED:  # zipfile would read it again for every step backwards
                return _open_stored(file, info)
            return open_member(member, info.filename, budget.note)

        return list_frames(opening, info.filename, info.file_size, look, skipped)

    try:
        with open_zip(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    images = _list_member(functools.partial(look_into, info), info.filename, skipped)
                    _add(members, info.filename, images, skipped)
    except BeyondLimitError as error:
        return members, [Inside(problem=error.of(name))]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise ImageError("corrupt", f"{name} cannot be read as a zip: {error}") from error
    return members, []


def _open_stored(file: BinaryIO, info: zipfile.ZipInfo) -> BinaryIO:
    """Return a stored member of a zip as a file."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_BYTES)
    start = (
        info.header_offset + _LOCAL_BYTES + sum(struct.unpack_from("<HH", header, 26))
    )  # of its name and extra field
    return cast(BinaryIO, io.BufferedReader(Spans(file, [(start, info.file_size)]), 1 << 16))


def _add(members: Members, name: str, images: list[Inside], skipped: Counter[str]) -> None:
    """Add a member's images. If two members share a path, the last one is used, as unpacking would do."""
    path = _unpacked_path(name)
    if members.pop(path, None):
        skipped["member replaced by a later one with the same name"] += 1
    members[path] = images


def _unpacked_path(name: str) -> str:
    """Return the path to which a member is unpacked: a/b.png for ./a/b.png and /a/b.png."""
    return posixpath.normpath(name).lstrip("/")


def _list_tar(file: BinaryIO, name: str, look: Look, skipped: Counter[str], budget: Budget) -> Listed:
    """Return the images in a tar, by the paths of its members. A damaged tar also gives one item with a problem."""
    members: Members = {}
    is_packed = is_compressed_tar(name)
    walk = Walk(open_gzip(file, budget.note) if is_packed else file)
    look_into = functools.partial(_look_into_tar, look=look, skipped=skipped, is_packed=is_packed)
    try:
        # ignore_zeros: continue after damage, and after the end of a tar to which another tar was appended
        with tarfile.TarFile(fileobj=walk, ignore_zeros=True) as archive:  # type: ignore[arg-type]
            _walk_tar(archive, walk, look_into, members, skipped)
    except BeyondLimitError as error:
        return members, [Inside(problem=error.of(name))]
    except Exception as error:  # damage of any kind; the file object records the errors of its store
        # Bytes after the end of a complete tar are not damage.
        if not (isinstance(error, gzip.BadGzipFile) and walk.num_zeros):
            walk.problem = f"it breaks off: {error or type(error).__name__}"
    return members, [Inside(problem=f"corrupt: {name}: {walk.problem}")] if walk.problem else []


def _walk_tar(
    archive: tarfile.TarFile,
    walk: Walk,
    look_into: Callable[..., list[Inside]],
    members: Members,
    skipped: Counter[str],
) -> None:
    """Add the images of every member of a tar to `members`."""
    spans: dict[str, tuple[int, int]] = {}  # the path of a member to offset and length of its bytes
    end = 0
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # tarfile would keep all headers in memory
        walk.count(archive, member)
        walk.check_gap(end, member.offset)
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name!r} has a negative size; it must be 0 bytes or more")
        end = walk.marked_offset = archive.offset
        if member.islnk() and (target := _unpacked_path(member.linkname)) in spans:  # a hard link to an earlier member
            member.type, (member.offset_data, member.size) = tarfile.REGTYPE, spans[target]
        if is_long_name(member.name):
            skipped["name that is too long"] += 1
        elif member.isreg():
            spans[_unpacked_path(member.name)] = span = member.offset_data, member.size
            with walk.inside():
                images = _list_member(functools.partial(look_into, archive, member), member.name, skipped)
            _add(members, member.name, [replace(image, offset=span[0], length=span[1]) for image in images], skipped)
        elif not member.isdir():
            skipped["link or device"] += 1
    walk.check_gap(end, None)


def _look_into_tar(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    look: Look,
    skipped: Counter[str],
    is_packed: bool,
) -> list[Inside]:
    """Return the images in a member. In a packed tar, seeking backwards would unpack all again."""
    if member.issparse():
        raise ImageError("unreadable", f"{member.name} is a sparse member; only plain members are read")

    def opening() -> Any:
        file = archive.extractfile(member)
        return open_member(file, member.name) if is_packed else file

    return list_frames(opening, member.name, member.size, look, skipped)
