"""How images look, as vectors of length 1: embeddings that the run has kept, or else perceptual hashes."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlsm.datasets.inspection import perceptual_hash
from vlsm.errors import ImageError, ResultError
from vlsm.images.reader import Reader
from vlsm.runs.tables import Tables
from vlsm.select.candidates import Place
from vlsm.words import count

logger = logging.getLogger("vlsm")

Vector = npt.NDArray[np.float16]
_THREADS = 4
_HASH_BITS = 64


def rows_at(
    tables: Tables, places: Collection[Place], columns: Sequence[str]
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the rows at some places of a run, in the order of the run. Only their part files are read."""
    by_part: dict[int, set[int]] = defaultdict(set)
    for part, row in places:
        by_part[part].add(row)
    numbers = {tables.uris[part]: part for part in sorted(by_part)}
    before = "", 0  # file, and the number of its rows so far
    for uri, piece in Tables(list(numbers), tables.schema).pieces(columns):
        start = before[1] if before[0] == uri else 0
        before = uri, start + len(piece)
        wanted = sorted(row for row in by_part[numbers[uri]] if start <= row < before[1])
        chosen = piece.take(pa.array([row - start for row in wanted], pa.int64()))
        for row, values in zip(wanted, chosen.to_pylist(), strict=True):
            yield (numbers[uri], row), values


class Looks:
    """Returns the vectors of images, and remembers them: 2 bytes x D per image that was asked for.

    Args:
        tables: part files of the run.
        has_embeddings: whether the run kept embeddings. If not, images are read again.
        open_reader: returns a reader of the run's images.
    """

    def __init__(self, tables: Tables, has_embeddings: bool, open_reader: Callable[[], Reader]) -> None:
        self._tables, self._has_embeddings, self._open_reader = tables, has_embeddings, open_reader
        self._known: dict[Place, Vector | None] = {}
        self._first_problem = ""

    @property
    def num_missing(self) -> int:
        """Number of images without a vector."""
        return sum(vector is None for vector in self._known.values())

    def read(self, places: Sequence[Place]) -> list[Vector | None]:
        """Return the vector of each image, (D,) float16 of length 1, or None if it has none or cannot be read.

        Args:
            places: where the rows of each image begin.

        Raises:
            ResultError: the embeddings have different widths.
        """
        if missing := [place for place in dict.fromkeys(places) if place not in self._known]:
            self._known |= self._embeddings(missing) if self._has_embeddings else self._hashes(missing)
        widths = {len(vector) for vector in self._known.values() if vector is not None}
        if len(widths) > 1:
            raise ResultError(f"the embeddings of OUTPUT have different widths: {', '.join(map(str, sorted(widths)))}")
        return [self._known[place] for place in places]

    def report(self) -> None:
        """Log how many images have no vector."""
        if self.num_missing:
            why = f"; the first: {self._first_problem}" if self._first_problem else ""
            what = "have no embedding" if self._has_embeddings else "cannot be read any more"
            logger.warning("%s %s and are not chosen%s", count(self.num_missing, "image"), what, why)

    def _embeddings(self, places: Sequence[Place]) -> dict[Place, Vector | None]:
        found: dict[Place, Vector | None] = dict.fromkeys(places)
        for place, row in rows_at(self._tables, places, ["embedding"]):
            vector = np.asarray(row["embedding"] or (), np.float32)
            length = float(np.linalg.norm(vector))
            if np.isfinite(length) and length > 0:
                found[place] = (vector / length).astype(np.float16)
        return found

    def _hashes(self, places: Sequence[Place]) -> dict[Place, Vector | None]:
        if not self._known:
            logger.info(
                "OUTPUT has no embeddings: %s are read again, and compared by perceptual hashes; a run with "
                "embedding=true keeps embeddings",
                count(len(places), "image"),
            )
        reader = self._open_reader()

        def look(row: dict[str, Any]) -> Vector | None:
            try:
                content, frame = reader.open(row)
                return _as_vector(perceptual_hash(content.decode(frame).pixels))
            except ImageError as error:
                self._first_problem = self._first_problem or str(error)
                return None

        rows = dict(rows_at(self._tables, places, ["image_uri", "selector"]))
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(rows, pool.map(look, rows.values()), strict=True))


def _as_vector(bits: int) -> Vector:
    """Return a hash as 64 values of +1/8 and -1/8: the distance of two such vectors is that of their bits."""
    signs = np.unpackbits(np.frombuffer(bits.to_bytes(_HASH_BITS // 8, "big"), np.uint8))
    return ((signs.astype(np.float16) * 2 - 1) / 8).astype(np.float16)
