"""Chooses images: a random share of all of them, and others by uncertainty, odd area and diversity."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlsm.errors import ConfigError, ResultError
from vlsm.select.candidates import Candidates
from vlsm.select.looks import Looks, Vector
from vlsm.words import count

REASONS = {"uncertainty": "uncertain", "area": "odd area", "diversity": "diverse"}  # by the word for --by
RANDOM = "random"
_SCORES = {"uncertainty": "uncertainty", "area": "odd_area"}
# diverse images are chosen among the best by the other scores, ten for each one that is wanted: this bounds the memory
_POOL, _MOST_POOL = 10, 50_000


@dataclass(frozen=True)
class Choice:
    """A chosen image: its number among the candidates, why it was chosen, and its distance.

    The distance is 1 minus the cosine to the most similar image that was chosen before or is labelled: 0 is equal.
    None without the criterion diversity, and for the first image.
    """

    index: int
    why: str
    distance: float | None = None


@dataclass(frozen=True)
class Wish:
    """What is to be chosen.

    Attributes:
        number: number of images.
        by: criteria, of REASONS.
        per_group: most images of one group; None for no limit. An image without a group counts alone.
        random_share: share of the images that are chosen at random among all candidates, from 0 to 1.
        seed: of the random numbers.
    """

    number: int
    by: tuple[str, ...] = ("uncertainty", "diversity")
    per_group: int | None = None
    random_share: float = 0.0
    seed: int = 0


def choose(candidates: Candidates, wish: Wish, looks: Looks) -> list[Choice]:
    """Return the chosen images, the first to be labelled first. Equal arguments give equal choices.

    Random images are drawn first, from all candidates, so that they are a fair sample. They stand evenly between the
    others: whoever stops early has the same share of them.

    Raises:
        ConfigError: there are fewer images than wanted, or no row has a score.
    """
    room, generator = _Room(candidates, wish.per_group), np.random.default_rng(wish.seed)
    if wish.number > candidates.num_images:
        raise ConfigError(f"--count is {wish.number:,}, but only {_choosable(candidates)}")
    _, firsts = np.unique(candidates.image, return_index=True)
    shuffled = generator.permutation(firsts)
    num_random = round(wish.number * wish.random_share)
    control = [Choice(int(index), RANDOM) for index in room.fill(shuffled, num_random)]
    others: list[Choice] = []
    if len(control) < wish.number:
        others = list(_choose_others(candidates, wish, looks, room, (shuffled, control)))
    if (found := len(control) + len(others)) < wish.number:
        limit = "" if wish.per_group is None else f" with at most {wish.per_group:,} per group"
        raise ConfigError(f"--count is {wish.number:,}, but only {found:,} images can be chosen{limit}")
    return _mix(control, others)


def _choosable(candidates: Candidates) -> str:
    images = candidates.images
    out = [(images[name], name) for name in ("failed", "vanished", "labelled") if images[name]]
    more = f" ({', '.join(f'{number:,} {name}' for number, name in out)} besides)" if out else ""
    return f"{count(candidates.num_images, 'image')} can be chosen{more}"


class _Room:
    """Which images may still be chosen: each image once, and no more of a group than its limit."""

    def __init__(self, candidates: Candidates, per_group: int | None) -> None:
        self._image, self._group, self._per_group = candidates.image, candidates.group, per_group
        self._images: set[int] = set()
        self._groups = Counter[int]()

    def left(self, index: int) -> int | None:
        """Return how many images the group of a candidate has room for; None: any number."""
        group = int(self._group[index])
        return None if self._per_group is None or group == 0 else self._per_group - self._groups[group]

    def has(self, index: int) -> bool:
        """Return whether the image of a candidate was chosen."""
        return int(self._image[index]) in self._images

    def take(self, index: int) -> bool:
        """Choose a candidate, if it may be chosen. Return whether it may."""
        if self.has(index) or self.left(index) == 0:
            return False
        self._images.add(int(self._image[index]))
        self._groups[int(self._group[index])] += 1
        return True

    def fill(self, order: npt.NDArray[np.int64], number: int) -> Iterator[int]:
        """Choose the first `number` candidates of an order that may be chosen, and yield them."""
        for index in map(int, order):
            if number <= 0:
                return
            if self.take(index):
                number -= 1
                yield index


def _choose_others(
    candidates: Candidates,
    wish: Wish,
    looks: Looks,
    room: _Room,
    drawn: tuple[npt.NDArray[np.int64], Sequence[Choice]],
) -> Iterator[Choice]:
    """Yield the images that are not random, the best first. `drawn`: all images in random order, and the control."""
    shuffled, control = drawn
    number = wish.number - len(control)
    criteria = [name for name in wish.by if name in _SCORES]
    orders = [_rank(candidates, name) for name in criteria] or [shuffled]
    reasons = [REASONS[name] for name in criteria]
    if "diversity" not in wish.by:
        picked = ((index, reasons[turn]) for index, turn in _take_turns(orders) if room.take(index))
        yield from (Choice(index, why) for index, why in itertools.islice(picked, number))
        return
    factor = max(1, min(_POOL, _MOST_POOL // number))
    pool, vectors = _read_pool(candidates, orders, (factor, number), room, looks)
    places = [candidates.place_of_image(choice.index) for choice in control]
    known = looks.read([*places, *candidates.labelled[: factor * number]])
    looks.report()
    known_vectors = [vector for vector in known if vector is not None]
    taken = _spread(vectors, known_vectors, lambda position: room.take(pool[position][0]))
    for position, distance in itertools.islice(taken, number):
        index, turn = pool[position]
        why = [reasons[turn]] if criteria else []
        yield Choice(index, ", ".join([*why, REASONS["diversity"]]), distance)


def _rank(candidates: Candidates, criterion: str) -> npt.NDArray[np.int64]:
    """Return the candidates that have a score, the highest first; equal ones stay in the order of the run."""
    scores = candidates.scores[_SCORES[criterion]]
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    if not len(order):
        columns = "confidence, max_probability or agreement" if criterion == "uncertainty" else "area_fraction"
        raise ConfigError(f"--by {criterion} needs the column {columns}, but no row of OUTPUT has a value there")
    return order


def _take_turns(orders: Sequence[npt.NDArray[np.int64]]) -> Iterator[tuple[int, int]]:
    """Yield the candidates of some orders, with the number of the order: each takes its first that is left, in turn."""
    if len(orders) == 1:
        yield from ((int(index), 0) for index in orders[0])
        return
    taken: set[int] = set()

    def rest(order: npt.NDArray[np.int64], turn: int) -> Iterator[tuple[int, int]]:
        for index in map(int, order):
            if index not in taken:
                taken.add(index)
                yield index, turn

    waiting = [rest(order, turn) for turn, order in enumerate(orders)]
    while waiting:
        found = [(each, next(each, None)) for each in waiting]
        yield from (pair for _, pair in found if pair is not None)
        waiting = [each for each, pair in found if pair is not None]


def _read_pool(
    candidates: Candidates, orders: Sequence[npt.NDArray[np.int64]], size: tuple[int, int], room: _Room, looks: Looks
) -> tuple[list[tuple[int, int]], list[Vector]]:
    """Return the first candidates of some orders, as `_take_turns` does, one per image, and their vectors.

    `size`: the pool has so many times as many candidates as are wanted. A group has at most so many times the images
    that it has room for. So the wanted number can be chosen from the pool if it can be chosen at all.

    Raises:
        ResultError: more than half of them have no vector.
    """
    factor, number = size
    useless: set[int] = set()
    while True:
        pool = list(itertools.islice(_admit(candidates, orders, factor, room, useless), factor * number))
        vectors = looks.read([candidates.place_of_image(index) for index, _ in pool])
        pairs = zip(pool, vectors, strict=True)
        lost = {int(candidates.image[index]) for (index, _), vector in pairs if vector is None}
        if not lost:
            return pool, [vector for vector in vectors if vector is not None]
        if 2 * len(lost) > len(pool):
            looks.report()
            raise ResultError(
                f"{len(lost):,} of {count(len(pool), 'image')} cannot be compared, as --by diversity must"
            )
        useless |= lost


def _admit(
    candidates: Candidates, orders: Sequence[npt.NDArray[np.int64]], factor: int, room: _Room, useless: set[int]
) -> Iterator[tuple[int, int]]:
    """Yield the candidates that a pool takes, with the number of their order."""
    images, groups = set(useless), Counter[int]()
    for index, turn in _take_turns(orders):
        image, group, left = int(candidates.image[index]), int(candidates.group[index]), room.left(index)
        if image in images or room.has(index) or (left is not None and groups[group] >= factor * left):
            continue
        images.add(image)
        groups[group] += 1
        yield index, turn


def _spread(
    vectors: Sequence[Vector], known: Sequence[Vector], take: Callable[[int], bool]
) -> Iterator[tuple[int, float | None]]:
    """Yield the position of the vector that is farthest from all taken ones and from the known ones, again and again.

    Args:
        vectors: the candidates, of length 1. The first one is taken first if nothing is known.
        known: vectors of images that are labelled or chosen.
        take: returns whether the candidate at a position may be taken.

    Yields:
        Position, and 1 minus the cosine to the nearest one.

    Source: k-centre greedy, as in Sener and Savarese 2018, arXiv:1708.00489.
    """
    if not vectors:
        return
    matrix = np.stack(vectors).astype(np.float32)
    nearest = np.full(len(matrix), np.inf, np.float32)
    for vector in known:
        np.minimum(nearest, 1 - matrix @ vector.astype(np.float32), out=nearest)
    while (distance := float(nearest[position := int(nearest.argmax())])) > -np.inf:
        nearest[position] = -np.inf
        if take(position):
            yield position, None if np.isinf(distance) else max(0.0, distance)
            np.minimum(nearest, 1 - matrix @ matrix[position], out=nearest)


def _mix(control: list[Choice], others: list[Choice]) -> list[Choice]:
    """Return all choices, the random ones evenly between the others."""
    ranked = [
        ((number + 0.5) / len(group), choice) for group in (others, control) for number, choice in enumerate(group)
    ]
    return [choice for _, choice in sorted(ranked, key=lambda pair: pair[0])]
