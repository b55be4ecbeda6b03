"""The borders of an OUTPUT: a job writes nowhere else, whatever links lie in it, and only jobs write there."""

import os

from vlsm import storage
from vlsm.errors import ConfigError

_FLAT = {"masks", "manifest"}  # folders of many files, without folders


def check_links(output: str) -> None:
    """Do nothing if no folder below OUTPUT is a link that leads out of it. OUTPUT itself may be a link.

    A link in the place of a file needs no check: a file is written beside it and then renamed, which replaces the link.

    Raises:
        ConfigError: there is such a link.
    """
    fs, root = storage.open_uri(output)
    if not storage.is_local(fs):
        return
    real_root = os.path.realpath(root)
    for folder, names, _ in os.walk(root):
        for path in (os.path.join(folder, name) for name in names):
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath([target, real_root]) != real_root:
                raise ConfigError(
                    f"{path!r} is a link to {target!r}, outside of OUTPUT: the job would write there; replace it by a "
                    "folder, or choose another OUTPUT"
                )
        names[:] = [name for name in names if name not in _FLAT]


def refuse_inside(name: str, place: str, output: str) -> None:
    """Do nothing if a place to write to lies outside of OUTPUT: a file there would replace or double a part of the run.

    Args:
        name: of the argument, for the message.
        place: the file or folder to write.
        output: OUTPUT of a run.

    Raises:
        ConfigError: it lies in OUTPUT.
    """
    inner, outer = (
        uri if "://" in uri else os.path.realpath(uri) for uri in (storage.absolute(place), storage.absolute(output))
    )
    if f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/"):
        raise ConfigError(f"{name} {place!r} lies in OUTPUT, which belongs to its run; choose a place outside of it")
