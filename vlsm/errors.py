"""The errors that vlsm raises. Each message says what is wrong, the value found, and what would be right."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vlsm.shown import show


class VlsmError(Exception):
    """The base class of all errors of this package. A job prints the message on one line and ends.

    The message may quote names and locations from anywhere: `vlsm.shown` removes their secrets and control characters.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(show(part) if isinstance(part, str) else part for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error as it is: its class may be made from other arguments."""
        return _unpickle, (type(self), self.args, self.__dict__)


def _unpickle(kind: type[VlsmError], parts: tuple[object, ...], attributes: dict[str, Any]) -> VlsmError:
    error = kind.__new__(kind, *parts)
    error.__dict__.update(attributes)
    return error


class ConfigError(VlsmError):
    """A setting, an argument or a path of a job is wrong."""


class ManifestError(VlsmError):
    """A manifest or a dataset's list of records cannot be read or contradicts itself."""


class CheckpointError(VlsmError):
    """A checkpoint or pretrained weights cannot be loaded."""


class ProbeError(VlsmError):
    """A model computes otherwise than on the machine where its checkpoint was written."""


class StorageError(VlsmError):
    """Storage failed in a way that may be temporary, and all retries failed too."""


class RedirectError(PermissionError):
    """A server redirects to a place that is not allowed. It is a failure of one file, as a lack of permission is."""


class LeaseError(VlsmError):
    """Another job holds the lease of OUTPUT, or has taken it over."""


class ResultError(VlsmError):
    """The output of a run is damaged, or its rows differ from the planned rows."""


class DamageError(ResultError):
    """One file of an OUTPUT is no such file as a run writes. Where the run can write it again, it does."""


class ImageError(VlsmError):
    """One image cannot be read. It becomes a failed row; the run continues.

    Args:
        reason: one of `REASONS`, used for counting.
        message: the information that a person needs to find and repair the file.
    """

    REASONS = (
        "missing",
        "forbidden",
        "unreadable",  # the local disk fails, or the format is not supported
        "unavailable",  # the store answers, but not for this file
        "timeout",
        "empty",
        "corrupt",
        "too_large",
        "size",  # of a labelled image: its mask has another one
        "crashed",  # the process died or hung at each try
    )

    def __init__(self, reason: str, message: str) -> None:
        if reason not in self.REASONS:
            raise ValueError(f"unknown reason {reason!r}; known reasons: {', '.join(self.REASONS)}")
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class BeyondLimitError(ImageError):
    """A file is beyond a limit of `vlsm.limits`.

    Args:
        message: names the limit.
    """

    def __init__(self, message: str) -> None:
        super().__init__("too_large", message)

    def of(self, name: str) -> str:
        """Return the text of the error, "REASON: message", with the name of the file."""
        return f"{self.reason}: {name}: {str(self).removeprefix(f'{self.reason}: ')}"


@contextlib.contextmanager
def optional_packages(extra: str) -> Iterator[None]:
    """Enclose imports of packages that only an extra of vlsm installs.

    Args:
        extra: its name in pyproject.toml, such as "train".

    Raises:
        ConfigError: a package is not installed; the message names the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vlsm":  # ours: no extra installs it
            raise
        raise ConfigError(f"the package {error.name} is not installed: uv pip install 'vlsm[{extra}]'") from error
