"""The report of a segment run, finished or not."""

from typing import Any

import pyarrow.compute as pc

from vlsm.config import SegmentSettings
from vlsm.errors import ResultError
from vlsm.report import parts
from vlsm.report.page import Page, Section, Stat, as_table, provenance
from vlsm.report.pictures import Painter, read_rle_masks
from vlsm.report.survey import Extremes, Survey, scan
from vlsm.runs.record import read_segment_summary, settings_of
from vlsm.runs.results import open_results
from vlsm.shown import public_uri


def segmentation_page(output: str, title: str, allow: tuple[str, ...] = ()) -> Page:
    """Return the report page of a segment run.

    Raises:
        ConfigError: there is no run at OUTPUT, or the run has no masks yet.
    """
    record = parts.read_config(output)
    results, config = open_results(output), record["config"]
    members = settings_of({"input": "", "output": "", "members": config.get("members")}, SegmentSettings).members
    summary = read_segment_summary(output, *_plan_size(record))
    survey = Survey(metric="confidence", group="prompt")
    ends = [
        ("Least confident", "lowest mean probability inside the mask", Extremes("confidence")),
        ("Least agreement", "between the ensemble's members", Extremes("agreement")),
        ("Largest areas", "as a share of the image", Extremes("area_fraction", is_highest=True)),
        ("At random", "a random sample of all masks", Extremes("priority")),
    ]
    for table in scan(results, pc.field("kind") == "mask"):
        survey.add(table)
        for *_, extremes in ends:
            extremes.add(table)

    painter = Painter(parts.open_reader(config, output, allow), read_rle_masks)
    columns = ["mask_rle", "height", "width"]
    groups, cards = parts.show(ends, survey.sample, painter, columns, results)
    return Page(
        kind="Segment run",
        title=title,
        banner="" if summary else _banner(record, survey),
        stats=_stats(record, summary, survey),
        sections=[
            *_prompts(survey),
            *parts.distributions(survey, "masks"),
            *parts.calibrations(
                {
                    public_uri(uri).rstrip("/").rsplit("/", 1)[-1]: uri
                    for uri in (member.checkpoint for member in members)
                },
                output,
                allow,
            ),
            Section("look", "Look at these first", groups=groups, has_legend=True),
            *parts.failures(survey),
        ],
        cards=cards,
        gallery_note=parts.gallery_note(len(cards), survey.num_rows, "prompts, statuses and ranges of confidence"),
        outlines=["prediction"],
        record=record,
        facts=[*provenance(record), ("Model", ", ".join(survey.values["model"]))],
    )


def _plan_size(record: dict[str, Any]) -> tuple[int, int]:
    """Return the planned images and rows of a run; very many if its record does not say."""
    size = [record["plan"].get(key, 1 << 53) for key in ("num_images", "num_rows")]
    if not all(type(number) is int and number >= 0 for number in size):
        raise ResultError(f"config.yaml is damaged: its plan has {size[0]!r} images and {size[1]!r} rows")
    return size[0], size[1]


def _banner(record: dict[str, Any], survey: Survey) -> str:
    plan = record["plan"]
    is_counted = plan.get("is_complete", True) and "num_images" in plan
    total = f" of {plan['num_images']:,} planned" if is_counted else ""
    return f"This run is not complete: {survey.images.total():,}{total} images are done so far."


def _stats(record: dict[str, Any], summary: dict[str, Any] | None, survey: Survey) -> list[Stat]:
    images = survey.images
    stats = [
        Stat("Images", f"{images.total():,}", f"{survey.num_rows:,} rows, one per prompt"),
        Stat("Ok", f"{images['ok']:,}"),
        Stat("Failed", f"{images['failed']:,}", tone="warn" if images["failed"] else ""),
    ]
    if images["vanished"]:
        stats.append(Stat("Vanished", f"{images['vanished']:,}", "no longer in the archive"))
    if summary and summary.get("images_per_s"):
        stats.append(Stat("Images per second", f"{summary['images_per_s']:,}", f"{summary['seconds']:,} s in total"))
    return [*stats, *parts.metric_stats(survey, ("confidence", "agreement", "area_fraction"))]


def _prompts(survey: Survey) -> list[Section]:
    """Return a section with a table of the prompts, or no section if there is only one prompt."""
    rows = []
    for prompt, count in survey.values["prompt"].most_common(50):
        by_metric = {
            name: survey.distributions.get((name, prompt)) for name in ("confidence", "agreement", "area_fraction")
        }
        medians = {
            f"median {name}": distribution.median if distribution else None for name, distribution in by_metric.items()
        }
        rows.append({"prompt": prompt, "rows": count} | medians)
    return [Section("prompts", "Prompts", tables=[as_table(rows)])] if len(rows) > 1 else []
