"""The report of a run: one HTML file with figures, charts and pictures that needs no network."""

from collections.abc import Sequence
from pathlib import Path

from vlsm import storage
from vlsm.errors import ConfigError
from vlsm.report.evaluations import evaluation_page
from vlsm.report.page import Page, render
from vlsm.report.reviews import Gallery
from vlsm.report.segmentations import segmentation_page
from vlsm.report.trainings import training_page
from vlsm.runs.tables import name_damage


def write_report(
    output: str, file: str | Path | None = None, allow: Sequence[str] = (), gallery: Gallery | None = None
) -> str:
    """Write the report of a run and return its location.

    Args:
        output: OUTPUT of a segment, train or evaluate run, finished or not, local or on an object store.
        file: the file to write, local or on an object store; default: beside OUTPUT, its name with `.html`.
        allow: places whose images may be read again, if OUTPUT is in a store and they lie outside of its bucket.
        gallery: how much the gallery of a segment run shows; default: 240 masks.

    Returns:
        Location of the report.

    Raises:
        ConfigError: there is no run at OUTPUT, FILE is no .html, or its gallery has a fixed size.
        ResultError: a file of OUTPUT is damaged.
    """
    output = storage.absolute(output)
    uri = f"{output}.html" if file is None else storage.absolute(str(file))
    if not uri.endswith((".html", ".htm")):
        raise ConfigError(f"FILE is {uri!r}; a report must end in .html, so that it replaces no other file")
    with name_damage(f"OUTPUT {output!r}"):  # a page shows hundreds of values, and each may be of another type
        text = render(_page(output, tuple(map(storage.absolute, allow)), gallery))
    with storage.name_errors("FILE", uri):
        storage.write_bytes(uri, text.encode())
    return uri


def _page(output: str, allow: tuple[str, ...], gallery: Gallery | None) -> Page:
    """Return the page of a run. The files in OUTPUT tell the kind of the run."""
    title = output.rpartition("/")[2]
    with storage.name_errors("OUTPUT", output):
        names = set(storage.list_names(output))
    if gallery is not None and not names.isdisjoint(("scores.parquet", "examples.parquet")):
        raise ConfigError(f"{output!r} is no segment run; --gallery and --gallery-px are for the report of one")
    if "scores.parquet" in names:
        return evaluation_page(output, title, allow)
    if "examples.parquet" in names:
        return training_page(output, title, allow)
    return segmentation_page(output, title, allow, gallery)
