"""Locations as text: their parts, and whether one lies in another.

A location is a local path or a URI that fsspec knows (`s3://bucket/key`). Names are literal: brackets, percent signs
and `::` have no special meaning, except in the URLs of HTTP.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from urllib.parse import unquote

LOCAL = ("file", "local")
HTTP = ("http", "https")
_ALIASES = {"local": "file", "s3a": "s3", "gcs": "gs", "abfs": "az"}  # two names of one store
_BUCKETS = ("s3", "gs", "az", *HTTP)  # stores whose URIs begin with a bucket, a container or a host
_URL = re.compile(
    r"(?:[^/?#\\\s@]*@)?([^/?#\\\s@]*)((?:[/?#].*)?)", re.DOTALL
)  # host and path; user names do not count


def split_scheme(uri: str) -> tuple[str, str]:
    """Return the scheme of a location ("file" for a local path) and the rest of the location."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def absolute(uri: str) -> str:
    """Return the location in the form that every process on this machine understands.

    Local paths become absolute. A trailing slash is removed.
    """
    scheme, rest = split_scheme(uri)
    if scheme in LOCAL:
        return os.path.abspath(os.path.expanduser(rest))
    return uri.rstrip("/")


def without_query(uri: str) -> str:
    """Return a location without the query of an HTTP URL, which may have slashes and is no part of a name."""
    return re.split("[?#]", uri, maxsplit=1)[0] if split_scheme(uri)[0] in HTTP else uri


def parent(uri: str) -> str:
    """Return the folder of a file."""
    uri = without_query(uri)
    return uri.rsplit("/", 1)[0] if "/" in uri else "."


def join(uri: str, *names: str) -> str:
    """Return the location of a file or folder below a folder or prefix."""
    return "/".join([uri.rstrip("/"), *names])


def spell_out(path: str) -> str:
    """Return the path if it is valid UTF-8, else a readable and unique UTF-8 text for it.

    Tables cannot hold paths that are not UTF-8. Reading a file by such a text fails with the reason "missing".
    """
    readable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if readable == path:
        return path
    return f"{readable}~{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def own_place(uri: str) -> str:
    """Return the place of a location in a store: its bucket, container or HTTP host; elsewhere, the folder that has it.

    An access point of S3 (`arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME`) is a bucket.
    """
    scheme, rest = split_scheme(uri)
    if scheme in HTTP:
        return f"{scheme}://{re.split(r'[/?#]', rest, maxsplit=1)[0].rpartition('@')[2]}"  # a user may have a password
    parts = rest.split("/")
    num_parts = len(parts) - 1
    if _ALIASES.get(scheme, scheme) in _BUCKETS:
        num_parts = 2 if rest.startswith("arn:") else 1
    return f"{scheme}://{'/'.join(parts[:num_parts])}"


def leads_upwards(location: str) -> bool:
    """Return whether a part of a location is `..`. In a URL of HTTP, percent-encoded characters count as decoded."""
    scheme, rest = split_scheme(location)
    if scheme not in HTTP:
        return ".." in rest.split("/")
    path = re.split("[?#]", rest, maxsplit=1)[0]
    for _ in range(3):  # servers behind each other may decode one after the other
        path = unquote(path)
    return ".." in re.split(r"[/\\]", path)


def lies_in(location: str, place: str) -> bool:
    """Return whether a location is a place, or lies in it.

    Names are compared: what a link on a local disk points to does not matter. `s3` and `s3a`, and the other names that
    a store has, are equal. A place of `http` holds its files by `https` too.

    Args:
        location: the location.
        place: a folder, a prefix or a file. `s3://data` does not hold `s3://data-2/x`; `s3://` holds all buckets.
    """
    if split_scheme(location)[0] not in LOCAL and leads_upwards(location):
        return False
    name, prefix = _comparable(location), _comparable(place).rstrip("/")
    names = (name, _without_tls(name))
    return any(one == prefix or one.startswith(prefix + "/") for one in names)


def may_redirect(uri: str, target: str, allow: Sequence[str]) -> bool:
    """Return whether a redirect of HTTP from a location to another one may be followed.

    Both must lie in allowed places. A location that no allowed place holds may lead to its own host.
    """
    if split_scheme(target)[0] not in HTTP:
        return False
    is_allowed = any(lies_in(uri, place) for place in allow)
    return any(lies_in(target, place) for place in (allow if is_allowed else (*allow, own_place(uri))))


def _comparable(location: str) -> str:
    """Return a text that is equal for equal locations."""
    scheme, rest = split_scheme(location)
    scheme = _ALIASES.get(scheme, scheme)
    if scheme == "file":
        return absolute(location)
    if scheme not in HTTP or not (match := _URL.fullmatch(rest)):
        return f"{scheme}://{rest}"
    host, path = match[1].lower().removesuffix(":443" if scheme == "https" else ":80"), unquote(match[2])
    return f"{scheme}://{host}{path if path.startswith('/') or not path else f'/{path}'}"


def _without_tls(name: str) -> str:
    host = name.removeprefix("https://").partition("/")[0]
    return name.replace("https", "http", 1) if name.startswith("https://") and ":" not in host else name
