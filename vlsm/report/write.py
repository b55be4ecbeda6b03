"""The report of a run: one HTML file with figures, charts and pictures that needs no network."""

from pathlib import Path

from vlsm import storage
from vlsm.report.evaluations import evaluation_page
from vlsm.report.page import Page, render
from vlsm.report.segmentations import segmentation_page
from vlsm.report.trainings import training_page
from vlsm.runs.tables import name_damage


def write_report(output: str, file: str | Path | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        output: OUTPUT of a segment, train or evaluate run, finished or not, local or on an object store.
        file: a local path; default: the name of OUTPUT with `.html`, in the current folder.

    Returns:
        Path of the report.

    Raises:
        ConfigError: there is no run at OUTPUT.
        ResultError: a file of OUTPUT is damaged.
    """
    output = storage.absolute(output)
    name = output.rpartition("/")[2]
    path = Path(f"{name}.html" if file is None else file)
    with name_damage(f"OUTPUT {output!r}"):  # a page shows hundreds of values, and each may be of another type
        text = render(_page(output, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _page(output: str, title: str) -> Page:
    """Return the page of a run. The files in OUTPUT tell the kind of the run."""
    with storage.name_errors("OUTPUT", output):
        names = storage.list_names(output)
    if "scores.parquet" in names:
        return evaluation_page(output, title)
    if "examples.parquet" in names:
        return training_page(output, title)
    return segmentation_page(output, title)
