"""The report of a segment run, finished or not."""

from typing import Any

import pyarrow.compute as pc

from vlsm.checkpoints import Calibration
from vlsm.config import SegmentSettings
from vlsm.errors import ResultError
from vlsm.report import parts
from vlsm.report.page import Page, Section, Stat, as_table, provenance
from vlsm.report.pictures import Painter, read_rle_masks
from vlsm.report.prompts import draw_prompts
from vlsm.report.reviews import Gallery, review_id
from vlsm.report.survey import Extremes, Survey, scan
from vlsm.runs.extremes import EMPTY, MASKS, WHOLE, WHOLE_IMAGE, describe_extremes, find_empty, find_whole
from vlsm.runs.facts import recorded_calibrations
from vlsm.runs.reading import open_reader
from vlsm.runs.record import read_segment_summary, settings_of
from vlsm.runs.results import open_results
from vlsm.words import count


def segmentation_page(output: str, title: str, allow: tuple[str, ...] = (), gallery: Gallery | None = None) -> Page:
    """Return the report page of a segment run. Its gallery is for a review, if the record of the run has its id.

    Raises:
        ConfigError: there is no run at OUTPUT, or the run has no masks yet.
    """
    record = parts.read_config(output)
    results, config = open_results(output), record["config"]
    members = settings_of({"input": "", "output": "", "members": config.get("members")}, SegmentSettings).members
    summary = read_segment_summary(output, *_plan_size(record))
    uris = [member.checkpoint for member in members]
    checkpoints = parts.name_checkpoints(uris, 1)
    known = parts.read_calibrations(checkpoints, output, allow, recorded_calibrations(uris, record.get("checkpoints")))
    gallery, run_id = gallery or Gallery(), review_id(record)
    survey = Survey(metric="confidence", group="prompt", counts_images=True, most_rows=gallery.cards)
    ends = [
        ("Least confident", "lowest mean probability inside the mask", Extremes("confidence")),
        ("Least agreement", "between the ensemble's members", Extremes("agreement")),
        ("Largest areas", "as a share of the image", Extremes("area_fraction", is_highest=True)),
        ("At random", "a random sample of all masks", Extremes("priority")),
    ]
    empty, whole = Extremes("priority"), Extremes("priority")
    for table in scan(results, pc.field("kind") == "mask"):
        survey.add(table)
        for *_, extremes in ends:
            extremes.add(table)
        empty.add(table.filter(find_empty(table)))
        whole.add(table.filter(find_whole(table)))
    ends.append(("Empty masks", "a random sample of the masks without foreground", empty))
    if survey.num_whole:
        ends.append(("Masks of the whole image", "a random sample of the masks that cover it", whole))

    painter = Painter(open_reader(config, output, allow), read_rle_masks, gallery.card_size(bool(run_id)))
    columns = ["mask_rle", "height", "width"]
    groups, cards = parts.show(ends, survey.sample, painter, columns, results, gallery.cards)
    return Page(
        kind="Segment run",
        title=title,
        banner=_banner(record, summary, survey),
        stats=_stats(record, summary, survey, len(checkpoints), known),
        sections=[
            *_prompts(survey),
            *parts.distributions(survey, "masks"),
            *parts.reviews(survey, _rules(config)),
            *parts.calibrations(known),
            *([Section("look", "Look at these first", groups=groups, outlines=["prediction"])] if groups else []),
            *draw_prompts(results, survey, painter),
            *parts.failures(survey, "images"),
        ],
        cards=cards,
        gallery_note=parts.gallery_note(
            len(cards), survey.num_rows, "prompts, statuses, reasons for a review and ranges of confidence"
        ),
        outlines=["prediction"],
        record=record,
        facts=[*provenance(record), ("Model", ", ".join(survey.values["model"]))],
        about=_about(record, survey, len(checkpoints), known),
        run_id=run_id if any(card.row for card in cards) else "",
    )


def _about(
    record: dict[str, Any], survey: Survey, num_checkpoints: int, known: dict[str, Calibration | None]
) -> list[tuple[str, str, str]]:
    """Return model, prompts, date and calibration of the run."""
    words, is_calibrated = parts.describe_calibrations(num_checkpoints, known)
    prompts = [prompt for prompt, _ in survey.values["prompt"].most_common()]
    return [
        ("Model", parts.name_some(survey.values["model"]), ""),
        ("Prompt" if len(prompts) == 1 else f"{len(prompts):,} prompts", parts.name_some(prompts), ""),
        ("Date", parts.format_date(record), ""),
        ("Calibration", words, "" if is_calibrated else "warn"),
    ]


def _rules(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that mark masks for review. A damaged record may have something else there."""
    rules = config.get("review")
    return rules if isinstance(rules, dict) else {}


def _plan_size(record: dict[str, Any]) -> tuple[int, int]:
    """Return the planned images and rows of a run; very many if its record does not say."""
    size = [record["plan"].get(key, 1 << 53) for key in ("num_images", "num_rows")]
    if not all(type(number) is int and number >= 0 for number in size):
        raise ResultError(f"config.yaml is damaged: its plan has {size[0]!r} images and {size[1]!r} rows")
    return size[0], size[1]


def _banner(record: dict[str, Any], summary: dict[str, Any] | None, survey: Survey) -> str:
    masks = survey.values["status"]["ok"]
    warning = describe_extremes({MASKS: masks, EMPTY: survey.num_empty, WHOLE_IMAGE: survey.num_whole})
    sentences = [
        *([] if summary else [_progress(record, survey)]),
        *([f"{warning[:1].upper()}{warning[1:]}."] if warning else []),
    ]
    return " ".join(sentences)


def _progress(record: dict[str, Any], survey: Survey) -> str:
    plan = record["plan"]
    is_counted = plan.get("is_complete", True) and "num_images" in plan
    total = f" of {count(plan['num_images'], 'planned image')}" if is_counted else ""
    done = f"{survey.images.total():,}{total}" if total else count(survey.images.total(), "image")
    return f"This run is not complete: {done} done so far."


def _stats(
    record: dict[str, Any],
    summary: dict[str, Any] | None,
    survey: Survey,
    num_checkpoints: int,
    known: dict[str, Calibration | None],
) -> list[Stat]:
    images = survey.images
    stats = [
        Stat("Images", f"{images.total():,}", f"{count(survey.num_rows, 'mask')}, one per prompt"),
        Stat("Ok", f"{images['ok']:,}"),
        Stat(
            "Failed",
            f"{images['failed']:,}",
            "images that could not be read" if images["failed"] else "",
            tone="warn" if images["failed"] else "",
        ),
    ]
    if images["vanished"]:
        stats.append(Stat("Vanished", f"{images['vanished']:,}", "no longer in the archive"))
    if summary and summary.get("images_per_s"):
        stats.append(Stat("Images per second", f"{summary['images_per_s']:,}", f"{summary['seconds']:,} s in total"))
    if survey.num_marked:
        stats.append(Stat("Marked for review", f"{survey.num_marked:,}", "masks"))
    if survey.values["status"]["ok"]:
        stats.append(Stat("Empty masks", f"{survey.num_empty:,}", "nothing found in the image"))
    if survey.num_whole:
        stats.append(Stat("Masks of the whole image", f"{survey.num_whole:,}", f"{100 * WHOLE:.0f} % or more", "warn"))
    words, is_calibrated = parts.describe_calibrations(num_checkpoints, known)
    doubt = {} if is_calibrated else {"confidence": f"{words}: it does not tell how good the masks are"}
    return [*stats, *parts.metric_stats(survey, ("confidence", "agreement", "area_fraction"), doubt)]


def _prompts(survey: Survey) -> list[Section]:
    """Return a section with a table of the prompts, or no section if there is only one prompt."""
    rows = []
    for prompt, number in survey.values["prompt"].most_common(50):
        by_metric = {
            name: survey.distributions.get((name, prompt)) for name in ("confidence", "agreement", "area_fraction")
        }
        medians = {
            f"median {name}": distribution.median if distribution else None for name, distribution in by_metric.items()
        }
        rows.append({"prompt": prompt, "masks": number} | medians)
    return [Section("prompts", "Prompts", tables=[as_table(rows)])] if len(rows) > 1 else []
