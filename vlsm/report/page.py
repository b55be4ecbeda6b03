"""A report as one HTML file without network requests: the parts of the page, and the rendering with page.html."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from vlsm.report.charts import LineChart, Ridge
from vlsm.report.glossary import OF_LIST, explain, explain_all, label, name_value, title
from vlsm.report.pictures import Key, Layer, Picture, shorten
from vlsm.report.survey import METRICS, carried_values, review_reasons, row_key
from vlsm.runs.extremes import WHOLE
from vlsm.shown import hide_secrets_in, public_uri, show, show_lines
from vlsm.version import __version__

PART = "part of the image"  # of a mask that is neither empty nor whole; not worth a line
_CARD_WORDS = ("dataset", "split", "system", "prompt_name", "prompt", "status", "review", "mask")
_FILES = {"css": ("page",), "js": ("page",)}
_MAX_CONFIG = 100_000  # characters; the page stays small also if the run has many settings
_MAX_TABLE_ROWS = 300


@dataclass(frozen=True)
class Stat:
    """A headline figure."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and for a mean its interval (low, mean, high) in percent of the width."""

    text: str
    is_number: bool = False
    interval: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A table: names of the columns, which the page shows as `glossary.label`, rows of cells, and a note below them."""

    head: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """An output row with its picture, large in a section or small in the gallery.

    Attributes:
        title: the image_id.
        uris: data URIs of its pictures.
        problem: why there is no picture, or None.
        facts: label and text of each metric.
        words: texts of the row, for display and for the gallery's filters; several of one kind as a tuple.
        numbers: metrics of the row, for the gallery's ranges.
        keys: colours (#rrggbb) and names of what is drawn in the picture.
        layer: the outline on the picture of the gallery, which a reviewer can hide; or None.
        row: image_id, prompt and digest of the mask, by which a reviewer's mark names the mask; empty: no mask.
    """

    title: str
    uris: Sequence[str]
    problem: str | None
    facts: list[tuple[str, str]]
    words: dict[str, str | tuple[str, ...]]
    numbers: dict[str, float]
    keys: Sequence[tuple[str, str]] = ()
    layer: Layer | None = None
    row: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page. Parts that are empty are not shown. `outlines` are as in `Page`."""

    anchor: str
    title: str
    intro: str = ""
    tables: Sequence[Table] = ()
    ridges: Sequence[Ridge] = ()
    lines: Sequence[LineChart] = ()
    groups: Sequence[tuple[str, str, list[Case]]] = ()
    outlines: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        kind: kind of the run, such as "Training run".
        title: title of the page.
        banner: a warning above all else, such as "This run is not complete."; empty for none.
        stats: headline figures.
        sections: sections in the order of the page.
        cards: cases of the gallery.
        gallery_note: how the cards were chosen.
        outlines: the outlines in the pictures of the gallery: "prediction", "target".
        record: content of config.yaml.
        facts: label and text of each fact about the origin of the results.
        about: label, text and tone ("warn" or "") of what the results are of, on the first screen.
        run_id: the segment run whose masks a reviewer marks in the gallery; empty: none.
    """

    kind: str
    title: str
    banner: str
    stats: Sequence[Stat]
    sections: Sequence[Section]
    cards: Sequence[Case] = ()
    gallery_note: str = ""
    outlines: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    about: Sequence[tuple[str, str, str]] = ()
    run_id: str = ""


def as_case(row: dict[str, Any], pictures: dict[Key, Picture], is_large: bool = False) -> Case:
    """Return a row with its picture as a card of the gallery, or as a large case."""
    words: dict[str, str | tuple[str, ...]] = {
        name: shorten(str(name_value(name, row[name]))) for name in _CARD_WORDS if row.get(name) is not None
    }
    if reasons := review_reasons(row.get("review")):
        words["review"] = reasons
    if row["status"] == "ok" and row.get("area_fraction") is not None:
        is_whole = row["area_fraction"] >= WHOLE
        words["mask"] = "whole image" if is_whole else PART if row["area_fraction"] else "empty"
    of_list = carried_values(row).items()
    words |= {f"{OF_LIST}{name}": shorten(show(hide_places(value))) for name, value in of_list}
    numbers = {name: float(row[name]) for name in METRICS if row.get(name) is not None}
    facts = [(METRICS[name], format_number(value)) for name, value in numbers.items()]
    picture = pictures.get(row_key(row)) or Picture(problem="its mask is no longer in the run")
    uris = picture.case if is_large else (picture.card,) if picture.card else ()
    key = (public_uri(str(row["image_id"])), str(row.get("prompt") or ""), picture.mask_digest)
    return Case(
        title=shorten(str(row["image_id"]), 200),
        uris=uris,
        problem=picture.problem,
        facts=facts,
        words=words,
        numbers=numbers,
        layer=None if is_large else picture.layer,
        row=key if picture.mask_digest else (),
    )


def as_table(rows: Iterable[dict[str, Any]], note: str = "") -> Table:
    """Return rows as a table. Its columns are the keys of the first row. `dice_mean` gets a drawing of its interval."""
    rows = list(rows)
    head = list(rows[0]) if rows else []
    if len(rows) > _MAX_TABLE_ROWS:
        note = f"The first {_MAX_TABLE_ROWS} of {len(rows):,} rows. {note}"
    cells = [[_as_cell(name, row) for name in head] for row in rows[:_MAX_TABLE_ROWS]]
    return Table(head, cells, note)


def _as_cell(name: str, row: dict[str, Any]) -> Cell:
    value = row[name]
    if value is None or value != value:
        return Cell("–", True)
    if not isinstance(value, float):
        return Cell(f"{value:,}" if isinstance(value, int) else shorten(str(value)), isinstance(value, int))
    text = format_number(value)
    bounds = [row.get(key) for key in ("dice_low", "dice_mean", "dice_high")]
    if name != "dice_mean" or not all(isinstance(bound, float) and 0 <= bound <= 1 for bound in bounds):
        return Cell(text, True)
    low, mean, high = (round(100 * float(bound or 0), 1) for bound in bounds)
    return Cell(text, True, (low, mean, high))


def format_number(value: float) -> str:
    """Return a number with three decimals, or with two significant digits if it is below 0.01."""
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def hide_places(tree: Any) -> Any:
    """Return settings with the folders removed from all paths, since a report must not reveal storage locations."""
    if isinstance(tree, dict):
        return {key: hide_places(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hide_places(value) for value in tree]
    if isinstance(tree, str) and ("://" in tree or tree.startswith(("/", "~")) or tree[1:3] in (":\\", ":/")):
        return "…/" + tree.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return tree


def provenance(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return label and text of the facts in config.yaml about the origin of the results."""
    facts = [("Planned at", record.get("planned_at")), ("Git revision", record.get("git_revision"))]
    for name, value in record.items():
        if "digest" in name:
            texts = value if isinstance(value, list) else [value]
            facts += [(name.replace("_", " ").capitalize().removesuffix("s"), text) for text in texts[:20]]
    versions = record.get("versions") or {}
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(label, shorten(str(text), 400)) for label, text in facts if text]


def render(page: Page) -> str:
    """Return the page as HTML. All data are escaped; a security policy forbids scripts and sources from outside."""
    files = {"css": ("page", "review"), "js": ("page", "mark_files", "review")} if page.run_id else _FILES
    parts = {kind: "\n".join(_read(f"{name}.{kind}") for name in names) for kind, names in files.items()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_show
    )
    record = yaml.safe_dump(hide_places(hide_secrets_in(page.record)), sort_keys=False, allow_unicode=True)
    if len(record) > _MAX_CONFIG:
        record = record[:_MAX_CONFIG] + "\n… the rest is in the run's config.yaml"
    metrics = {name: label for name, label in METRICS.items() if any(name in card.numbers for card in page.cards)}
    of_list = dict.fromkeys(name for card in page.cards for name in card.words if name.startswith(OF_LIST))
    filters = [name for name in (*_CARD_WORDS, *of_list) if len({card.words.get(name) for card in page.cards}) > 1]
    heads = [name for section in page.sections for table in section.tables for name in table.head]
    outlines = [*page.outlines, *(name for section in page.sections for name in section.outlines)]
    return environment.from_string(_read("page.html")).render(
        part=PART,
        page=page,
        record=record,
        metrics=metrics,
        filters=filters,
        terms=explain_all([*metrics, *filters, *heads]),
        legends=list(dict.fromkeys(outlines)),
        label=label,
        title=title,
        explain=explain,
        version=__version__,
        **{name: Markup(text) for name, text in parts.items()},
        **{f"{name}_hash": _digest(text) for name, text in parts.items()},
    )


def _show(value: Any) -> Any:
    """Return what a place of the page shows: texts without secrets and control characters, before they are escaped."""
    return show_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _read(name: str) -> str:
    return resources.files("vlsm.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
