"""The images of a shard as they pass through the stages of a segment run: read, predict, write.

The stages of the job pass on a `ShardBatch`. The forecast uses it too. Processes exchange it as an Arrow table of one
row (`SHARD_SCHEMA`). `pack` and `unpack` share the memory of the arrays.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from vlsm.config import SegmentSettings
from vlsm.errors import ImageError
from vlsm.images.gpu_jpegs import Encoded, Jpeg, place_jpegs
from vlsm.images.grey_levels import STORED
from vlsm.images.preprocess import Square
from vlsm.images.reader import Content, Opening, open_images
from vlsm.images.windows import Window, check_windows, plan_windows
from vlsm.segmentation.finished import MASK_TYPE, FinishedMask, pack_mask, unpack_mask

_ENTRY = pa.struct(
    [
        pa.field("position", pa.int32(), nullable=False),
        pa.field("num_texts", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("first_window", pa.int32(), nullable=False),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("first_logit", pa.int32(), nullable=False),
        pa.field("first_mask", pa.int32(), nullable=False),
        pa.field("num_masks", pa.int32(), nullable=False),
        pa.field("content_sha256", pa.string()),
        pa.field("grey_rule", pa.string()),
        pa.field("error", pa.string()),
        pa.field("embedding", pa.binary()),
    ]
)
_SQUARE = pa.struct([pa.field("size", pa.int32(), nullable=False), pa.field("resize", pa.string(), nullable=False)])
_MEMBER = pa.struct(
    [
        pa.field("number", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("size", pa.int32(), nullable=False),
    ]
)
_ENCODED = pa.struct(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("orientation", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("exists", pa.bool_(), nullable=False),
        pa.field("entries", pa.list_(_ENTRY), nullable=False),
        pa.field("squares", pa.list_(_SQUARE), nullable=False),
        pa.field("pixels", pa.large_binary(), nullable=False),  # the arrays of the squares, joined
        pa.field("encoded", pa.list_(_ENCODED), nullable=False),
        pa.field("members", pa.list_(_MEMBER), nullable=False),
        pa.field("logits", pa.large_binary(), nullable=False),  # the arrays of the members, joined
        pa.field("masks", pa.list_(MASK_TYPE), nullable=False),
        pa.field("embedding_width", pa.int32(), nullable=False),
    ]
)


@dataclass
class Entry:
    """One image to segment in a shard.

    Attributes:
        position: its row in the shard's plan, from 0.
        num_texts: number of texts for each model, over all prompts of the image.
        height, width: of the original in pixels; 0 if the image cannot be read.
        first_window, num_windows: its rows in `pixels`. Images of equal bytes have the same rows; 0 windows if the
            image cannot be segmented.
        first_logit: its first row in `logits`. It has num_texts x num_windows rows: all windows of the first text, then
            all windows of the second text, and so on. An image whose masks the models' device makes has no logits.
        first_mask, num_masks: its items in `masks`, one per output row; 0 masks if the writing task makes them.
        content_sha256: `Content.digest` of the image, if its file could be read.
        grey_rule: the rule that gave its 8-bit levels, as in `vlsm.images.grey_levels`; None if it cannot be read.
        error: why the image cannot be segmented: "REASON: message".
        embedding: float16 values of its embedding, if the run keeps them and a model has seen the image.
    """

    position: int
    num_texts: int
    height: int = 0
    width: int = 0
    first_window: int = 0
    num_windows: int = 0
    first_logit: int = 0
    first_mask: int = 0
    num_masks: int = 0
    content_sha256: str | None = None
    grey_rule: str | None = None
    error: str | None = None
    embedding: bytes | None = None

    @property
    def num_logits(self) -> int:
        """Number of its rows in `logits`."""
        return 0 if self.num_masks else self.num_texts * self.num_windows


@dataclass
class Logits:
    """What one member of the ensemble predicts for a shard.

    Attributes:
        name: the name of the member's model in output rows.
        values: (L, S, S) float16; `Entry.first_logit` numbers the L rows. Half precision halves the bytes to move. Near
            a threshold its error is at most 0.001.
    """

    name: str
    values: np.ndarray


@dataclass
class ShardBatch:
    """The images to segment in a shard, with the results of the stages so far.

    Attributes:
        shard: its number in the plan.
        exists: whether the shard has a part file already, which may lack rows.
        entries: one per image to segment, in any order of positions.
        pixels: the resized windows of all images, (W, S, S, 3) uint8, by square. Members with equal squares share them.
            They lack the rows of encoded images.
        encoded: the images that are not decoded yet.
        embedding_width: number of values in an embedding; 0 before a member has made them, or if none has to.
        logits: by the member's number in the run.
        masks: masks that the models' device has made.
    """

    shard: int
    exists: bool
    entries: list[Entry]
    pixels: dict[Square, np.ndarray] = field(default_factory=dict)
    logits: dict[int, Logits] = field(default_factory=dict)
    masks: list[FinishedMask] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)
    embedding_width: int = 0

    @property
    def num_logits(self) -> int:
        """L, the number of rows in the logits of each member."""
        return sum(entry.num_logits for entry in self.entries)

    def logits_of(self, entry: Entry, texts: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """Return the logits of one image: for each prompt one array (K, T, S, S) per member.

        Args:
            entry: the image.
            texts: for each of its prompts the K texts for the models.
        """
        prompts, start = [], entry.first_logit
        for prompt_texts in texts:
            stop = start + len(prompt_texts) * entry.num_windows
            members = [self.logits[number].values[start:stop] for number in sorted(self.logits)]
            shape = len(prompt_texts), entry.num_windows
            prompts.append([values.reshape(*shape, *values.shape[1:]) for values in members])
            start = stop
        return prompts

    def pack(self) -> pa.Table:
        """Return the batch as a table of one row with SHARD_SCHEMA. Arrays are copied only to join several."""
        squares = sorted(self.pixels)
        members = [
            {"number": number, "name": logits.name, "size": logits.values.shape[-1]}
            for number, logits in sorted(self.logits.items())
        ]
        columns = {
            "shard": [self.shard],
            "exists": [self.exists],
            "entries": [[vars(entry) for entry in self.entries]],
            "squares": [[square._asdict() for square in squares]],
            "pixels": _as_binary([self.pixels[square] for square in squares]),
            "encoded": [[vars(image) for image in self.encoded]],
            "members": [members],
            "logits": _as_binary([self.logits[member["number"]].values for member in members]),
            "masks": [[pack_mask(mask) for mask in self.masks]],
            "embedding_width": [self.embedding_width],
        }
        return pa.table(columns, schema=SHARD_SCHEMA)

    @classmethod
    def unpack(cls, table: pa.Table) -> Self:
        """Return the batch of a table from `pack`. Its arrays are read-only views of the table."""
        names = ["shard", "exists", "entries", "squares", "encoded", "members", "masks", "embedding_width"]
        row = table.select(names).to_pylist()[0]
        entries = [Entry(**entry) for entry in row["entries"]]
        encoded = [Encoded(**image) for image in row["encoded"]]
        squares = [Square(**square) for square in row["squares"]]
        num_windows = max((entry.first_window + entry.num_windows for entry in entries), default=0)
        num_windows -= sum(image.num_windows for image in encoded)
        num_logits = sum(entry.num_logits for entry in entries)
        pixels = _split(table["pixels"], [(num_windows, square.size, square.size, 3) for square in squares], np.uint8)
        shapes = [(num_logits, member["size"], member["size"]) for member in row["members"]]
        logits = {
            member["number"]: Logits(member["name"], values)
            for member, values in zip(row["members"], _split(table["logits"], shapes, np.float16), strict=True)
        }
        masks, pixels_of = [unpack_mask(**mask) for mask in row["masks"]], dict(zip(squares, pixels, strict=True))
        width = row["embedding_width"]
        return cls(row["shard"], row["exists"], entries, pixels_of, logits, masks, encoded, width)


def _as_binary(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Return a large_binary array with one value: the joined arrays. A single array is not copied."""
    joined = arrays[0] if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)])
    data = pa.py_buffer(np.ascontiguousarray(joined).reshape(-1).view(np.uint8))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _split(column: pa.ChunkedArray, shapes: Iterable[tuple[int, ...]], dtype: type) -> list[np.ndarray]:
    """Return views of the arrays in a column from `_as_binary`. `column[0]` would copy them."""
    array = column.chunk(0)
    _, offsets, data = array.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2]
    values: np.ndarray = np.frombuffer(data, np.uint8)[begin:end].view(dtype)
    arrays, start = [], 0
    for shape in shapes:
        stop = start + int(np.prod(shape))
        arrays.append(values[start:stop].reshape(shape))
        start = stop
    return arrays


class Guard(Protocol):
    """Watches the work on each image, because a broken file or a model may kill the process or hang.

    Attributes:
        is_careful: whether to process one image at a time.
        blamed: positions of the images to skip.
    """

    is_careful: bool
    blamed: frozenset[int]

    def image(self, position: int) -> contextlib.AbstractContextManager[None]:
        """Return a context for the work on one image."""

    def time_limit(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for the decoding of one image."""


class Unguarded:
    """A guard that watches nothing, for work that may fail as a whole, such as a forecast."""

    is_careful = False
    blamed: frozenset[int] = frozenset()

    def image(self, position: int) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def time_limit(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()


def read_shard_images(
    batch: ShardBatch,
    rows: Sequence[Mapping[str, Any]],
    squares: Iterable[Square],
    settings: SegmentSettings,
    guard: Guard,
) -> ShardBatch:
    """Return the batch with its images read, decoded, cut into windows and resized.

    With the setting `decode: gpu`, the JPEGs that a GPU can decode stay as they are.

    An image that fails gets an error and no windows. Images with equal bytes are decoded once.

    Args:
        batch: its entries have a position and a number of texts.
        rows: rows of the plan, one for each entry.
        squares: the input squares of the members.
        settings: of the run.
        guard: watches the work on each image.

    Raises:
        StorageError: a store was unavailable for longer than `run.outage_patience_s`.
    """
    distinct_squares = sorted(set(squares))
    windows: list[dict[Square, np.ndarray] | Jpeg] = []  # one item for each distinct image
    counts: list[int] = []  # of the windows of each
    numbers: dict[int, int] = {}  # index of an entry: index of its image in `windows`
    firsts: dict[tuple[str, str | None], int] = {}  # digest and kind of an image: index of its first entry

    def read(index: int, opening: Opening) -> None:
        entry = batch.entries[index]
        try:
            if entry.position in guard.blamed:
                uri = rows[index]["image_uri"]
                raise ImageError("crashed", f"{uri}: the process that read and decoded it died or hung each time")
            with guard.image(entry.position):
                decode(index, entry, *opening())
        except ImageError as error:
            entry.error = str(error)

    def decode(index: int, entry: Entry, content: Content, frame: str | None) -> None:
        entry.content_sha256 = content.digest(frame)
        key = entry.content_sha256, content.kind  # whether equal bytes are an image can depend on the file name
        if (first := firsts.get(key)) is not None:
            twin = batch.entries[first]
            entry.height, entry.width, entry.grey_rule = twin.height, twin.width, twin.grey_rule
            numbers[index] = numbers[first]
            return
        with guard.time_limit():
            image, size, rule = _decode(content, frame, settings)
            check_windows(size, settings.tile, content.name)
            planned = plan_windows(size, settings.tile)
            resized = _resize(image, planned, distinct_squares)
        (entry.height, entry.width), entry.grey_rule = size, rule
        firsts[key], numbers[index] = index, len(windows)
        windows.append(resized)
        counts.append(len(planned))

    for index, opening in open_images(rows, settings, one_by_one=guard.is_careful):
        read(index, opening)
    starts = np.cumsum([0, *counts]).tolist()
    for index, number in numbers.items():
        batch.entries[index].first_window, batch.entries[index].num_windows = starts[number], counts[number]
    count_logits(batch.entries)
    encoded = place_jpegs(windows, starts)
    decoded = [image for image in windows if isinstance(image, dict)]
    num_decoded = starts[-1] - sum(image.num_windows for image in encoded)
    return replace(batch, pixels=_join(decoded, distinct_squares, num_decoded), encoded=encoded)


def _decode(
    content: Content, frame: str | None, settings: SegmentSettings
) -> tuple[np.ndarray | Jpeg, tuple[int, int], str]:
    """Return an image, or the file that the model actor decodes, with its (height, width) and its grey rule."""
    jpeg = content.jpeg(frame) if settings.decode == "gpu" else None
    if jpeg is not None:
        return jpeg, jpeg.size, STORED
    image, rule = content.decode(frame)
    return image, (image.shape[0], image.shape[1]), rule


def _resize(
    image: np.ndarray | Jpeg, windows: Sequence[Window], squares: Iterable[Square]
) -> dict[Square, np.ndarray] | Jpeg:
    """Return the windows of an image in each square; a file stays as it is."""
    if isinstance(image, Jpeg):
        return image
    cuts = [window.cut(image) for window in windows]
    return {square: np.stack([square.resize_image(cut) for cut in cuts]) for square in squares}


def count_logits(entries: Sequence[Entry]) -> None:
    """Set `first_logit` of each entry."""
    start = 0
    for entry in entries:
        entry.first_logit = start
        start += entry.num_logits


def _join(
    windows: list[dict[Square, np.ndarray]], squares: Sequence[Square], num_windows: int
) -> dict[Square, np.ndarray]:
    """Return one array for each square. The windows of an image are freed as soon as they are copied."""
    joined = {square: np.empty((num_windows, square.size, square.size, 3), np.uint8) for square in squares}
    for square, pixels in joined.items():
        first = 0
        for resized in windows:
            image_pixels = resized.pop(square)
            pixels[first : first + len(image_pixels)] = image_pixels
            first += len(image_pixels)
    return joined
