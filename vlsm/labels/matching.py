"""Finds the images of a run that reviews are about.

The rule, the first that fits:

1. The tool has kept the image itself: its location and its selector.
2. The name of a mask file is that of our own export, whatever the ending of the picture: it tells the image and the
   prompt.
3. The name equals the id, the location, or the exported name of one image of the run.
4. Part by part from the right, and without the text behind the last dot, one of both names is the end of the other:
   `b/a.png` fits `scans/b/a.jpg`, but not `ab/a.png`. The more parts they share, the better.

If several images fit equally well, or several reviews fit one image, nobody knows which is meant: they are refused.
"""

import itertools
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlsm.export.coco_names import FileNames
from vlsm.export.naming import relative_path
from vlsm.export.origins import read_settings
from vlsm.images.formats import kind_of
from vlsm.labels.reviews import Key, Review
from vlsm.runs.results import read_rows

Row = dict[str, Any]
Name = tuple[str, ...]
_PICTURES = ("image", "tiff")  # kinds of files whose pixels lie as in our own; those of a volume may not
_SHOWN = 2  # images that a message names


@dataclass(frozen=True)
class Match:
    """A review of an image of a run.

    Attributes:
        review: the review.
        prompt: the prompt of a mask file; None if the review is about all prompts.
    """

    review: Review
    prompt: str | None


@dataclass
class Matches:
    """The result of `match_reviews`.

    Attributes:
        by_image: reviews by the image_uri and the selector of their image.
        problems: reviews that fit no image, or that are ambiguous, with the reason.
    """

    by_image: dict[Key, list[Match]] = field(default_factory=dict)
    problems: list[tuple[Review, str]] = field(default_factory=list)


@dataclass
class _Best:
    """The images that fit a review best."""

    rank: tuple[int, int] = (0, 0)
    images: dict[tuple[Key, str | None], str] = field(default_factory=dict)  # with their ids

    def offer(self, rank: tuple[int, int], image: tuple[Key, str | None], image_id: str) -> None:
        if rank > self.rank:
            self.rank, self.images = rank, {}
        if rank == self.rank and len(self.images) <= _SHOWN:
            self.images[image] = image_id


def match_reviews(reviews: Sequence[Review], output: str) -> Matches:
    """Return the images of a run that reviews are about. The names of the run's images are read once, one by one.

    Args:
        reviews: the reviews of one file.
        output: OUTPUT of the run.

    Raises:
        ConfigError: OUTPUT has no masks.
    """
    index = _Index(reviews)
    for rows, file_name in _images(output):
        index.offer(rows, file_name)
    return _settle(reviews, index.best)


class _Index:
    """Reviews by what may name their images.

    Args:
        reviews: the reviews.

    Attributes:
        best: the images that fit each review best.
    """

    def __init__(self, reviews: Sequence[Review]) -> None:
        self._reviews, self.best = reviews, [_Best() for _ in reviews]
        self._names = [[_split(name) for name in review.names] for review in reviews]
        self._by_path: dict[str, list[int]] = defaultdict(list)
        self._by_stem: dict[str, set[int]] = defaultdict(set)
        self._by_key: dict[Key, set[int]] = defaultdict(set)
        for number, review in enumerate(reviews):
            for name in self._names[number]:
                self._by_stem[name[-1]].add(number)
            if review.key is not None:
                self._by_key[review.key].add(number)
            if review.is_mask_file and kind_of(review.names[0]) in _PICTURES:  # a program may write another format
                self._by_path[posixpath.splitext(review.names[0])[0]].append(number)

    def offer(self, rows: list[Row], file_name: str) -> None:
        """Note an image for the reviews that it fits.

        Args:
            rows: the rows of its masks.
            file_name: its name in exports.
        """
        row = rows[0]
        key = (row["image_uri"], row["selector"])
        for number in self._by_key.get(key, ()):
            self.best[number].offer((4, 0), (key, None), row["image_id"])
        for each in rows:
            for number in self._by_path.get(posixpath.splitext(relative_path(each, ".png"))[0], ()):
                self.best[number].offer((3, 0), (key, each["prompt"]), row["image_id"])
        texts = {row["image_id"], file_name, relative_path(row | {"prompt": "", "kind": ""}, "")}
        texts |= {row["image_uri"]} if row["selector"] is None else set()
        known = {_split(text) for text in texts}
        for number in {number for name in known for number in self._by_stem.get(name[-1], ())}:
            shared = max(_count_shared(one, name) for one in self._names[number] for name in known)
            if not texts.isdisjoint(self._reviews[number].names):
                self.best[number].offer((2, 0), (key, None), row["image_id"])
            elif shared:
                self.best[number].offer((1, shared), (key, None), row["image_id"])


def _settle(reviews: Sequence[Review], best: Sequence[_Best]) -> Matches:
    """Return the matches, without those that are ambiguous."""
    matches = Matches()
    claimed: dict[tuple[Key, str | None], list[int]] = defaultdict(list)
    for number, (review, found) in enumerate(zip(reviews, best, strict=True)):
        if len(found.images) == 1:
            claimed[next(iter(found.images))].append(number)
        elif found.images:
            ids = " and ".join(repr(image_id) for image_id in list(found.images.values())[:_SHOWN])
            matches.problems.append((review, f"{review.where}: {review.names[0]!r} fits several images: {ids}"))
        else:
            matches.problems.append((review, f"{review.where}: no image of the run is named {_first(review)!r}"))
    for (key, prompt), numbers in claimed.items():
        if len(numbers) == 1:
            matches.by_image.setdefault(key, []).append(Match(reviews[numbers[0]], prompt))
        else:
            places = " and ".join(reviews[number].where for number in numbers[:_SHOWN])
            about = f"{places} are about the same image; only one can count"
            matches.problems += [(reviews[number], about) for number in numbers]
    return matches


def _first(review: Review) -> str:
    return review.names[0] if review.names else ""


def _images(output: str) -> Iterator[tuple[list[Row], str]]:
    """Yield the rows of the masks of each image, failed ones too, and its name in exports."""
    names = FileNames((row["image_uri"] for row in read_rows(output, None, ["image_uri"])), read_settings(output).input)
    columns = ["image_id", "image_uri", "selector", "prompt", "kind"]
    rows = read_rows(output, [("kind", "==", "mask")], columns)
    for (uri, selector), image_rows in itertools.groupby(rows, key=lambda row: (row["image_uri"], row["selector"])):
        yield list(image_rows), names.name(uri, selector).removeprefix("./")


def _split(name: str) -> Name:
    """Return the parts of a name or location, the last one without the text behind its last dot."""
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", name).replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return (*parts[:-1], posixpath.splitext(parts[-1])[0]) if parts else ("",)


def _count_shared(one: Name, other: Name) -> int:
    """Return how many parts two names share if one of them is the end of the other, else 0."""
    length = min(len(one), len(other))
    return length if one[-length:] == other[-length:] else 0
