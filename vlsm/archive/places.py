"""The rule that says which locations a list may name. It is the same for all lists: manifests and labelled datasets.

- A list on this machine may name every file that its user may read, and files in the stores of SCHEMES.
- A list in a store may name files in its own bucket, container or HTTP host (elsewhere: in the folder that holds it).
  A person who can write there must not read this machine's files, or other buckets, through a job.
- The setting `run.allow` adds places, and their schemes. What a person types on the command line needs no permission.
- A name in a list of a store must not lead upwards (`..`).
- Links on a local disk are followed: whoever makes them has access to the disk.
"""

import functools
import re
from collections.abc import Sequence

import fsspec

from vlsm.archive.columns import shorten
from vlsm.errors import ManifestError
from vlsm.locations import LOCAL, leads_upwards, lies_in, own_place, split_scheme

SCHEMES = (*LOCAL, "s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https")
_SHOWN = "paths and URIs with s3, gs, az, http or https"


def check_place(location: str, source: str, allow: Sequence[str], where: str, column: str = "image_uri") -> None:
    """Raise a ManifestError if a list may not name a location.

    Args:
        location: as the list names it, but not relative.
        source: location of the list, or of its folder.
        allow: the setting `run.allow`.
        where: the row, for the message.
        column: what names the location, for the message.
    """
    what = f"{where}: {column} {shorten(location)}"
    scheme, is_allowed = split_scheme(location)[0], any(lies_in(location, place) for place in allow)
    is_on_disk = split_scheme(source)[0] in LOCAL
    if not is_on_disk and leads_upwards(location):
        raise ManifestError(f"{what} leads upwards; it must not contain '..'")
    if lies_outside(location, source, allow):
        raise ManifestError(f"{what} lies outside of {own_place(source)}/; {_hint(location)} if it may be read")
    if is_on_disk and not is_allowed and scheme not in SCHEMES:
        raise ManifestError(
            f"{what} is no location that is known here; a list may name {_SHOWN}; {_hint(location)} for others"
        )
    if problem := _problem(scheme):
        raise ManifestError(f"{what} cannot be opened here: {problem}")


def lies_outside(location: str, source: str, allow: Sequence[str]) -> bool:
    """Return whether a list in a store names a location outside of its own place and of the allowed places.

    The rows of an OUTPUT are such a list: reports and exports read their images again.
    """
    if split_scheme(source)[0] in LOCAL:
        return False
    return not any(lies_in(location, place) for place in (own_place(source), *allow))


def _hint(location: str) -> str:
    folder = location.rpartition("/")[0] + "/"
    is_plain = re.fullmatch(r"[\w:/.%+=-]{1,200}", folder, re.ASCII)  # else YAML and the shell may mistake it
    return f"--set 'run.allow=[{folder if is_plain else 'FOLDER'}]'"


@functools.cache
def _problem(scheme: str) -> str | None:
    """Return why there are no files of a scheme: nobody knows it, or its package is not installed; else None."""
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        return str(error)
    return None
