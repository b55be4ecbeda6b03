"""The order in which a training sees its examples. It depends only on the seed, however often a run is resumed.

In each epoch the examples get an order, and the order is cut into one batch per optimiser step. Each worker takes its
share of each batch, in micro-batches that fit its memory. The number of workers changes neither order nor batches.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlsm.datasets.records import OWN, RECORD, Record
from vlsm.errors import ConfigError, ManifestError
from vlsm.training.settings import DataSettings, TrainSettings

_EVALUATION = 2**31  # stands for an epoch in the seeds of evaluations; no training has so many epochs


@dataclass(frozen=True)
class MicroBatch:
    """Examples that pass through the model of one worker together.

    Attributes:
        split: "train", "val" or "test".
        epoch: number of the epoch, from 0.
        step: optimiser step within the epoch, or step of an evaluation within the split; from 0.
        ends_step: whether the optimiser updates the weights after it; in an evaluation, whether it is the split's last.
        batch_size: examples in the whole batch of all workers.
        examples: positions in the list of examples.
        weights: 1, or 0 for padding; padding makes the shares of all workers equally long.
        prompts: one per example.
        seeds: seed of each example's augmentation.
    """

    split: Literal["train", "val", "test"]
    epoch: int
    step: int
    ends_step: bool
    batch_size: int
    examples: tuple[int, ...]
    weights: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


class ExampleOrder:
    """The order of one worker's examples, as micro-batches.

    Args:
        records: the examples.
        settings: settings of the run.
        rank: number of the worker, from 0.
        num_workers: number of workers.
        are_negative: whether the mask of each record is empty, for data.negatives; None if only the negative records
            are known.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: TrainSettings,
        rank: int = 0,
        num_workers: int = 1,
        are_negative: Sequence[bool] | None = None,
    ) -> None:
        self.records, self.settings = records, settings
        self._are_negative = are_negative
        self.rank, self.num_workers = rank, num_workers
        self._by_split = {
            split: np.array([number for number, record in enumerate(records) if record.split == split], int)
            for split in ("train", "val", "test")
        }

    @functools.cached_property
    def num_steps(self) -> int:
        """The number of optimiser steps of an epoch."""
        return len(cut_batches(self._by_split["train"], self.settings.optim.batch_size))

    @functools.cached_property
    def fewest_examples(self) -> int:
        """The number of examples in the smallest micro-batch of an epoch's training, padding included."""
        batches = cut_batches(self._by_split["train"], self.settings.optim.batch_size)
        shares = {-(-len(batch) // self.num_workers) for batch in batches}
        micro_batch_size = self.settings.run.micro_batch_size
        return min(len(piece) for share in shares for piece in cut_batches(np.arange(share), micro_batch_size))

    def train(self, epoch: int, first_step: int = 0) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an epoch, starting at a step."""
        order = draw_order(self.records, self._by_split["train"], self.settings, epoch, self._are_negative)
        batches = cut_batches(order, self.settings.optim.batch_size)
        for step in range(first_step, len(batches)):
            yield from self._share("train", epoch, step, batches[step], is_last=True)

    def evaluate(self, split: Literal["val", "test"], epoch: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a split. Each example has weight 1 in exactly one worker."""
        batches = cut_batches(self._by_split[split], self.settings.run.micro_batch_size * self.num_workers)
        for step, batch in enumerate(batches):
            yield from self._share(split, epoch, step, batch, is_last=step == len(batches) - 1)

    def _share(
        self, split: Literal["train", "val", "test"], epoch: int, step: int, batch: np.ndarray, is_last: bool
    ) -> Iterator[MicroBatch]:
        positions = np.arange(self.rank, -(-len(batch) // self.num_workers) * self.num_workers, self.num_workers)
        draws = [self._draw(split, epoch, step, int(position), batch) for position in positions]
        pieces = cut_batches(np.arange(len(draws)), self.settings.run.micro_batch_size)
        for piece in pieces:
            examples, weights, prompts, seeds = zip(*(draws[index] for index in piece), strict=True)
            ends_step = is_last and piece is pieces[-1]
            yield MicroBatch(split, epoch, step, ends_step, len(batch), examples, weights, prompts, seeds)

    def _draw(self, split: str, epoch: int, step: int, position: int, batch: np.ndarray) -> tuple[int, int, str, int]:
        """Return example, weight, prompt and augmentation seed at a position. Positions after the batch are padding."""
        example = int(batch[position % len(batch)])
        is_training = split == "train"
        seeds = (epoch, step, position) if is_training else (_EVALUATION, example, 0)
        rng = np.random.default_rng([self.settings.seed, *seeds])
        prompt = choose_prompt(self.records[example], self.settings.data, rng if is_training else None)
        return example, int(position < len(batch)), prompt, int(rng.integers(2**31))


def cut_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut an order into the fewest batches of at most batch_size examples, with sizes that differ by at most 1.

    A last batch of only one example would harm batch norms.
    """
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def draw_order(
    records: Sequence[Record],
    train: np.ndarray,
    settings: TrainSettings,
    epoch: int,
    are_negative: Sequence[bool] | None = None,
) -> np.ndarray:
    """Return the examples of an epoch in random order, as many as there are train examples.

    With data.sampling=proportional, each example comes once. Otherwise each dataset gets its share of the epoch. If the
    share is larger than the dataset, its examples repeat in another order, but only after all of them were used.

    data.negatives is the share of negative examples: of the whole epoch if data.sampling=proportional, else of the part
    of each dataset that has both kinds. The part of a dataset with one kind is of this kind.

    Args:
        records: all records.
        train: (N,) positions of the train examples.
        settings: settings of the run.
        epoch: number of the epoch, from 0.
        are_negative: as in `ExampleOrder`.

    Raises:
        ConfigError: the weights of the datasets add to nothing.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    sampling, share = settings.data.sampling, settings.data.negatives
    negative = np.array([one.is_negative for one in records] if are_negative is None else are_negative, bool)
    if sampling == "proportional":
        return rng.permutation(train if share is None else _draw(train, len(train), negative, share, rng))
    names = [records[number].dataset for number in train]
    weights = weigh_datasets(names, sampling)
    sums = np.cumsum(list(weights.values()))
    bounds = np.round(sums / sums[-1] * len(train)).astype(int)
    drawn = []
    for name, count in zip(weights, np.diff(bounds, prepend=0), strict=True):
        members = train[np.array(names) == name]
        drawn.append(_draw(members, count, negative, share, rng))
    return rng.permutation(np.concatenate(drawn))


def _draw(
    members: np.ndarray, count: int, negative: np.ndarray, share: float | None, rng: np.random.Generator
) -> np.ndarray:
    """Return `count` of some examples, in rounds of all of them, with a share of negative ones; None: as they are."""
    kinds = members[negative[members]], members[~negative[members]]
    if share is None or not all(map(len, kinds)):
        groups = [(members, count)]
    else:
        num_negative = round(share * count)
        groups = [(kinds[0], num_negative), (kinds[1], count - num_negative)]
    drawn = [
        np.concatenate([*(rng.permutation(group) for _ in range(-(-number // len(group)))), group[:0]])[:number]
        for group, number in groups
    ]
    return np.concatenate(drawn)


def weigh_datasets(names: Iterable[str], sampling: Literal["uniform"] | dict[str, float]) -> dict[str, float]:
    """Return the weight of each dataset in an epoch.

    Args:
        names: datasets that have train examples; repetitions count once.
        sampling: data.sampling. A dataset without a weight has the weight 0.

    Raises:
        ConfigError: the weights add to nothing.
    """
    weights = {name: 1.0 if sampling == "uniform" else dict(sampling).get(name, 0.0) for name in dict.fromkeys(names)}
    if not sum(weights.values()) > 0:
        raise ConfigError(
            f"data.sampling={sampling} gives no weight to a dataset with train records; these are "
            f"{', '.join(weights) or 'none'}; give one of them a weight above 0"
        )
    return weights


def choose_prompt(record: Record, settings: DataSettings, rng: np.random.Generator | None) -> str:
    """Return the prompt for one use of an example.

    Args:
        record: record of the example.
        settings: data.prompt is used. A kind, such as p1, draws one of its alternatives; "random" draws a kind other
            than p0, then one of its texts that are not empty, as MedVLSM does; "text:WORDS" gives WORDS.
        rng: generator for the draw; None takes the first text.

    Raises:
        ManifestError: the record has no such prompt.
    """
    choice = settings.prompt if isinstance(settings.prompt, str) else settings.prompt.get(record.dataset, "p1")
    texts = find_texts(record, choice, "data.prompt")
    if choice == "random" and rng is not None:
        kinds = [kind_texts for kind in record.prompts if (kind_texts := _random_texts(record, kind))]
        texts = kinds[int(rng.integers(len(kinds)))]
    return texts[0 if rng is None else int(rng.integers(len(texts)))]


def find_prompt(record: Record, choice: str, stored: str, setting: str) -> str:
    """Return the prompt with which a model's mask of a record is judged.

    Args:
        record: record of the example.
        choice: "record" for the record's own prompt (`Record.prompt`), or `stored` where it has none; "own" for
            `stored`; else as for `find_texts`, of which the first text is taken.
        stored: the prompt that is stored in the model's checkpoint.
        setting: name of the setting, for the error message.

    Raises:
        ManifestError: the record has no such text.
    """
    if choice == OWN or (choice == RECORD and record.prompt is None):
        return stored
    return str(record.prompt) if choice == RECORD else find_texts(record, choice, setting)[0]


def find_texts(record: Record, choice: str, setting: str) -> list[str]:
    """Return the texts of a record that match a choice of prompt, at least one.

    Args:
        record: record of the example.
        choice: a kind of prompt, "random" or "text:WORDS", as in data.prompt.
        setting: name of the setting, for the error message.

    Raises:
        ManifestError: the record has no such text.
    """
    if choice.startswith("text:"):
        return [choice.removeprefix("text:").strip()]
    if choice == "random":
        texts = [text for kind in record.prompts for text in _random_texts(record, kind)]
    else:
        texts = list(record.prompts.get(choice, ()))
    if not texts and not record.has_words:
        raise ManifestError(
            f"dataset {record.dataset}, {record.where}: there is no prompt; "
            f"--set data.prompts.{record.dataset}=WORDS gives the dataset one"
        )
    if not texts:
        raise ManifestError(
            f"dataset {record.dataset}, {record.where}: there is no prompt for {setting}={choice}; it has "
            f"{', '.join(record.prompts) or 'none'}; text:WORDS works for every record"
        )
    return texts


def _random_texts(record: Record, kind: str) -> list[str]:
    """Return the texts of a kind of prompt that "random" may draw."""
    return [] if kind == "p0" else [text for text in record.prompts[kind] if text]
