"""All prompts of an image in one picture, each in its own colour."""

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vlsm.errors import VlsmError
from vlsm.images.overlays import PROMPT_COLORS
from vlsm.report.page import Case, Section
from vlsm.report.pictures import Painter, read_rle_masks, shorten
from vlsm.report.survey import FILE, Survey
from vlsm.runs.tables import Tables

_MAX_IMAGES = 6
_COLUMNS = ["image_id", "image_uri", "selector", "prompt", "kind", "status", "mask_rle", "height", "width"]


def draw_prompts(results: Tables, survey: Survey, painter: Painter) -> list[Section]:
    """Return a section with some images and the outlines of all their prompts, or none if no image has several.

    An image with more prompts than colours is drawn with its first ones, and its title says so.

    Args:
        results: the files of a segment run.
        survey: of all its rows; the images come from its sample.
        painter: reads the images.
    """
    if len(survey.values["prompt"]) < 2:
        return []
    chosen: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in survey.sample.rows(40):
        if row["status"] == "ok" and len(chosen) < _MAX_IMAGES:
            chosen.setdefault((row[FILE], row["image_uri"], row["selector"]), [])
    uris = sorted({file for file, *_ in chosen})
    for uri, table in replace(results, uris=uris).pieces(_COLUMNS):
        is_wanted = pc.field("image_uri").isin([image for _, image, _ in chosen])
        for row in table.filter(is_wanted & (pc.field("kind") == "mask") & (pc.field("status") == "ok")).to_pylist():
            if (key := (uri, row["image_uri"], row["selector"])) in chosen:
                chosen[key] = [*chosen[key], row][: len(PROMPT_COLORS) + 1]
    cases = [case for rows in chosen.values() if len(rows) > 1 and (case := _draw(rows, painter))]
    intro = "Each colour is a prompt. Where masks overlap, all outlines are drawn."
    return [Section("prompts-together", "All prompts of an image", intro, groups=[("", "", cases)])] if cases else []


def _draw(rows: list[dict[str, Any]], painter: Painter) -> Case | None:
    """Return the picture of an image with all its masks, or None if the image or a mask cannot be read."""
    shown = rows[: len(PROMPT_COLORS)]
    masks: list[np.ndarray] = []
    with contextlib.suppress(VlsmError, ValueError, TypeError):  # also damaged run lengths
        masks = [mask for row in shown if (mask := read_rle_masks(row)[0]) is not None]
    uri = painter.draw_together(shown[0], masks) if len(masks) == len(shown) else None
    if uri is None:
        return None
    keys = [
        ("#{:02x}{:02x}{:02x}".format(*color), shorten(row["prompt"], 60) + ("" if mask.any() else " (empty)"))
        for color, row, mask in zip(PROMPT_COLORS, shown, masks, strict=False)
    ]
    more = f" (its first {len(shown)} prompts)" if len(rows) > len(shown) else ""
    return Case(shorten(str(shown[0]["image_id"]), 200) + more, (uri,), None, [], {}, {}, keys)
