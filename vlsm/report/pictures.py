"""Pictures of chosen rows as data URIs: images with outlines of the masks, small enough for one page."""

import base64
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from vlsm import storage
from vlsm.errors import StorageError, VlsmError
from vlsm.images.overlays import draw_outlines, outline, outline_path, shrink_mask
from vlsm.images.reader import Reader
from vlsm.report.survey import FILE, KEY, row_key
from vlsm.runs.marks import digest_mask
from vlsm.runs.tables import Tables
from vlsm.segmentation import masks
from vlsm.shown import hide_secrets, public_uri

# Okabe and Ito's sky blue and orange differ for every kind of colour vision. The dashes also differ without colours.
PREDICTION, TARGET = (86, 180, 233), (230, 159, 0)
# A page has at most 30 cases with two pictures each, 6 pictures of all prompts, and 240 cards:
# (66 * 45 kB + 240 * 14 kB) * 4 / 3 = 8.4 MB in base64. With cards for a review, 9.8 MB.
MAX_CASES, MAX_CARDS = 30, 240
_CASE_PX, _CASE_BYTES = 600, 45_000
_CARD_PX, _CARD_BYTES = 240, 14_000
_LAYER_LETTERS = 3_000

_FOLDERS = re.compile(r"(?<![\w.])(?:\w+:/)?/(?:[^\s/#]+/)+")

Key = tuple[Any, ...]
Masks = tuple[np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class CardSize:
    """The size of the pictures of cards.

    Attributes:
        side_px: longer side in pixels.
        num_bytes: most bytes of a picture.
        has_layer: the prediction's outline is a layer of its own, which a reviewer can hide.
    """

    side_px: int = _CARD_PX
    num_bytes: int = _CARD_BYTES
    has_layer: bool = False


@dataclass(frozen=True)
class Layer:
    """An outline as the path of an SVG, and the (width, height) of its coordinates."""

    path: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """The pictures of a row.

    Attributes:
        card: data URI of the small image with outlines, or without them if there is a layer.
        case: data URIs of the large image with outlines and without; empty if the row is shown only as a card.
        problem: why there are no pictures, or None.
        layer: the prediction's outline on the card, which the page can hide; or None.
        mask_digest: see `vlsm.runs.marks.digest_mask`.
    """

    card: str = ""
    case: tuple[str, ...] = ()
    problem: str | None = None
    layer: Layer | None = None
    mask_digest: str = ""


class Painter:
    """Draws rows. It reads each image again from its original location.

    Args:
        reader: reader of the images.
        read_masks: returns a row's prediction and target, each (H, W) with values 0 and 1, or None.
        size: size of the cards.
    """

    def __init__(
        self, reader: Reader, read_masks: Callable[[dict[str, Any]], Masks], size: CardSize | None = None
    ) -> None:
        self._reader, self._read_masks, self._size = reader, read_masks, size or CardSize()
        self._away: set[str] = set()
        self._store_errors: tuple[type[Exception], ...] = (StorageError, *storage.store_errors())
        unreadable = (VlsmError, ValueError, TypeError)  # also damaged run lengths
        self._unreadable: tuple[type[Exception], ...] = (*unreadable, *self._store_errors)

    def draw(self, row: dict[str, Any], is_case: bool) -> Picture:
        """Return the pictures of a row, with the large ones for a case; or the reason if its image cannot be read."""
        if row["status"] != "ok":
            return Picture(problem=describe_error(row) or str(row["status"]))
        store = str(row["image_uri"]).partition("://")[0] if "://" in str(row["image_uri"]) else ""
        if store in self._away:
            return Picture(problem="unavailable: its store does not answer")
        try:
            content, frame = self._reader.open(row)
            image = content.decode(frame).pixels
            prediction, target = self._read_masks(row)
        except self._unreadable as error:
            if isinstance(error, self._store_errors):
                self._away.add(store)
            return Picture(problem=describe_error(row | {"error": str(error)}))
        if any(mask is not None and mask.shape != image.shape[:2] for mask in (prediction, target)):
            return Picture(problem="the size of its image has changed since the run")
        picture = draw_outlined(image, (prediction, target), is_case, self._size)
        return replace(picture, mask_digest=digest_mask(row.get("mask_rle")))

    def draw_together(self, row: dict[str, Any], masks: Sequence[np.ndarray]) -> str | None:
        """Return the image of a row with the outlines of several masks, as a data URI; None if it cannot be read."""
        try:
            content, frame = self._reader.open(row)
            image = content.decode(frame).pixels
        except self._unreadable:
            return None
        if any(mask.shape != image.shape[:2] for mask in masks):
            return None
        plain = _resize(image, _CASE_PX)
        picture = draw_outlines(np.array(plain), [shrink_mask(mask, plain.size) for mask in masks], 3)
        return _data_uri(Image.fromarray(picture), _CASE_BYTES)


def paint(
    rows: Iterable[dict[str, Any]],
    cases: set[Key],
    painter: Painter,
    columns: Sequence[str],
    tables: Tables | None,
) -> dict[Key, Picture]:
    """Return the pictures of rows by row key. Only a few masks are in memory at a time.

    Args:
        rows: rows that a survey has chosen.
        cases: keys of the rows that are also shown large.
        painter: draws a row.
        columns: columns that the painter needs and the rows do not have.
        tables: the files of the rows; None if the rows have all columns already.
    """
    chosen = {row_key(row): row for row in rows}
    painted = {key: painter.draw(row, is_case=False) for key, row in chosen.items() if row["status"] != "ok"}
    chosen = {key: row for key, row in chosen.items() if key not in painted}
    for row in _complete(chosen, columns, tables):
        key = row_key(row)
        painted[key] = painter.draw(row, is_case=key in cases)
    return painted


def _complete(
    chosen: dict[Key, dict[str, Any]], columns: Sequence[str], tables: Tables | None
) -> Iterator[dict[str, Any]]:
    """Yield the chosen rows with more columns, in the order of their files."""
    if tables is None:
        yield from sorted(chosen.values(), key=lambda row: (row["image_uri"], row["selector"] or ""))
        return
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in chosen.values():
        by_file.setdefault(row[FILE], []).append(row)
    wanted = [name for name in (*KEY, "kind", *columns) if name in tables.schema.names]
    for uri, rows in sorted(by_file.items()):
        condition = pc.field("image_id").isin([row["image_id"] for row in rows])
        for _, table in replace(tables, uris=[uri]).pieces(wanted):
            for more in table.filter(condition).to_pylist():
                if more.pop("kind", "mask") == "mask" and (chosen_row := chosen.get(row_key(more))):
                    yield chosen_row | more


def describe_error(row: dict[str, Any]) -> str:
    """Return a row's error with the folders removed, since a report must not reveal storage locations."""
    error = hide_secrets(str(row.get("error") or ""))  # rows of earlier versions have all of it
    for name in ("image_uri", "mask_uri"):  # also folders with spaces in their names, which _FOLDERS does not match
        if folder := os.path.dirname(public_uri(str(row.get(name) or "")).partition("#")[0]):
            error = error.replace(f"{folder}/", "")
    return shorten(_FOLDERS.sub("", error), 300)


def shorten(text: str, length: int = 160) -> str:
    """Return a text of at most `length` characters, without secrets. A longer text loses its middle."""
    text = hide_secrets(text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"


def read_rle_masks(row: dict[str, Any]) -> Masks:
    """Return prediction and target of a row that holds them as run lengths."""
    size = (row["height"], row["width"])
    prediction, target = (
        None if row.get(name) is None else masks.decode_mask(row[name], size) for name in ("mask_rle", "target_rle")
    )
    return prediction, target


def draw_outlined(image: np.ndarray, outlines: Masks, is_case: bool, size: CardSize | None = None) -> Picture:
    """Return the pictures of an image (H, W, 3) uint8 with the outlines of its prediction and target."""
    size, layer = size or CardSize(), None
    if size.has_layer:
        card = _resize(image, size.side_px)
        if outlines[0] is not None:
            layer = Layer(*outline_path(outlines[0], 2 * size.side_px, _LAYER_LETTERS))  # fine enough for a zoom
    else:
        card, _ = _fit(image, outlines, size.side_px)
    case = tuple(_data_uri(each, _CASE_BYTES) for each in _fit(image, outlines, _CASE_PX)) if is_case else ()
    return Picture(_data_uri(card, size.num_bytes), case, layer=layer)


def _fit(image: np.ndarray, outlines: Masks, side: int) -> tuple[Image.Image, Image.Image]:
    """Return the image with outlines and without them, with at most `side` pixels on its longer side."""
    plain = _resize(image, side)
    picture = np.array(plain)
    prediction, target = (None if mask is None else shrink_mask(mask, plain.size) for mask in outlines)
    thickness = 3 if side <= _CARD_PX else 4
    # the prediction's line is inside its mask, the target's line is outside: both are visible where the masks agree
    if target is not None:
        around = outline(np.pad(~target, thickness, constant_values=True), thickness)
        _draw_rim(picture, around[thickness:-thickness, thickness:-thickness], TARGET, is_dashed=True)
    if prediction is not None:
        _draw_rim(picture, outline(prediction, thickness), PREDICTION, is_dashed=False)
    return Image.fromarray(picture), plain


def _resize(image: np.ndarray, side: int) -> Image.Image:
    """Return the image with at most `side` pixels on its longer side."""
    scale = side / max(image.shape[:2])
    # small images are enlarged by an integer factor, so that their pixels stay visible
    factor = scale if scale < 1 else int(scale)
    size = tuple(max(1, round(edge * factor)) for edge in image.shape[1::-1])
    resampling = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((size[0], size[1]), resampling, reducing_gap=2.0)


def _draw_rim(picture: np.ndarray, rim: np.ndarray, color: tuple[int, int, int], is_dashed: bool) -> None:
    """Colour the pixels of a rim. A dashed rim leaves gaps at regular angles around its centre."""
    rows, columns = np.nonzero(rim)
    if is_dashed and len(rows):
        turn = np.arctan2(rows - rows.mean(), columns - columns.mean()) / (2 * np.pi)
        num_dashes = max(6, len(rows) // 50)
        is_drawn = turn * num_dashes % 1 < 0.65
        rows, columns = rows[is_drawn], columns[is_drawn]
    picture[rows, columns] = color


def _data_uri(picture: Image.Image, limit: int) -> str:
    """Return the picture as WebP of at most `limit` bytes: reduce the quality first, then the size."""
    while True:
        for quality in (82, 60):
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=quality, method=2)  # half the time of the default, 5 % more bytes
            if (num_bytes := buffer.tell()) <= limit:
                return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        shrink = min(0.9, 0.95 * (limit / num_bytes) ** 0.5)
        picture = picture.resize((max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink))))
