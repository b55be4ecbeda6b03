"""A digest of the rows of a part file, which its metadata states: rows that were changed afterwards are found."""

import hashlib
from typing import Any

DIGEST_KEY = "vlsm.rows_sha256"


class RowDigest:
    """The SHA-256 of rows in their order. Null columns do not count, so a later version may add columns."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row as pyarrow's `to_pylist` returns it."""
        for name in sorted(row):
            if (value := row[name]) is not None:
                data = value if isinstance(value, bytes) else repr(_plain(value)).encode("utf-8", "surrogatepass")
                self._digest.update(f"{name}\0{len(data)}\0".encode())
                self._digest.update(data)
        self._digest.update(b"\n")

    def hexdigest(self) -> str:
        """Return the digest of the rows so far."""
        return self._digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return a value whose repr does not depend on the versions of pyarrow, numpy and pandas."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | str):
        return value
    return float(value) if hasattr(value, "__float__") and not hasattr(value, "as_tuple") else str(value)
