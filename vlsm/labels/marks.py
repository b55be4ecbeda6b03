"""Reads the marks that a reviewer has made in the report of a run, as reviews.

- accept: the prediction is the mask of the example.
- redo: nothing is in the list for this mask; the log counts them.
- reject: no mask of the image is in the list.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator

from vlsm.errors import ConfigError
from vlsm.labels.reviews import Prediction, Review, Shape
from vlsm.runs.marks import ACCEPT, REDO, read_marks, rejected_images
from vlsm.runs.record import read_record
from vlsm.words import count

logger = logging.getLogger("vlsm")


def read_mark_reviews(uri: str, output: str) -> Iterator[list[Review]]:
    """Yield one group: a review for each image with a mark other than redo.

    Args:
        uri: a .csv or .json file that the report has saved.
        output: OUTPUT of the run.

    Raises:
        ConfigError: the file is none, or is about another run.
    """
    marks = read_marks(uri)
    run_id, known = marks["run_id"][0].as_py(), (read_record(output) or {}).get("run_id")
    if run_id != known:
        raise ConfigError(f"marks {uri!r} are of the segment run {run_id}; {output!r} has the run {known}")
    rejected = rejected_images(marks)
    accepted: dict[str, dict[str, str | None]] = defaultdict(dict)
    num_redo = 0
    for mark in marks.to_pylist():
        if mark["image_id"] in rejected:
            continue
        if mark["mark"] == ACCEPT:
            accepted[mark["image_id"]][mark["prompt"]] = mark["mask_digest"]
        num_redo += mark["mark"] == REDO
    if num_redo:
        logger.info("%s must be made again: not in the list", count(num_redo, "mask"))
    reviews = [Review(f"{uri}, {name!r}", (name,), is_rejected=True) for name in sorted(rejected)]
    for name, digests in accepted.items():
        shapes: dict[str, list[Shape]] = {prompt: [Prediction(digest)] for prompt, digest in digests.items()}
        reviews.append(Review(f"{uri}, {name!r}", (name,), shapes=shapes, prompts=tuple(shapes)))
    yield reviews
