"""Records and the images of a segment run that knows nothing of them: which is which."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pyarrow.compute as pc

from vlsm import storage
from vlsm.runs.results import open_results
from vlsm.training.datasets import Record

logger = logging.getLogger("vlsm")


def match_images(name: str, output: str, records: Sequence[Record]) -> list[str | None]:
    """Of each record the image_id that its image has in a run, or None: by image_uri, else by the file's name.

    A file's name counts where, among the images and records that no image_uri has joined, it is that of just one image.
    What is joined by name alone, and what is not joined at all, is told.

    Args:
        name: of the system, for messages.
        output: of the segment run.
        records: all that are scored.
    """
    columns = ["image_id", "image_uri"]
    alone = pc.field("selector").is_null() & (pc.field("kind") == "mask")
    rows = open_results(output).to_table(columns=columns, filter=alone).to_pylist()
    images = {storage.absolute(row["image_uri"]): row["image_id"] for row in rows}
    uris = [storage.absolute(record.image_uri) for record in records]
    left = {uri for uri in uris if uri not in images}
    rest = images.keys() - set(uris)
    theirs, ours = _by_name(rest), _by_name(left)
    named = {own[0]: theirs[file][0] for file, own in ours.items() if len(own) == len(theirs.get(file, ())) == 1}
    num_missing, num_others = len(left) - len(named), len(rest) - len(named)
    logger.info(
        "masks %s: %d of %d labelled images are there, %d of them by their file's name; %d are not; "
        "%d images of the run are none of them and are not scored",
        *(name, len(set(uris)) - num_missing, len(set(uris)), len(named), num_missing, num_others),
    )
    return [images.get(named.get(uri, uri)) for uri in uris]


def _by_name(uris: Iterable[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for uri in sorted(uris):
        names[uri.rsplit("/", 1)[-1]].append(uri)
    return names
