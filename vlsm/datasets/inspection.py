"""Checks of labelled datasets before a training: broken files, doubtful masks, images that leak between splits."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.mask_checks import check_masks, find_all_negative, find_useless_masks, list_values, mask_key
from vlsm.datasets.records import Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.preprocess import Square

# Two images look alike if at most 6 of the 64 bits of their perceptual hashes differ. At this limit, 7 of ClinicDB's 61
# test frames look like a val frame (they come from the same videos), 3 of Kvasir's 200 do, and no ClinicDB frame looks
# like a Kvasir frame. At 10 bits, every sixth image looks like another one.
NEAR_BITS = 6


@dataclass(frozen=True)
class Facts:
    """Properties of one record's image file and mask file.

    Attributes:
        error: why the files cannot be used, or None.
        height, width: size of the image in pixels.
        image_sha256, mask_sha256: SHA-256 of the two files.
        area_fraction: share of the image that is foreground, from 0 to 1.
        image_hash: perceptual hash of 64 bits; similar images have similar hashes.
        mask_values, num_mask_values: values of the mask files, at most 16, and their number; see `list_values`.
        image_orientation, mask_orientation, is_turned: as in `Example` and `Mask`.
        square_side, square_px: side of the model's input, and foreground pixels in it; None if no model is known.
    """

    error: str | None = None
    height: int = 0
    width: int = 0
    image_sha256: str = ""
    mask_sha256: str = ""
    area_fraction: float = 0.0
    image_hash: int = 0
    mask_values: tuple[float, ...] = ()
    num_mask_values: int = 0
    image_orientation: int = 1
    mask_orientation: int = 1
    is_turned: bool = False
    square_side: int | None = None
    square_px: int | None = None


@dataclass(frozen=True)
class Finding:
    """A problem of one record: its kind, the dataset and split, the position of the record, and a message."""

    kind: str
    dataset: str
    split: str
    where: str
    message: str

    @property
    def is_broken(self) -> bool:
        """Whether the record cannot be used for training."""
        return self.kind == "broken"


def inspect_record(record: Record, reader: ExampleReader, square: Square | None = None) -> Facts:
    """Return the facts of a record after reading and decoding its image and its mask.

    Args:
        record: the record.
        reader: reads its files.
        square: the input square of the model, to count the foreground in it; None if no model is known.
    """
    try:
        example = reader.read(record)
    except ImageError as error:
        return Facts(error=str(error))
    mask = example.target.mask
    values, num_values = list_values(example.target.stored)
    return Facts(
        height=mask.shape[0],
        width=mask.shape[1],
        image_sha256=example.image_sha256,
        mask_sha256=example.target.sha256,
        area_fraction=float(mask.mean()),
        image_hash=perceptual_hash(example.image),
        mask_values=values,
        num_mask_values=num_values,
        image_orientation=example.orientation,
        mask_orientation=example.target.orientation,
        is_turned=example.is_turned,
        square_side=square and square.size,
        square_px=square and int(np.count_nonzero(square.resize_mask(mask))),
    )


def require_foreground(records: Sequence[Record], reader: ExampleReader, settings: DatasetSettings) -> None:
    """Raise a ConfigError if the masks of a dataset's split are all empty or full; see `find_useless_masks`.

    Only the mask files are read.
    """
    facts = [_inspect_mask(record, reader) for record in records]
    useless = find_useless_masks(records, facts, settings.mask_threshold) + find_all_negative(records, facts)
    if useless and not settings.allow_empty_masks:
        raise ConfigError(f"{'; '.join(useless)} (if they are right: --set data.allow_empty_masks=true)")


def _inspect_mask(record: Record, reader: ExampleReader) -> Facts:
    try:
        target = reader.read_mask(record)
    except ImageError as error:
        return Facts(error=str(error))
    values, num_values = list_values(target.stored)
    return Facts(area_fraction=float(target.mask.mean()), mask_values=values, num_mask_values=num_values)


def perceptual_hash(image: np.ndarray) -> int:
    """Return 64 bits that are alike for images that look alike: the signs of their lowest frequencies.

    Source: pHash as the package imagehash computes it, with equal results.
    """
    from PIL import Image
    from scipy import fft

    grey = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    lowest = fft.dctn(np.asarray(grey, dtype=np.float64))[:8, :8]
    bits = np.packbits(lowest > np.median(lowest))
    return int.from_bytes(bits.tobytes(), "big")


def check_facts(records: Sequence[Record], facts: Sequence[Facts]) -> list[Finding]:
    """Return every problem of the records. The functions below yield the kinds of problems."""
    good = [index for index, fact in enumerate(facts) if not fact.error]
    problems = [
        *(("broken", index, fact.error) for index, fact in enumerate(facts) if fact.error),
        *check_masks(records, facts, good),
        *_twice(records, facts, good),
        *_in_two_splits(records, facts, good),
    ]
    return [
        Finding(kind, record.dataset, record.split, record.where, message)
        for kind, record, message in ((kind, records[index], message) for kind, index, message in problems)
    ]


def _twice(records: Sequence[Record], facts: Sequence[Facts], good: list[int]) -> Iterable[tuple[str, int, str]]:
    firsts: dict[tuple[object, ...], int] = {}
    for index in good:
        fact, record = facts[index], records[index]
        key = (record.dataset, record.split, fact.image_sha256, mask_key(record, fact), repr(record.prompts))
        if (first := firsts.setdefault(key, index)) != index:
            yield "twice", index, f"{record.image_uri} and its mask are also the files of {records[first].where}"


def _in_two_splits(
    records: Sequence[Record], facts: Sequence[Facts], good: list[int]
) -> Iterable[tuple[str, int, str]]:
    for index, first in _same_files(records, facts, good):
        message = f"{records[index].image_uri} is the same file as {_describe_record(records[first])}"
        yield "in two splits", index, message
    for index, twin, bits in _near_pairs(records, facts, good):
        message = f"{records[index].image_uri} looks like {_describe_record(records[twin])} ({bits} of 64 bits differ)"
        yield "alike in two splits", index, message


def find_twins(records: Sequence[Record], facts: Sequence[Facts]) -> list[tuple[int, int, int]]:
    """Return the pairs of images in different splits that are the same file or look alike, the most similar first.

    Returns:
        Index of an image, index of its twin, and the number of the 64 bits of their hashes that differ.
    """
    good = [index for index, fact in enumerate(facts) if not fact.error]
    same = [(index, first, 0) for index, first in _same_files(records, facts, good)]
    return same + sorted(_near_pairs(records, facts, good), key=lambda pair: pair[2])


def _same_files(records: Sequence[Record], facts: Sequence[Facts], good: list[int]) -> Iterable[tuple[int, int]]:
    """Yield each image whose file is in another split too, with the first record of the file."""
    firsts: dict[str, int] = {}
    for index in good:
        first = firsts.setdefault(facts[index].image_sha256, index)
        if records[first].split != records[index].split:
            yield index, first


def _describe_record(record: Record) -> str:
    return f"{record.image_uri} in {record.split} of {record.dataset}"


def _near_pairs(records: Sequence[Record], facts: Sequence[Facts], good: list[int]) -> Iterable[tuple[int, int, int]]:
    """Yield each image of val and test that looks like an image of an earlier split but is not the same file.

    Yields:
        Index of the image, index of the most similar earlier image, and number of bits that differ.
    """
    by_split = {
        split: np.array([index for index in good if records[index].split == split], int)
        for split in ("train", "val", "test")
    }
    hashes = np.array([fact.image_hash for fact in facts], np.uint64)
    for split, earlier in (("val", ("train",)), ("test", ("train", "val"))):
        others = np.concatenate([by_split[name] for name in earlier])
        if not len(others):
            continue
        for index in by_split[split]:
            differing = np.bitwise_count(hashes[others] ^ hashes[index])
            twin = int(others[differing.argmin()])
            if differing.min() <= NEAR_BITS and facts[twin].image_sha256 != facts[index].image_sha256:
                yield int(index), twin, int(differing.min())


def describe_findings(records: Sequence[Record], findings: Sequence[Finding], num_shown: int | None = 5) -> list[str]:
    """Return lines for the log: counts per dataset and split, then the first `num_shown` findings of each kind."""
    counts = Counter((record.dataset, record.split) for record in records)
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    of_kind = Counter((finding.dataset, finding.split, finding.kind) for finding in findings)
    lines = []
    for (dataset, split), number in counts.items():
        notes = [f"{of_kind[dataset, split, kind]:,} {kind}" for kind in kinds if of_kind[dataset, split, kind]]
        lines.append(
            f"{dataset:16} {split:6} {number:8,} {'record' if number == 1 else 'records'}"
            + "".join(f", {note}" for note in notes)
        )
    for kind in kinds:
        same_kind = [finding for finding in findings if finding.kind == kind]
        shown = same_kind[:num_shown]
        lines += [f"{kind}: dataset {finding.dataset}, {finding.where}: {finding.message}" for finding in shown]
        if len(same_kind) > len(shown):
            lines.append(f"{kind}: and {len(same_kind) - len(shown):,} more")
    return lines


EXAMPLES_SCHEMA = pa.schema(
    [
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("dataset", "split", "where", "image_uri", "mask_uri")
        ),
        pa.field("prompts", pa.map_(pa.string(), pa.list_(pa.string())), nullable=False),
        pa.field("image_selector", pa.string()),
        pa.field("mask_selector", pa.string()),
        pa.field("labels", pa.list_(pa.int64())),
        pa.field("more_masks", pa.list_(pa.string())),
        pa.field("mask_rle", pa.string()),
        pa.field("mask_size", pa.list_(pa.int32())),
        pa.field("group", pa.string()),
        pa.field("further", pa.map_(pa.string(), pa.string())),
        pa.field("error", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("image_sha256", pa.string()),
        pa.field("mask_sha256", pa.string()),
        pa.field("area_fraction", pa.float64()),
        pa.field("image_hash", pa.uint64()),
    ]
)


def examples_table(records: Sequence[Record], facts: Sequence[Facts]) -> pa.Table:
    """Return a table with one row per record: the record and its facts."""
    rows: list[dict[str, Any]] = [
        asdict(record) | {"prompts": list(record.prompts.items())} | asdict(fact)
        for record, fact in zip(records, facts, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES_SCHEMA)


def records_from_table(table: pa.Table) -> list[Record]:
    """Return the records of a table that `examples_table` has made. Those of earlier versions have fewer columns."""
    names = [name for name in Record.__dataclass_fields__ if name in table.column_names]
    return [read_record_row(row) for row in table.select(names).to_pylist()]


def good_records(table: pa.Table) -> list[Record]:
    """Return the records of such a table whose files can be used."""
    return records_from_table(table.filter(pc.is_null(table["error"])))


def read_record_row(row: dict[str, Any]) -> Record:
    """Return the record of a row of such a table; other columns are ignored."""
    fields = {name: row[name] for name in Record.__dataclass_fields__ if name in row}
    prompts = {kind: tuple(texts) for kind, texts in row["prompts"]}
    lists = {name: tuple(fields[name]) for name in ("labels", "more_masks", "mask_size") if fields.get(name)}
    further = tuple((name, value) for name, value in fields.get("further") or () if name and value)
    lists |= {"further": further} if further else {}
    given = {name: value for name, value in fields.items() if value is not None and value != []}
    return Record(**given | lists | {"prompts": prompts})


def digest_examples(table: pa.Table) -> str:
    """Return a SHA-256 of the training data: file contents, prompts, splits and datasets, in their order."""
    digest = hashlib.sha256()
    always = ["dataset", "split", "image_sha256", "mask_sha256", "prompts"]
    extra = [name for name in ("labels", "mask_rle") if name in table.column_names]  # most masks need neither
    for row in table.select([*always, *extra]).to_pylist():
        kept = {name: value for name, value in row.items() if name in always or value}
        digest.update(repr(sorted(kept.items())).encode())
    return digest.hexdigest()
