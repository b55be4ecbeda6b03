"""The file system of a location: the local disk, an object store, or what else fsspec knows."""

import os
import stat
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vlsm.errors import ConfigError
from vlsm.locations import HTTP, LOCAL, absolute, split_scheme
from vlsm.shown import describe_secret

_INSIDE = ("zip", "tar", "libarchive", "generic")  # fsspec takes no location as the current folder, or as any
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Disk(LocalFileSystem):  # type: ignore[misc] # fsspec has no types
    """The local disk. Only files can be read: opening a pipe can block for ever, and a device has no end."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if "r" in mode:
            check_file(path)
        return super()._open(path, mode, block_size, **options)


def check_file(path: str) -> None:
    """Raise an OSError if a local path exists and is no file: a folder, a pipe, a socket or a device."""
    if kind := _special_kind(path):
        error = OSError(f"{path} is {kind}, not a file")
        error.strerror = f"it is {kind}, not a file"  # for messages that name the path themselves
        raise error


def check_input(what: str, uri: str) -> None:
    """Raise a ConfigError that names the argument (`what`) if a location on this disk is neither file nor folder."""
    kind = _special_kind(absolute(uri)) if split_scheme(uri)[0] in LOCAL else None
    if kind not in (None, _KINDS[stat.S_IFDIR]):
        raise ConfigError(f"{what} {uri!r} is {kind}; it must be a file or a folder")


def _special_kind(path: str) -> str | None:
    """Return what a local path is that exists and is no file: "a folder", "a pipe", ...; None for others."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "of an unknown type")


def open_uri(uri: str, allow: tuple[str, ...] = ()) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a location and the path within it.

    Args:
        uri: the location.
        allow: places that redirects of HTTP may lead to, beside the own host of the location.

    Raises:
        ConfigError: fsspec knows no file system for the scheme, its package is not installed, or it needs more than a
            URI. Some file systems connect to a host at once, and that fails.
    """
    if split_scheme(uri)[0] in LOCAL:
        return Disk(), absolute(uri)
    if problem := describe_secret(uri):
        raise ConfigError(f"cannot open {uri!r}: {problem}")
    try:
        fs = _build(uri, allow)
        return fs, fs._strip_protocol(uri)
    except Exception as error:  # each package raises its own
        raise ConfigError(f"cannot open {uri!r}: {_reason(error)}; use a local path or s3://bucket/prefix") from error


def _build(uri: str, allow: tuple[str, ...]) -> fsspec.AbstractFileSystem:
    scheme, _ = split_scheme(uri)
    if not scheme:
        raise ValueError("it has no scheme before '://'")
    if scheme in HTTP:
        from vlsm.redirects import HttpFiles  # needs aiohttp

        return HttpFiles(allow=allow)
    if scheme in ("s3", "s3a"):
        from vlsm.s3_files import S3Files  # needs s3fs

        return S3Files(**_s3_options())
    if scheme in _INSIDE:
        raise ValueError("the location of the file itself, such as s3://bucket/a.zip, is needed")
    store = fsspec.get_filesystem_class(scheme)
    return store(**store._get_kwargs_from_urls(uri))  # such as the host of ftp://host/path


def _s3_options() -> dict[str, Any]:
    """Return the options of s3fs. One process reads many small objects: fresh listings, many connections, timeouts.

    They are new objects: botocore changes them, and fsspec keeps one instance for equal options.
    """
    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "max_pool_connections": 64,
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "max_attempts": 1},  # s3fs and with_retries already retry
        },
    }


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):  # arguments are missing
        return "this file system needs more than a location"
    return " ".join(str(error).split()) or type(error).__name__


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether the file system is this machine's disk."""
    return bool(fs.protocol == "file" or "file" in fs.protocol)
