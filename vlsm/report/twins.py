"""Images that are alike but lie in different splits of a training: they make its scores too good."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from vlsm.datasets.inspection import Facts, find_twins, records_from_table
from vlsm.datasets.records import Record
from vlsm.images.reader import Reader
from vlsm.report.page import Case, Section, as_table
from vlsm.report.pictures import Painter, shorten

_MAX_PAIRS = 6
_MOST_COMPARISONS = 10**9  # some seconds


def compare_splits(examples: pa.Table, reader: Reader) -> list[Section]:
    """Return a section with the images of val and test that look like an image of an earlier split.

    The section says that there are none if there are none. Runs of versions that kept no hashes have no section.

    Args:
        examples: the table of the run's examples.
        reader: reads their images.
    """
    if not {"image_hash", "image_sha256"} <= set(examples.column_names):
        return []
    records, facts = records_from_table(examples), _read_facts(examples)
    if all(fact.error for fact in facts):
        return []
    sizes = Counter(record.split for record in records)
    title = "Images alike in two splits"
    if sizes["train"] * (sizes["val"] + sizes["test"]) + sizes["val"] * sizes["test"] > _MOST_COMPARISONS:
        return [Section("twins", title, "The splits have too many images to compare them here; training logs them.")]
    pairs = find_twins(records, facts)
    if not pairs:
        return [Section("twins", title, "None: no image of val or test looks like an image of an earlier split.")]
    counts = Counter(
        (*(f"{each.split} of {each.dataset}" for each in (records[index], records[twin])), "same file" * (not bits))
        for index, twin, bits in pairs
    )
    rows = [
        {"images of": of, "look like images of": like, "pairs": count, "same file": count if same else None}
        for (of, like, same), count in counts.most_common(20)
    ]
    intro = (
        "A model has seen such an image, or nearly, before it is scored on it. "
        "--set data.split.look_alikes=true keeps them together where training makes the splits."
    )
    painter = Painter(reader, lambda row: (None, None))
    cases = [_draw(records[index], records[twin], bits, painter) for index, twin, bits in pairs[:_MAX_PAIRS]]
    groups: Sequence[tuple[str, str, list[Case]]] = [("The most similar pairs", "", cases)]
    return [Section("twins", title, intro, tables=[as_table(rows)], groups=groups)]


def _read_facts(examples: pa.Table) -> list[Facts]:
    """Return what a table of examples has of the facts of its records. Those of earlier versions have fewer columns."""
    names = [name for name in Facts.__dataclass_fields__ if name in examples.column_names]
    rows = examples.select(names).to_pylist()
    unknown = Facts(error="its file was not hashed")  # such rows are not compared
    return [
        Facts(**{name: value for name, value in row.items() if value is not None})
        if row.get("image_sha256")
        else unknown
        for row in rows
    ]


def _draw(record: Record, twin: Record, bits: int, painter: Painter) -> Case:
    """Return both images side by side."""
    rows = [
        {"status": "ok", "image_uri": each.image_uri, "selector": each.image_selector, "mask_uri": each.mask_uri}
        for each in (record, twin)
    ]
    pictures = [painter.draw(row, is_case=False) for row in rows]
    names = [f"{each.image_uri.rpartition('/')[2]} {each.image_selector or ''}".strip() for each in (record, twin)]
    facts = [(each.split, shorten(each.dataset, 40)) for each in (record, twin)]
    facts.append(("differ", f"{bits} of 64 bits"))
    problem = next((picture.problem for picture in pictures if picture.problem), None)
    uris = () if problem else [picture.card for picture in pictures]
    return Case(shorten(" and ".join(names), 200), uris, problem, facts, {}, {})
