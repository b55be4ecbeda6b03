"""Charts as numbers in a drawing's own units; page.html draws them, page.css colours them for light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.ticker import MaxNLocator

from vlsm.report.survey import Distribution
from vlsm.training.history import MEAN

WIDTH = 360  # of all charts: what a phone shows without making letters smaller
_LEFT, _RIGHT = 38, 12
_RIDGE_LEFT = 8
_LIMITS = (0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Ridge:
    """Histograms below each other on one axis."""

    title: str
    height: int
    rows: list["RidgeRow"]
    ticks: list[tuple[float, str]]
    bottom: float


@dataclass(frozen=True)
class RidgeRow:
    """The histogram of one group: bars of x, y, width, height and what they count; its median's place."""

    label: str
    facts: str
    text_y: float
    base: float
    bars: list[tuple[float, float, float, float, str]]
    median_x: float
    median_y: float


@dataclass(frozen=True)
class LineChart:
    """Values over epochs, or over what `x_label` says."""

    title: str
    height: int
    lines: list["Curve"]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bottom: float
    best_x: float | None = None
    x_label: str = "epoch"


@dataclass(frozen=True)
class Curve:
    """The `path` of an SVG, with a colour's number and whether it is dashed."""

    name: str
    color: str
    is_dashed: bool
    path: str


def draw_ridge(title: str, groups: Sequence[tuple[str, Distribution]]) -> Ridge:
    """Histograms of groups, each as high as its own highest bar."""
    limit = next(limit for limit in _LIMITS if limit >= min(1.0, max(found.highest for _, found in groups)))
    is_single = len(groups) == 1
    step, room, number = (156, 112, 25) if is_single else (76, 40, 50)
    width = WIDTH - _RIDGE_LEFT - _RIGHT
    rows = []
    for place, (label, found) in enumerate(groups):
        base, counts = place * step + step - 4.0, found.bins(limit, number)
        heights = counts / max(1, counts.max()) * room
        bar_width, edge = width / number, limit / number
        bars = [
            (
                round(_RIDGE_LEFT + slot * bar_width + 0.5, 2),
                round(base - height, 2),
                round(bar_width - 1, 2),
                round(float(height), 2),
                f"{slot * edge:.3g} to {(slot + 1) * edge:.3g}: {int(count):,}",
            )
            for slot, (height, count) in enumerate(
                zip(np.where(counts, np.maximum(heights, 1.5), 0), counts, strict=True)
            )
            if count
        ]
        median = found.median
        facts = f"median {median:.2f} · mean {found.mean:.2f} · n {found.count:,}"
        median_x = round(_RIDGE_LEFT + min(median / limit, 1) * width, 2)
        rows.append(RidgeRow(label, facts, base - step + 20, base, bars, median_x, base - room - 4))
    bottom = len(groups) * step - 4.0
    ticks = [(round(_RIDGE_LEFT + share * width, 2), f"{share * limit:.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return Ridge(title, int(bottom + 24), rows, ticks, bottom)


def draw_lines(metrics: pa.Table, name: str, title: str, best_epoch: int) -> LineChart:
    """A column of metrics.parquet over the epochs, a colour per dataset, dashed in training."""
    rows = [row for row in metrics.to_pylist() if np.isfinite(row[name])]
    datasets = [name for name in dict.fromkeys(row["dataset"] for row in rows) if name != MEAN]
    shown = datasets if len(datasets) == 1 else [*datasets, MEAN]
    epochs = [row["epoch"] for row in rows] or [1]
    first, last = min(epochs), max(max(epochs), min(epochs) + 1)
    highest = 1.0 if name == "dice" else max([row[name] for row in rows] or [1.0])
    y_ticks = [tick for tick in MaxNLocator(5).tick_values(0, highest) if tick >= 0]
    bottom, top = 200.0, 12.0

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = _LEFT + (epoch - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(bottom - value / y_ticks[-1] * (bottom - top), 1)

    lines = []
    for number, dataset in enumerate(shown):
        for split in ("train", "val"):
            own = [place(row["epoch"], row[name]) for row in rows if (row["dataset"], row["split"]) == (dataset, split)]
            if own:
                path = "M" + " L".join(f"{x} {y}" for x, y in own)
                color = "mean" if dataset == MEAN else str(number % 6)
                lines.append(Curve(f"{dataset}, {split}", color, split == "train", path))
    x_ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(first, last) if first <= tick <= last]
    return LineChart(
        title,
        int(bottom) + 36,
        lines,
        [(place(tick, 0)[0], f"{tick:.0f}") for tick in x_ticks],
        [(place(first, tick)[1], f"{tick:.3g}") for tick in y_ticks],
        bottom,
        place(best_epoch, 0)[0] if best_epoch else None,
    )


def draw_reliability(title: str, rows: Sequence[tuple[float, float, float]]) -> LineChart:
    """A reliability diagram: the share of foreground over the probability, beside the line where both are equal.

    Args:
        title: of the chart.
        rows: as `vlsm.calibration.reliability` gives them.
    """
    bottom, top = 200.0, 12.0

    def path(points: Sequence[tuple[float, float]]) -> str:
        places = [(_LEFT + x * (WIDTH - _LEFT - _RIGHT), bottom - y * (bottom - top)) for x, y in points]
        return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)

    lines = [
        Curve("validation pixels", "0", False, path([(mean, share) for mean, share, _ in rows])),
        Curve("as often as it says", "mean", True, path([(0, 0), (1, 1)])),
    ]
    ticks = (0, 0.25, 0.5, 0.75, 1)
    x_ticks = [(_LEFT + tick * (WIDTH - _LEFT - _RIGHT), f"{tick:g}") for tick in ticks]
    y_ticks = [(bottom - tick * (bottom - top), f"{tick:g}") for tick in ticks]
    return LineChart(title, int(bottom) + 36, lines, x_ticks, y_ticks, bottom, x_label="probability of foreground")
