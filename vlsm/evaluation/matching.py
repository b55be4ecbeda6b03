"""Match labelled records to the images of an existing segment run."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from vlsm import storage
from vlsm.datasets.records import Record
from vlsm.runs.results import read_rows
from vlsm.shown import public_uri

logger = logging.getLogger("vlsm")


Place = tuple[str, str | None]  # location and selector of an image


def match_images(name: str, output: str, records: Sequence[Record]) -> tuple[list[str | None], set[str]]:
    """Return for each record the image_id of its image in a segment run, or None; and all prompts of the run.

    Images match by image_uri and selector. The remaining images match by file name and selector, if exactly one
    remaining image of the run and one remaining labelled image have them. A log line counts images matched by file name
    and unmatched images.

    Args:
        name: name of the system, for log lines.
        output: OUTPUT of the segment run.
        records: all records to score.
    """
    columns = ["image_id", "image_uri", "selector", "prompt"]
    prompts, image_ids = set[str](), dict[Place, str]()
    for row in read_rows(output, [("kind", "==", "mask")], columns):
        prompts.add(row["prompt"])
        image_ids[public_uri(storage.absolute(row["image_uri"])), row["selector"]] = row["image_id"]
    places = [(public_uri(storage.absolute(record.image_uri)), record.image_selector) for record in records]
    unmatched = {place for place in places if place not in image_ids}
    unmatched_in_run = image_ids.keys() - set(places)
    run_by_name = _group_by_name(unmatched_in_run)
    matches = {
        same_name[0]: run_by_name[key][0]
        for key, same_name in _group_by_name(unmatched).items()
        if len(same_name) == len(run_by_name.get(key, ())) == 1
    }
    num_missing, num_others = len(unmatched) - len(matches), len(unmatched_in_run) - len(matches)
    logger.info(
        "masks %s: the segment run has %d of %d labelled images, %d of them matched by file name; missing: %d; "
        "images of the run without a label, which are not scored: %d",
        *(name, len(set(places)) - num_missing, len(set(places)), len(matches), num_missing, num_others),
    )
    return [image_ids.get(matches.get(place, place)) for place in places], prompts


def _group_by_name(places: Iterable[Place]) -> dict[Place, list[Place]]:
    """Return the images grouped by their file name and selector."""
    groups: dict[Place, list[Place]] = defaultdict(list)
    for uri, selector in places:
        groups[uri.rsplit("/", 1)[-1], selector].append((uri, selector))
    return groups
