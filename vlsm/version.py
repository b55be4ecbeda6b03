"""The version of this package, and the format version of the files that it writes.

Readers follow three rules, so that existing files stay readable. An absent column is null, and an absent setting has
its default. A file without a format version has version 0. A file of a newer format is refused.

A change that an older reader would misunderstand raises FORMAT; a new nullable column or a setting with a default does
not.
"""

__version__ = "0.2.0"

FORMAT = 1  # of OUTPUT's records and parts, checkpoints and training states; 0: the file states no format


def newer_format(stated: object, name: str) -> str | None:
    """Return an error message if a file states a newer format than this version can read, else None.

    Args:
        stated: the format that the file states; None if it states none.
        name: the name of the file.
    """
    if isinstance(stated, int) and stated <= FORMAT or stated is None:
        return None
    return f"{name} has the format {stated!r}; this version of vlsm reads formats up to {FORMAT}: install a newer vlsm"
