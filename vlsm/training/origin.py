"""What is known of the training of a checkpoint: how it read its data, and the images that it learned from.

Both are beside the checkpoint, in the OUTPUT of its training. A training that starts from other checkpoints keeps their
images in known.parquet, so that its own record is complete.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsm import storage
from vlsm.datasets.records import RECORD, Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import VlsmError
from vlsm.models.options import STACK
from vlsm.runs.record import read_record
from vlsm.runs.tables import open_table
from vlsm.shown import public_uri
from vlsm.training.examples import EXAMPLES_NAME, read_examples_table
from vlsm.training.settings import TrainSettings
from vlsm.training.state import CHECKPOINT_NAME

KNOWN_NAME = "known.parquet"

Image = tuple[str, str]  # a location without secrets, or the SHA-256 of a file; and the selector, "" without one

_KNOWN_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("image", "image_selector")])
_COMPARED = ("mask_threshold", "slices", "window")  # settings that change what a mask or an image is


def describe_differences_to_training(checkpoint: str, data: DatasetSettings, prompts: Sequence[str]) -> str | None:
    """Return a sentence if a checkpoint is judged on data that is read or prompted otherwise than in its training.

    A checkpoint that does not lie in the OUTPUT of its training has no record; then there is nothing to say.

    Args:
        checkpoint: location of the checkpoint.
        data: how the datasets are read now.
        prompts: choices of prompts, as in the setting `prompts` of an evaluation.
    """
    trained = _read_data(checkpoint)
    pairs = [(name, trained[name], getattr(data, name)) for name in _COMPARED if name in trained]
    phrases = [f"data.{name}={was!r} (here {now!r})" for name, was, now in pairs if was != _plain(now)]
    prompt = trained.get("prompt", "p1")
    if RECORD in prompts and prompt not in ("p1", "random", *prompts):
        phrases.append(f"data.prompt={prompt!r} (here each record's p1)")
    return f"checkpoint {checkpoint} was trained with {', '.join(phrases)}" if phrases else None


def _read_data(checkpoint: str) -> dict[str, Any]:
    """Return the settings `data` of a checkpoint's training, as its config.yaml has them; empty if there is none."""
    folder = _output_of(checkpoint)
    if folder is None:
        return {}
    try:
        record = read_record(folder)
    except _unreadable():
        return {}
    data = record["config"].get("data") if record else None
    return data if isinstance(data, dict) else {}


def _output_of(checkpoint: str) -> str | None:
    """Return the OUTPUT of the training that wrote a checkpoint, or None if the checkpoint lies elsewhere."""
    folder, _, name = storage.absolute(checkpoint).rstrip("/").rpartition("/")
    return folder if name == CHECKPOINT_NAME else None


def _unreadable() -> tuple[type[Exception], ...]:
    return (VlsmError, OSError, *storage.store_errors())


def read_known(checkpoint: str) -> set[Image]:
    """Return the images that a checkpoint has learned from, as far as its training has a record; else none.

    These are the train records of its training, and those of the checkpoints that its training began with.
    """
    folder, known = _output_of(checkpoint), set[Image]()
    if folder is None:
        return known
    with contextlib.suppress(*_unreadable()):
        examples = read_examples_table(storage.join(folder, EXAMPLES_NAME))
        known = known.union(*(_names_of(row) for row in examples.to_pylist() if row["split"] == "train"))
    with contextlib.suppress(*_unreadable()):
        table = open_table(storage.join(folder, KNOWN_NAME), _KNOWN_SCHEMA).read(_KNOWN_SCHEMA.names)
        known = known.union((row["image"], row["image_selector"]) for row in table.to_pylist())
    return known


def read_sources(settings: TrainSettings) -> set[Image]:
    """Return the images that the checkpoint in start_from, or the members of a stack, have learned from."""
    sources = [settings.start_from] if settings.start_from is not None else []
    if settings.model == STACK:
        sources = settings.options["members"]
    return set[Image]().union(*map(read_known, sources))


def write_known(output: str, known: Iterable[Image]) -> None:
    """Write known.parquet to OUTPUT, if there are images."""
    rows = [dict(zip(_KNOWN_SCHEMA.names, image, strict=True)) for image in sorted(known)]
    if rows:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_KNOWN_SCHEMA), sink, compression="zstd")
        storage.write_bytes(storage.join(output, KNOWN_NAME), sink.getvalue())


def warn_of_known(settings: TrainSettings, examples: pa.Table) -> list[str]:
    """Return a warning for each split with images that the sources of a training have learned from.

    The train records of start_from are meant to be learned again; those of a stack's members are not.

    Args:
        settings: settings of the training.
        examples: its examples.
    """
    known, is_stack = read_sources(settings), settings.model == STACK
    if not known:
        return []
    source = "the members of the stack" if is_stack else "the checkpoint in start_from"
    ends = {"val": "their Dice there is too high to choose an epoch", "test": "the Dice of the test will be too high"}
    if is_stack:
        ends["train"] = "their logits are too good there, and the stack trusts them too much; data.learn_from=val"
    rows = [row for row in examples.to_pylist() if row["error"] is None]
    lines = []
    for split, end in ends.items():
        names = [_names_of(row) for row in rows if row["split"] == split]
        if number := sum(not known.isdisjoint(each) for each in names):
            lines.append(f"{source} learned from {number:,} of the {len(names):,} {split} images: {end}")
    return lines


def count_known(checkpoints: Iterable[str], records: Sequence[Record]) -> int:
    """Return the number of records whose image one of the checkpoints has learned from, by the image's location."""
    known = set[Image]().union(*map(read_known, checkpoints))
    return sum((public_uri(record.image_uri), record.image_selector or "") in known for record in records)


def _names_of(row: dict[str, Any]) -> set[Image]:
    """Return the names of the image of an example: its location, and its content if it is known."""
    selector = row.get("image_selector") or ""
    return {(name, selector) for name in (public_uri(row["image_uri"]), row.get("image_sha256")) if name}


def _plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return list(value) if isinstance(value, tuple) else value
