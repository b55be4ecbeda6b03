"""Images that are labelled already, as lists and folders name them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.archive.tables import ending_of
from vlsm.images.parquet import PARQUET_ERRORS
from vlsm.runs.tables import open_table
from vlsm.shown import public_uri

# what examples.parquet of a training says of its images
_EXAMPLES = pa.schema([pa.field(name, pa.string()) for name in ("image_uri", "image_selector", "image_sha256")])


class Labelled:
    """The images of some lists or folders. An image of a run is one of them by its location or by its content.

    Args:
        uris: lists with `image_uri` (.parquet, .csv, .tsv, .jsonl; examples.parquet of a training is one), folders,
            globs or images. The content is compared where a list states it, as examples.parquet does.

    Raises:
        ConfigError: there is nothing at a location.
        ManifestError: a list cannot be read.
    """

    def __init__(self, uris: Sequence[str]) -> None:
        self._images: set[tuple[str, str]] = set()  # location or SHA-256 of the content, and the selector
        for uri in map(storage.absolute, uris):
            self._images |= _read_examples(uri) or _read_list(uri)
        names = pa.array(sorted({name for name, _ in self._images}), pa.string())
        self._names = names

    def __len__(self) -> int:
        return len(self._images)

    def find(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows have an image that is labelled already, (rows,) bool.

        Args:
            table: rows of a run with `image_uri`, `selector` and `content_sha256`.
        """
        found = np.zeros(len(table), bool)
        for name in ("image_uri", "content_sha256"):
            is_named = pc.is_in(table[name], value_set=self._names).to_numpy()
            for row in np.flatnonzero(is_named):
                key = table[name][int(row)].as_py(), table["selector"][int(row)].as_py() or ""
                found[row] |= key in self._images
        return found


def _read_list(uri: str) -> set[tuple[str, str]]:
    rows = open_archive(uri, ("",), allow=()).rows
    return {(public_uri(row["image_uri"]), row["selector"] or "") for row in rows}


def _read_examples(uri: str) -> set[tuple[str, str]] | None:
    """Return the images of examples.parquet of a training, or None for another list."""
    if ending_of(uri) != ".parquet":
        return None
    fs, path = storage.open_uri(uri)
    try:
        with fs.open(path, "rb") as file:
            names = set(pq.read_schema(file).names)
    except (OSError, *PARQUET_ERRORS):  # also a folder of this name
        return None  # whoever reads it as a list says why that fails
    if not {"image_uri", "image_sha256"} <= names:
        return None
    images: set[tuple[str, str]] = set()
    for piece in open_table(uri, _EXAMPLES).pieces():
        for row in piece.to_pylist():
            named = [name for name in (row["image_uri"] and public_uri(row["image_uri"]), row["image_sha256"]) if name]
            images |= {(name, row["image_selector"] or "") for name in named}
    return images
