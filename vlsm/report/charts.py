"""Charts as coordinates in SVG units. page.html draws them; page.css colours them for the light and the dark theme."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vlsm.errors import optional_packages
from vlsm.report.distribution import Distribution
from vlsm.training.history import MEAN

WIDTH = 360  # of every chart; a phone shows this width without shrinking the letters
_LEFT, _RIGHT = 38, 12
_LIMITS = (0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Ridge:
    """A chart of histograms, one below the other, with one common axis."""

    title: str
    height: int
    rows: list["RidgeRow"]
    ticks: list[tuple[float, str]]
    bottom: float


@dataclass(frozen=True)
class RidgeRow:
    """The histogram of one group: bars (x, y, width, height, text with range and count), and the line of its median.

    `counts` are the ticks of its vertical axis: y and the number of rows.
    """

    label: str
    facts: str
    text_y: float
    base: float
    counts: list[tuple[float, str]]
    bars: list[tuple[float, float, float, float, str]]
    median_x: float
    median_y: float


@dataclass(frozen=True)
class LineChart:
    """A chart of curves over epochs, or over the quantity in `x_label`."""

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
    """One curve: its name, the name of its colour in page.css, whether it is dashed, and its path in SVG syntax."""

    name: str
    color: str
    is_dashed: bool
    path: str


def draw_ridge(title: str, groups: Sequence[tuple[str, Distribution]]) -> Ridge:
    """Return the histograms of groups. Each one is scaled to its own highest bar."""
    highest = max(distribution.highest for _, distribution in groups)
    limit = next(limit for limit in _LIMITS if limit >= min(1.0, highest))
    is_single = len(groups) == 1
    step, max_height, num_bins = (156, 112, 25) if is_single else (92, 40, 50)
    width = WIDTH - _LEFT - _RIGHT
    rows = []
    for index, (label, distribution) in enumerate(groups):
        base, counts = index * step + step - 4.0, distribution.bins(limit, num_bins)
        heights = counts / max(1, counts.max()) * max_height
        bar_width, edge = width / num_bins, limit / num_bins
        bars = [
            (
                round(_LEFT + slot * bar_width + 0.5, 2),
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
        most = int(counts.max())
        shown = sorted({0, most // 2, most} if is_single else {0, most})
        count_ticks = [(round(base - count / max(1, most) * max_height, 2), format_count(count)) for count in shown]
        median = distribution.median
        facts = f"median {median:.2f} · mean {distribution.mean:.2f} · n {distribution.count:,}"
        median_x = round(_LEFT + min(median / limit, 1) * width, 2)
        rows.append(
            RidgeRow(
                label,
                facts,
                base - step + (20 if is_single else 34),
                base,
                count_ticks,
                bars,
                median_x,
                base - max_height - 4,
            )
        )
    bottom = len(groups) * step - 4.0
    ticks = [(round(_LEFT + share * width, 2), f"{share * limit:.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return Ridge(title, int(bottom + 24), rows, ticks, bottom)


def format_count(count: int) -> str:
    """Return a count in at most six letters, such as 99,999 or 1.2M."""
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**5, "k")):
        if count >= limit:
            return f"{count / (1000 if letter == 'k' else limit):.3g}{letter}"
    return f"{count:,}"


def draw_lines(metrics: pa.Table, name: str, title: str, best_epoch: int) -> LineChart:
    """Return a chart of one column of metrics.parquet over the epochs: one colour per dataset, train dashed."""
    rows = [row for row in metrics.to_pylist() if np.isfinite(row[name])]
    datasets = [name for name in dict.fromkeys(row["dataset"] for row in rows) if name != MEAN]
    curves = []
    for number, dataset in enumerate(datasets if len(datasets) == 1 else [*datasets, MEAN]):
        for split in ("train", "val"):
            points = [(row["epoch"], row[name]) for row in rows if (row["dataset"], row["split"]) == (dataset, split)]
            color = "mean" if dataset == MEAN else str(number % 6)
            curves.append((f"{dataset}, {split}", color, split == "train", points))
    highest = 1.0 if name == "dice" else max([row[name] for row in rows] or [1.0])
    span = [row["epoch"] for row in rows] or [1]
    return draw_curves(title, curves, (min(span), max(span)), highest, best=best_epoch)


Points = Sequence[tuple[float, float]]


def draw_curves(  # noqa: PLR0913 - what a chart shows
    title: str,
    curves: Sequence[tuple[str, str, bool, Points]],
    span: tuple[int, int],
    highest: float,
    x_label: str = "epoch",
    best: int = 0,
) -> LineChart:
    """Return a chart of curves over whole numbers.

    Args:
        title: title of the chart.
        curves: name, colour (as in `Curve`), whether it is dashed, and points (x, y); one without points is left out.
        span: the lowest and the highest x.
        highest: the vertical axis ends there; it begins at 0.
        x_label: the quantity of the horizontal axis.
        best: x of the best epoch, which gets a line; 0 for none.
    """
    with optional_packages("train"):
        from matplotlib.ticker import MaxNLocator

    first, last = span[0], max(span[1], span[0] + 1)
    y_ticks = [tick for tick in MaxNLocator(5).tick_values(0, highest) if tick >= 0]
    bottom, top = 200.0, 12.0

    def to_point(x: float, value: float) -> tuple[float, float]:
        shown = _LEFT + (x - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
        return round(shown, 1), round(bottom - value / y_ticks[-1] * (bottom - top), 1)

    lines = [
        Curve(name, color, is_dashed, "M" + " L".join("{} {}".format(*to_point(*point)) for point in points))
        for name, color, is_dashed, points in curves
        if points
    ]
    x_ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(first, last) if first <= tick <= last]
    return LineChart(
        title,
        int(bottom) + 36,
        lines,
        [(to_point(tick, 0)[0], f"{tick:.0f}") for tick in x_ticks],
        [(to_point(first, tick)[1], f"{tick:.3g}") for tick in y_ticks],
        bottom,
        to_point(best, 0)[0] if best else None,
        x_label,
    )


def draw_reliability(title: str, rows: Sequence[tuple[float, float, float]]) -> LineChart:
    """Return a reliability diagram: share of foreground over probability, and the diagonal where both are equal.

    Args:
        title: title of the chart.
        rows: rows of `vlsm.calibration.reliability`.
    """
    bottom, top = 200.0, 12.0

    def path(points: Sequence[tuple[float, float]]) -> str:
        scaled = [(_LEFT + x * (WIDTH - _LEFT - _RIGHT), bottom - y * (bottom - top)) for x, y in points]
        return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in scaled)

    lines = [
        Curve("validation pixels", "0", False, path([(mean, share) for mean, share, _ in rows])),
        Curve("perfect calibration", "mean", True, path([(0, 0), (1, 1)])),
    ]
    ticks = (0, 0.25, 0.5, 0.75, 1)
    x_ticks = [(_LEFT + tick * (WIDTH - _LEFT - _RIGHT), f"{tick:g}") for tick in ticks]
    y_ticks = [(bottom - tick * (bottom - top), f"{tick:g}") for tick in ticks]
    return LineChart(title, int(bottom) + 36, lines, x_ticks, y_ticks, bottom, x_label="probability of foreground")
