"""The errors that vlsm raises. Each message says what is wrong, the value found, and what would be right."""


class VlsmError(Exception):
    """What every error of this package is; a job prints it as one sentence and ends."""


class ConfigError(VlsmError):
    """A setting, an argument or a path of a job is wrong."""


class ManifestError(VlsmError):
    """The list of an archive's images cannot be read or contradicts itself."""


class CheckpointError(VlsmError):
    """A checkpoint or pretrained weights cannot be loaded."""


class StorageError(VlsmError):
    """Storage failed in a way that may pass, and went on failing through the retries."""


class ResultError(VlsmError):
    """The rows of an output are not exactly those that were planned."""


class ImageError(VlsmError):
    """One image cannot be read. It becomes a failed row; the run goes on.

    Args:
        reason: one of `REASONS`, for counting.
        message: what a person needs to find and mend the file.
    """

    REASONS = (
        "missing",
        "forbidden",
        "unreadable",  # by the local disk
        "unavailable",  # its store answers, but not for this file
        "timeout",
        "empty",
        "corrupt",
        "too_large",
        "crashed",  # the process that worked on it, each time
    )

    def __init__(self, reason: str, message: str) -> None:
        if reason not in self.REASONS:
            raise ValueError(f"unknown reason {reason!r}; known reasons: {', '.join(self.REASONS)}")
        # names of files come from anywhere: none may write lines of its own into a log
        printable = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in message
        )
        super().__init__(f"{reason}: {printable}")
        self.reason = reason
