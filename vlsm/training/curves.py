"""Training curves as a picture."""

import io
from typing import Literal

from vlsm.errors import optional_packages
from vlsm.training.history import MEAN, History


def draw_curves(history: History) -> bytes:
    """Return a PNG with loss and Dice of train and val per epoch. Each dataset has a colour; their mean is black."""
    with optional_packages("train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4), layout="constrained")
    datasets = list(dict.fromkeys(row.dataset for row in history.rows if row.dataset != MEAN))
    shown = datasets if len(datasets) == 1 else [*datasets, MEAN]
    names: tuple[Literal["loss", "dice"], ...] = ("loss", "dice")
    for axes, name in zip(figure.subplots(1, 2), names, strict=True):
        for number, dataset in enumerate(shown):
            color = "black" if dataset == MEAN else f"C{number % 10}"
            for split, style in (("train", ":"), ("val", "-")):
                rows = [row for row in history.rows if (row.split, row.dataset) == (split, dataset)]
                if rows:
                    values = [getattr(row, name) for row in rows]
                    axes.plot([row.epoch for row in rows], values, style, color=color, label=f"{dataset}, {split}")
        axes.set(xlabel="epoch", ylabel=name if name == "loss" else "Dice at the model's size")
        if name == "dice":
            axes.set_ylim(0, 1)
            axes.axvline(history.best_epoch("dice"), color="grey", linewidth=0.8, label="best")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
