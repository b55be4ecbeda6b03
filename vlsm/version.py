"""The version of this package, and the version of the files that it writes.

Readers follow three rules, so that what was written stays readable. An absent column is null, and an absent setting has
its default. A file without a format version has version 0. A file of a newer format is refused.

A change that an older reader would misunderstand raises FORMAT; a new nullable column or a setting with a default does
not.
"""

__version__ = "0.1.0"

FORMAT = 1  # of OUTPUT's records and parts, of checkpoints and training states; 0: they did not state it


def newer_format(written: object, what: str) -> str | None:
    """Return a message if a file states a newer format than this version knows.

    Args:
        written: the stated format; None if the file states none.
        what: the name of the file.
    """
    if isinstance(written, int) and written <= FORMAT or written is None:
        return None
    return f"{what} has the format {written!r}; this version of vlsm reads formats up to {FORMAT}: install a newer vlsm"
