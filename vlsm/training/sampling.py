"""What a training sees, and when: a plan that follows from the seed alone, however often a run is taken up again.

An epoch is an order of examples, cut into the batches of its optimiser steps. Each worker takes its share of each
batch, in micro-batches that fit its memory. The number of workers changes neither the order nor the batches.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlsm.errors import ManifestError
from vlsm.training.datasets import Record
from vlsm.training.settings import DataSettings, TrainSettings

_EVALUATION = 2**31  # an epoch that no training reaches: what is drawn there is the same each time


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through one worker's model at once.

    Attributes:
        split: "train", "val" or "test".
        epoch: from 0.
        step: of the optimiser within the epoch, from 0; of evaluation within the split.
        ends_step: whether the optimiser moves after it; within evaluation, whether the split is through.
        batch_size: examples of the whole batch, over all workers.
        examples: numbers in the list of examples.
        weights: 1, or 0 where an example only fills up a share so that all workers' shares are of one length.
        prompts: one per example.
        seeds: of each example's augmentation.
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
    """The micro-batches of one worker.

    Args:
        records: the examples.
        settings: of the run.
        rank: of the worker, from 0.
        num_workers: how many there are.
    """

    def __init__(self, records: Sequence[Record], settings: TrainSettings, rank: int = 0, num_workers: int = 1) -> None:
        self.records, self.settings = records, settings
        self.rank, self.num_workers = rank, num_workers
        self._by_split = {
            split: np.array([number for number, record in enumerate(records) if record.split == split], int)
            for split in ("train", "val", "test")
        }

    @functools.cached_property
    def num_steps(self) -> int:
        """Optimiser steps of an epoch."""
        return len(cut_batches(self._by_split["train"], self.settings.optim.batch_size))

    def train(self, epoch: int, first_step: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch from a step on."""
        order = draw_order(self.records, self._by_split["train"], self.settings, epoch)
        batches = cut_batches(order, self.settings.optim.batch_size)
        for step in range(first_step, len(batches)):
            yield from self._share("train", epoch, step, batches[step], is_last=True)

    def evaluate(self, split: Literal["val", "test"], epoch: int) -> Iterator[MicroBatch]:
        """The micro-batches of a split, each example once over all workers."""
        batches = cut_batches(self._by_split[split], self.settings.run.micro_batch_size * self.num_workers)
        for step, batch in enumerate(batches):
            yield from self._share(split, epoch, step, batch, is_last=step == len(batches) - 1)

    def _share(
        self, split: Literal["train", "val", "test"], epoch: int, step: int, batch: np.ndarray, is_last: bool
    ) -> Iterator[MicroBatch]:
        places = np.arange(self.rank, -(-len(batch) // self.num_workers) * self.num_workers, self.num_workers)
        draws = [self._draw(split, epoch, step, int(place), batch) for place in places]
        pieces = cut_batches(np.arange(len(draws)), self.settings.run.micro_batch_size)
        for piece in pieces:
            examples, weights, prompts, seeds = zip(*(draws[index] for index in piece), strict=True)
            ends = is_last and piece is pieces[-1]
            yield MicroBatch(split, epoch, step, ends, len(batch), examples, weights, prompts, seeds)

    def _draw(self, split: str, epoch: int, step: int, place: int, batch: np.ndarray) -> tuple[int, int, str, int]:
        example = int(batch[place % len(batch)])
        training = split == "train"
        source = (epoch, step, place) if training else (_EVALUATION, example, 0)
        rng = np.random.default_rng([self.settings.seed, *source])
        prompt = choose_prompt(self.records[example], self.settings.data, rng if training else None)
        return example, int(place < len(batch)), prompt, int(rng.integers(2**31))


def cut_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """As few batches of batch_size at most as there can be, even in size: batch norms suffer from a last one of one."""
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def draw_order(records: Sequence[Record], train: np.ndarray, settings: TrainSettings, epoch: int) -> np.ndarray:
    """The examples of an epoch: as many as there are; with sampling other than proportional, of each dataset its share.

    A dataset that is to give more than it has is gone through again in another order; none repeats before that.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    sampling = settings.data.sampling
    if sampling == "proportional":
        return rng.permutation(train)
    names = [records[number].dataset for number in train]
    datasets = list(dict.fromkeys(names))
    weights = np.array([1.0 if sampling == "uniform" else dict(sampling).get(name, 0.0) for name in datasets])
    bounds = np.round(np.cumsum(weights) / weights.sum() * len(train)).astype(int)
    drawn = []
    for name, count in zip(datasets, np.diff(bounds, prepend=0), strict=True):
        own = train[np.array(names) == name]
        rounds = [rng.permutation(own) for _ in range(-(-count // len(own)))]
        drawn.append(np.concatenate([*rounds, own[:0]])[:count])
    return rng.permutation(np.concatenate(drawn))


def choose_prompt(record: Record, settings: DataSettings, rng: np.random.Generator | None) -> str:
    """The prompt of one use of an example.

    Args:
        record: of the example.
        settings: data.prompt of the dataset: a kind, of which one alternative is drawn; "random", any text of any kind
            but p0 and empty ones; "text:WORDS".
        rng: to draw with; without, the first is taken.

    Raises:
        ManifestError: the record has no such prompt.
    """
    choice = settings.prompt if isinstance(settings.prompt, str) else settings.prompt.get(record.dataset, "p1")
    texts = find_texts(record, choice, "data.prompt")
    return texts[0 if rng is None else int(rng.integers(len(texts)))]


def find_texts(record: Record, choice: str, setting: str) -> list[str]:
    """The texts that a choice as of data.prompt leaves for a record, one at least.

    Args:
        record: of the example.
        choice: a kind of prompt, "random" or "text:WORDS".
        setting: what messages call it.

    Raises:
        ManifestError: there are none.
    """
    if choice.startswith("text:"):
        return [choice.removeprefix("text:").strip()]
    if choice == "random":
        texts = [text for kind, own in record.prompts.items() if kind != "p0" for text in own if text]
    else:
        texts = list(record.prompts.get(choice, ()))
    if not texts:
        raise ManifestError(
            f"dataset {record.dataset}, {record.where}: there is no prompt for {setting}={choice}; it has "
            f"{', '.join(record.prompts) or 'none'}, and text:WORDS needs none"
        )
    return texts
