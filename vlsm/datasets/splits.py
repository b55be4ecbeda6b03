"""Splits for records that have none, and folds. What belongs together never crosses them.

1. Records become clusters. Records of one image file, and of files with equal content, share a cluster. So do records
   of one group of a dataset (`split.by`), and images that look alike (`split.look_alikes`), also across datasets.
2. A cluster that has a record with a given split follows it: train if there are several, so that no further image of
   val or test looks like an image of train.
3. The other clusters are divided, the largest first. Each goes to the split in which it lowers the sum of
   (records - wanted records)^2 / wanted records most. The sum is over all records; each dataset; the records with and
   without foreground in each dataset; and each first p1 prompt in each dataset. A mask or prompt that is too rare to
   give each split one record is not counted. Single images of one kind are so divided as seats by Sainte-Lague. The
   last clusters go to splits that have none yet.

The result depends on the seed and on the contents and groups of the images, not on their order, names or places.

Source: stratification of grouped records as StratifiedGroupKFold of scikit-learn does it, with shares.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from vlsm.datasets.inspection import NEAR_BITS, Facts
from vlsm.datasets.records import SPLITS, Record
from vlsm.datasets.settings import SplitSettings
from vlsm.errors import ConfigError
from vlsm.words import count

MAKE = "--set data.split.val=0.1 --set data.split.test=0.1"
GIVE = "training has made them: give its list, --dataset NAME=OUTPUT/examples.parquet with the OUTPUT of the training"


def require_splits(records: Sequence[Record], advice: str = f"{MAKE} makes them") -> None:
    """Raise a ConfigError if a record has no split.

    Only training makes splits, since it has looked at all images. Other jobs see the same ones in its list.

    Args:
        records: the records.
        advice: end of the message; GIVE for other jobs than a training.
    """
    if phrase := describe_missing_splits(records):
        raise ConfigError(f"{phrase}: {advice}")


def describe_missing_splits(records: Sequence[Record]) -> str | None:
    """Return how many records of each dataset have no split, or None if all have one."""
    counts = Counter(record.dataset for record in records)
    without = Counter(record.dataset for record in records if not record.split)
    named = ", ".join(f"{count:,} of {counts[name]:,} records of {name}" for name, count in without.items())
    return f"{named} have no split (train, val or test)" if without else None


def release_train(records: Sequence[Record], settings: SplitSettings) -> list[Record]:
    """Return the records; train records lose their split if their dataset has none for val and data.split.val is set.

    Published datasets often have only train, or train and test: `make_splits` then takes val from train.
    """
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        splits[record.dataset].add(record.split)
    names = {name for name, known in splits.items() if settings.val and "train" in known and not known & {"val", ""}}
    return [replace(one, split="") if one.dataset in names and one.split == "train" else one for one in records]


def release_val(records: Sequence[Record]) -> list[Record]:
    """Return the records without those of train. Those of val lose their split, for `divide_val`.

    Raises:
        ConfigError: a record has no split, or a dataset has none of val.
    """
    require_splits(records, GIVE)
    with_val = {record.dataset for record in records if record.split == "val"}
    if without := [name for name in dict.fromkeys(record.dataset for record in records) if name not in with_val]:
        raise ConfigError(f"data.learn_from is val, but {', '.join(without)} has no val records; if {GIVE}")
    return [replace(one, split="") if one.split == "val" else one for one in records if one.split != "train"]


def divide_val(
    records: Sequence[Record], facts: Sequence[Facts], settings: SplitSettings
) -> tuple[list[Record], list[str]]:
    """Return the records, those without a split in two halves, train and val; and lines for the log.

    The other records do not count: no val record becomes test because it looks like one.

    Args:
        records: result of `release_val`.
        facts: one per record.
        settings: which records stay together, and the seed; the shares do not count.

    Raises:
        ConfigError: a half would be empty.
    """
    chosen = [index for index, record in enumerate(records) if not record.split]
    halves = settings.model_copy(update={"val": 0.5, "test": 0.0})
    divided, lines = make_splits([records[index] for index in chosen], [facts[index] for index in chosen], halves)
    made = dict(zip(chosen, divided, strict=True))
    return [made.get(index, record) for index, record in enumerate(records)], lines


def make_splits(
    records: Sequence[Record], facts: Sequence[Facts], settings: SplitSettings
) -> tuple[list[Record], list[str]]:
    """Return the records, each with a split, and lines for the log. Given splits stay.

    Args:
        records: the records of all datasets of a job. Broken ones stay without a split.
        facts: one per record.
        settings: which splits to make.

    Raises:
        ConfigError: a record has no split and none are to be made, or a split would be empty.
    """
    if settings.is_off:
        require_splits(records)
    good = [index for index, fact in enumerate(facts) if not fact.error]
    if all(records[index].split for index in good):
        return list(records), [] if settings.is_off else [
            "split: all records have splits already; data.split makes none"
        ]
    clusters = _find_clusters(records, facts, good, settings)
    splits: dict[int, str] = {}
    for index in good:
        if split := records[index].split:
            splits[clusters[index]] = min(split, splits.get(clusters[index], split), key=SPLITS.index)
    chosen = [index for index in good if not records[index].split]
    free = [index for index in chosen if clusters[index] not in splits]
    num_followers = len(chosen) - len(free)
    splits |= _divide(records, facts, clusters, free, settings.shares, settings.seed)
    made = list(records)
    for index in chosen:
        made[index] = replace(records[index], split=splits[clusters[index]])
    lines = _describe(made, clusters, chosen, settings.shares)
    if num_followers:
        lines.append(f"split: {num_followers:,} of these records follow a record with a given split that is alike")
    _check_none_empty(made, clusters, free, settings)
    return made, lines


def make_folds(
    records: Sequence[Record], facts: Sequence[Facts], settings: SplitSettings, num_folds: int
) -> tuple[list[list[Record]], list[str]]:
    """Return the records of each fold, with their splits, and lines for the log.

    The test records are the given ones and, of the records without a split, the share `settings.test`. They are the
    same in all folds. The others are divided into `num_folds` parts; part k is val in fold k, and train in the others.

    Raises:
        ConfigError: a fold would be empty.
    """
    made, lines = [replace(record, split=record.split or "train") for record in records], list[str]()
    if settings.test:
        made, lines = make_splits(records, facts, settings.model_copy(update={"val": 0.0}))
    good = [index for index, fact in enumerate(facts) if not fact.error]
    clusters = _find_clusters(made, facts, good, settings)
    in_test = {clusters[index] for index in good if made[index].split == "test"}
    followers = [index for index in good if clusters[index] in in_test and made[index].split != "test"]
    for index in followers:
        made[index] = replace(made[index], split="test")
    if followers:
        lines.append(f"folds: {len(followers):,} records follow a test record that is alike or of the same group")
    pool = [index for index in good if clusters[index] not in in_test]
    numbers = {str(number): 1 / num_folds for number in range(1, num_folds + 1)}
    parts = _divide(made, facts, clusters, pool, numbers, settings.seed)
    folds = []
    for number in numbers:
        fold = list(made)
        for index in pool:
            fold[index] = replace(made[index], split="val" if parts[clusters[index]] == number else "train")
        folds.append(fold)
        counts = Counter(record.split for record in fold)
        lines.append(f"fold {number} of {num_folds}: {', '.join(f'{counts[name]:,} {name}' for name in SPLITS)}")
        if not counts["val"] or not counts["train"]:
            raise ConfigError(f"folds: fold {number} has no val or train records: {_size_of(clusters, pool)}")
    return folds, lines


def _find_clusters(
    records: Sequence[Record], facts: Sequence[Facts], chosen: Sequence[int], settings: SplitSettings
) -> dict[int, int]:
    """Return the number of the cluster of each chosen record, by the record's index."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    firsts: dict[tuple[str, ...], int] = {}
    edges: list[tuple[int, int]] = []
    for position, index in enumerate(chosen):
        record = records[index]
        keys: list[tuple[str, ...]] = [("file", record.image_uri), ("content", facts[index].image_sha256)]
        if settings.by == "group" and record.group:
            keys.append(("group", record.dataset, record.group))
        edges += [(position, firsts.setdefault(key, position)) for key in keys]
    if settings.look_alikes:
        edges += _find_look_alikes([facts[index].image_hash for index in chosen])
    rows, columns = np.array(edges, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(chosen), len(chosen)))
    return dict(zip(chosen, connected_components(graph, directed=False)[1].tolist(), strict=True))


def _find_look_alikes(hashes: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield pairs of positions whose images look alike; of equal images, each with one other only.

    The hash of an image of one colour says nothing: nearly no bit is set, but half of them in other images. Such slices
    at the ends of volumes would join all patients.
    """
    unique, firsts, inverse = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
    is_plain = np.bitwise_count(unique) <= NEAR_BITS
    for position, number in enumerate(inverse.tolist()):
        if not is_plain[number] and firsts[number] != position:
            yield position, int(firsts[number])
    kept = np.flatnonzero(~is_plain)
    parents = np.arange(len(kept))  # the lowest known member of each cluster
    for row, number in enumerate(kept):  # all pairs: to read so many images takes longer
        near = np.flatnonzero(np.bitwise_count(unique[kept[row + 1 :]] ^ unique[number]) <= NEAR_BITS) + row + 1
        # one pair for each cluster that is met, not for each image: frames of a video have millions of pairs
        for other in near[np.unique(parents[near], return_index=True)[1]]:
            yield int(firsts[number]), int(firsts[kept[other]])
        parents[near] = parents[row]


def _divide(
    records: Sequence[Record],
    facts: Sequence[Facts],
    clusters: Mapping[int, int],
    chosen: Sequence[int],
    shares: Mapping[str, float],
    seed: int,
) -> dict[int, str]:
    """Return the part of each cluster; see the module. `chosen` are indices of records, whole clusters of them."""
    kinds = {index: _kinds_of(records[index], facts[index]) for index in chosen}
    totals = Counter(kind for index in chosen for kind in kinds[index])
    smallest = min(shares.values())
    counted = [kind for kind, count in totals.items() if len(kind) < 2 or count * smallest >= 1]
    columns = {kind: column for column, kind in enumerate(sorted(counted))}
    sizes: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(columns)))
    draws: dict[int, str] = {}
    num_records = Counter(clusters[index] for index in chosen)
    for index in chosen:
        cluster = clusters[index]
        draw = hashlib.sha256(f"{seed} {facts[index].image_sha256}".encode()).hexdigest()
        draws[cluster] = min(draw, draws.get(cluster, draw))
        for kind in kinds[index]:
            if kind in columns:
                sizes[cluster][columns[kind]] += 1
    wanted = np.outer(list(shares.values()), [totals[kind] for kind in columns])
    held = np.zeros_like(wanted)
    parts: dict[int, str] = {}
    for cluster in sorted(draws, key=lambda cluster: (-num_records[cluster], draws[cluster])):
        added = sizes[cluster]
        costs = ((2 * held + added) * added / wanted).sum(axis=1)
        is_empty = ~held.any(axis=1)
        if len(draws) - len(parts) <= is_empty.sum():
            costs[~is_empty] = np.inf
        best = int(costs.argmin())
        held[best] += added
        parts[cluster] = list(shares)[best]
    return parts


def _kinds_of(record: Record, fact: Facts) -> list[tuple[str, ...]]:
    kinds: list[tuple[str, ...]] = [
        (),
        (record.dataset,),
        (record.dataset, "empty" if not fact.area_fraction else "not empty"),
    ]
    return kinds + [(record.dataset, "prompt", text) for text in record.prompts.get("p1", ())[:1]]


def _describe(
    records: Sequence[Record], clusters: Mapping[int, int], chosen: Sequence[int], shares: Mapping[str, float]
) -> list[str]:
    lines = []
    for dataset in dict.fromkeys(records[index].dataset for index in chosen):
        members = [index for index in chosen if records[index].dataset == dataset]
        got = Counter(records[index].split for index in members)
        counts = [f"{split} {got[split]:,} of {share * len(members):,.1f} wanted" for split, share in shares.items()]
        lines.append(f"{dataset:16} split: {_size_of(clusters, members)}; {', '.join(counts)}")
    return lines


def _size_of(clusters: Mapping[int, int], chosen: Sequence[int]) -> str:
    sizes = Counter(clusters[index] for index in chosen)
    largest = max(sizes.values(), default=0)
    clusters_of = f"{count(len(chosen), 'record')} in {count(len(sizes), 'cluster')}"
    return f"{clusters_of} that must stay together, the largest of {largest:,}"


def _check_none_empty(
    records: Sequence[Record], clusters: Mapping[int, int], free: Sequence[int], settings: SplitSettings
) -> None:
    counts = Counter(record.split for record in records)
    if empty := [split for split in settings.shares if not counts[split]]:
        raise ConfigError(
            f"data.split leaves no {empty[0]} records: there are {_size_of(clusters, free)}; each split needs a "
            "cluster. Add records, or give them splits, or keep less together: --set data.split.look_alikes=false, "
            "--set data.split.by=image"
        )
