"""A picture of some examples of datasets, each with the outline of its mask, to look at before a training."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.overview import Overview, read_all, spread
from vlsm.datasets.records import Record
from vlsm.errors import ImageError
from vlsm.images.overlays import draw_label, draw_sheet, shrink_mask
from vlsm.shown import public_uri

_COLUMNS, _TILE_PX = 6, 240
_MOST_PICTURES = 48
_MOST_OF_A_KIND = 3  # pictures per kind of problem

Picture = tuple[np.ndarray, str]


def draw_contact_sheet(overviews: Sequence[Overview]) -> tuple[np.ndarray, int]:
    """Return a sheet with examples of each dataset and split, then some with problems, and the number of examples.

    The sheet is (H, W, 3) uint8.
    """
    count = max(_COLUMNS, _MOST_PICTURES // len(overviews) // _COLUMNS * _COLUMNS)
    pictures = [picture for overview in overviews for picture in draw_pictures(overview, count)]
    return draw_sheet(pictures, _COLUMNS, _TILE_PX), len(pictures)


def draw_pictures(overview: Overview, count: int) -> list[Picture]:
    """Return about `count` pictures with captions: spread over datasets and splits, those with problems last."""
    notes = _choose_problems(overview)
    good = [record for record, fact in zip(overview.chosen, overview.facts, strict=True) if not fact.error]
    regular = [record for record in good if record.where not in notes]
    chosen = spread(regular, max(1, count - len(notes))) if regular else []
    chosen += [record for record in good if record.where in notes]
    return [picture for picture in read_all(chosen, overview.settings, partial(_draw, notes)) if picture is not None]


def _choose_problems(overview: Overview) -> dict[str, str]:
    """Return the kind of problem of some records, by the position of the record."""
    notes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for finding in overview.findings:
        counts[finding.kind] = counts.get(finding.kind, 0) + 1
        if counts[finding.kind] <= _MOST_OF_A_KIND:
            notes.setdefault(finding.where, finding.kind)
    return notes


def _draw(notes: dict[str, str], record: Record, reader: ExampleReader) -> Picture | None:
    """Return the picture of a record and its caption, or None if its files cannot be read any more."""
    try:
        example = reader.read(record)
    except ImageError:
        return None
    image, mask = example.image, example.target.mask
    height, width = mask.shape
    scale = _TILE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST  # small images keep their pixels
    small = np.asarray(Image.fromarray(image).resize(size, resampling))
    picture = draw_label(small, shrink_mask(mask, size))
    prompt = next((text for texts in record.prompts.values() for text in texts if text), "no prompt")
    name = public_uri(record.image_uri).rpartition("/")[2] + (
        f" {record.image_selector}" if record.image_selector else ""
    )
    area = f"{100 * mask.mean():.2g} %" if mask.mean() < 1 else "100 %"
    note = f"{notes[record.where].upper()}: " if record.where in notes else ""
    lines = f"{note}{name}", f"{record.dataset}, {record.split or 'no split'}: {area} of {width} x {height}", prompt
    return picture, "\n".join(lines)
