"""What a dataset is taken for, in lines to read before a training: files, splits, prompts, masks, sizes, problems."""

import logging
import posixpath
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from vlsm import storage
from vlsm.datasets.examples import ExampleReader
from vlsm.datasets.inspection import Facts, Finding, check_facts, describe_findings, inspect_record
from vlsm.datasets.mask_checks import describe_foreground, find_useless_masks
from vlsm.datasets.read import read_dataset
from vlsm.datasets.records import SPLITS, Record
from vlsm.datasets.settings import DatasetSettings
from vlsm.images.preprocess import Square
from vlsm.shown import public_uri
from vlsm.words import count

logger = logging.getLogger("vlsm")

T = TypeVar("T")

_THREADS = 8  # mostly they wait for storage, or decode without Python's lock
_CHUNK = 8  # records that one reader reads in turn, so that it reads a file with several of them once
_PROGRESS_S = 10.0
_SHOWN, _SHOWN_TEXTS = 4, 2  # folders or files, and prompts, that a line lists
_POSITION = re.compile(r", (?=(?:record|row|line|image|annotation) \d)")
_TEXT_LENGTH = 40  # of a prompt; the line then fits a terminal


@dataclass(frozen=True)
class Overview:
    """A dataset, and what an inspection of some of its records has found.

    Attributes:
        name, uri: the dataset.
        records: all records.
        chosen: the inspected records, spread evenly over datasets and splits.
        facts: the facts of each inspected record.
        findings: the problems of the inspected records.
        settings: how the dataset was read.
    """

    name: str
    uri: str
    records: list[Record]
    chosen: list[Record]
    facts: list[Facts]
    findings: list[Finding]
    settings: DatasetSettings


def inspect_dataset(
    name: str, uri: str, settings: DatasetSettings, limit: int, square: Square | None = None
) -> Overview:
    """Read a dataset and inspect some of its records, in threads.

    Args:
        name: name of the dataset.
        uri: its location, as for `read_dataset`.
        settings: how to read it.
        limit: most records to inspect; 0 for all.
        square: the input square of a model, to find lesions that vanish in it.

    Raises:
        ConfigError: there is no dataset at the location.
        ManifestError: a record is invalid.
        StorageError: the store was unavailable for too long.
    """
    with storage.name_errors(f"dataset {name}", uri):
        records = read_dataset(name, uri, settings)
        chosen = spread(records, limit or len(records))
        logger.info("%s: inspecting %s of %s records", name, f"{len(chosen):,}", f"{len(records):,}")
        facts = read_all(chosen, settings, partial(inspect_record, square=square))
    return Overview(name, uri, records, chosen, facts, check_facts(chosen, facts), settings)


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """Return about `count` records: an even share of each dataset and split, one at least, in their order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault((record.dataset, record.split), []).append(index)
    chosen = []
    for indices in groups.values():
        share = min(len(indices), max(1, round(count * len(indices) / len(records))))
        chosen += [indices[position] for position in np.linspace(0, len(indices) - 1, share).round().astype(int)]
    return [records[index] for index in sorted(chosen)]


def read_all(
    records: Sequence[Record], settings: DatasetSettings, read: Callable[[Record, ExampleReader], T]
) -> list[T]:
    """Return the result of a function for each record, computed in threads."""

    def read_chunk(start: int) -> list[T]:
        reader = ExampleReader(settings)
        return [read(record, reader) for record in records[start : start + _CHUNK]]

    results: list[T] = []
    last_s = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(read_chunk, range(0, len(records), _CHUNK)):
            results += part
            if time.monotonic() - last_s > _PROGRESS_S:
                logger.info("%s of %s records", f"{len(results):,}", f"{len(records):,}")
                last_s = time.monotonic()
    return results


def describe_overview(overview: Overview) -> list[str]:
    """Return the lines that a person reads."""
    records, num_chosen = overview.records, len(overview.chosen)
    part = f"{num_chosen:,} of {count(len(records), 'record')}"
    some = f"{part}, spread evenly; --limit 0 inspects all" if num_chosen < len(records) else "all records"
    rows = [
        ("layout", describe_layout(overview.uri, overview.records)),
        ("images", _describe_folders(overview.uri, {record.image_uri for record in records})),
        ("masks", _describe_masks(overview)),
        *(("records", line) for line in _describe_splits(records)),
        *(("prompts", line) for line in _describe_prompts(records)),
        ("inspected", some),
        *_describe_facts(overview),
        *(("problems", line) for line in _describe_problems(overview)),
    ]
    lines, last = [f"{overview.name}: {overview.uri}"], ""
    for head, line in rows:
        lines.append(f"  {head if head != last else '':11} {line}")
        last = head
    return lines


def describe_layout(uri: str, records: Sequence[Record]) -> str:
    """Return the files that list the records, or that there are none, from the positions of the records.

    A position is such as "anns/val.json, record 7"; without a list, it is the dataset itself and a file of it.
    """
    uri, places = public_uri(uri), (record.where for record in records)
    # a list can be the dataset itself: "list.csv, row 3"
    listed = (where for where in places if not where.startswith(f"{uri}, ") or _POSITION.match(where, len(uri)))
    sources = list(dict.fromkeys(_relative(uri, _POSITION.split(where)[0]) for where in listed))
    return _shorten(sources) if sources else "no list: images and masks belong together by their names"


def _describe_folders(uri: str, files: Iterable[str]) -> str:
    """Return the folders and endings of files with their counts, the most frequent first."""
    kinds = Counter(
        posixpath.join(posixpath.dirname(path), f"*{posixpath.splitext(path)[1]}")
        for path in (_relative(uri, _without_query(file)) for file in files)
    )
    return _shorten([f"{kind} ({count:,})" for kind, count in kinds.most_common()])


def _without_query(uri: str) -> str:
    return public_uri(uri).partition("?")[0] if "://" in uri else uri


def _describe_masks(overview: Overview) -> str:
    records = overview.records
    files = {uri for record in records if record.mask_rle is None for uri in record.mask_uris}
    num_inside = sum(record.mask_rle is not None for record in records)
    num_negative = sum(record.is_negative for record in records)
    words = [_describe_folders(overview.uri, files)] if files else []
    words += [f"{count(num_inside, 'shape')} of the annotations"] * bool(num_inside)
    words += [f"{count(num_negative, 'image')} without the finding"] * bool(num_negative)
    return "; ".join(words)


def _describe_splits(records: Sequence[Record]) -> list[str]:
    lines: list[str] = []
    for dataset, number in Counter(record.dataset for record in records).items():
        splits = Counter(record.split for record in records if record.dataset == dataset)
        order = sorted(splits, key=lambda split: (*SPLITS, split).index(split))
        described = ", ".join(f"{splits[split]:,} {split or 'without a split'}" for split in order)
        num_images = len({(one.image_uri, one.image_selector) for one in records if one.dataset == dataset})
        groups = {record.group for record in records if record.dataset == dataset and record.group}
        images = f" of {count(num_images, 'image')}" + (f" in {count(len(groups), 'group')}" if groups else "")
        lines.append(
            f"{f'{dataset}: ' if dataset != records[0].dataset or lines else ''}{number:,}{images}: {described}"
        )
    return lines


def _describe_prompts(records: Sequence[Record]) -> list[str]:
    """Return the texts of each kind of prompt with the number of records that have them, the most frequent first."""
    kinds: dict[str, Counter[str]] = {}
    for record in records:
        for kind, texts in record.prompts.items():
            kinds.setdefault(kind, Counter()).update(list(dict.fromkeys(texts)))
    lines = []
    for kind, counts in kinds.items():
        shown = ", ".join(f"{_cut(text)!r} ({count:,})" for text, count in counts.most_common(_SHOWN_TEXTS))
        lines.append(f"{kind}  {f'{len(counts):,} texts: ' if len(counts) > _SHOWN_TEXTS else ''}{shown}")
    if num_without := sum(not any(map(any, record.prompts.values())) for record in records):
        lines.append(f"no prompt for {count(num_without, 'record')}: --set data.prompt=text:WORDS trains with WORDS")
    return lines


def _describe_facts(overview: Overview) -> list[tuple[str, str]]:
    facts = [fact for fact in overview.facts if not fact.error]
    if not facts:
        return []
    rule = describe_foreground(overview.chosen, overview.facts, overview.settings.mask_threshold)
    values = [("values", line.removeprefix(f"dataset {overview.name}: masks hold ")) for line in rule]
    sizes = sorted(((fact.width, fact.height) for fact in facts), key=lambda size: (size[0] * size[1], size))
    low, middle, high = (f"{width} x {height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    size = f"{low} pixels, all" if sizes[0] == sizes[-1] else f"{low} to {high} pixels, median {middle}"
    areas = np.array([fact.area_fraction for fact in facts])
    marked = areas[areas > 0]
    area = "none"
    if len(marked):
        least, median, most = (f"{100 * area:.2g}" if area < 1 else "100" for area in np.quantile(marked, (0, 0.5, 1)))
        area = f"{least} to {most} % of the image, median {median} %"
    counts = ", ".join(
        f"{count:,} {word}" for word, count in (("empty", (areas == 0).sum()), ("full", (areas == 1).sum()))
    )
    return [*values, ("sizes", f"{size} (width x height)"), ("foreground", f"{area}; {counts}")]


def _describe_problems(overview: Overview) -> list[str]:
    useless = find_useless_masks(overview.chosen, overview.facts, overview.settings.mask_threshold)
    num_groups = len({(record.dataset, record.split) for record in overview.chosen})
    # the first lines are counts of records, which stand above already
    findings = describe_findings(overview.chosen, overview.findings, num_shown=3)[num_groups:]
    kinds = Counter(finding.kind for finding in overview.findings)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    lines = [f"training refuses {sentence}" for sentence in useless]
    lines += [counts, *(line.replace(f"dataset {overview.name}, ", "") for line in findings)] if counts else []
    for folder in _folders(overview.uri):
        lines = [line.replace(f"{folder}/", "") for line in lines]
    return lines or ["none found"]


def _relative(uri: str, file: str) -> str:
    """Return the path of a file below the dataset's folder, or beside its list."""
    return next((file[len(folder) + 1 :] for folder in _folders(uri) if file.startswith(f"{folder}/")), file)


def _folders(uri: str) -> tuple[str, str]:
    """Return the folder of a dataset, then the folder above: a list names files beside itself."""
    folder = public_uri(uri).rstrip("/")
    return folder, folder.rpartition("/")[0]


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[: _TEXT_LENGTH - 1]}…"


def _shorten(words: Sequence[str]) -> str:
    """Return the first words, and how many more there are."""
    num_more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {num_more:,} more" if num_more > 0 else "")
