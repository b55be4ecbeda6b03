"""Match labelled records to the images of an existing segment run."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pyarrow.compute as pc

from vlsm import storage
from vlsm.datasets.records import Record
from vlsm.runs.results import open_results

logger = logging.getLogger("vlsm")


def match_images(name: str, output: str, records: Sequence[Record]) -> list[str | None]:
    """Return for each record the image_id of its image in a segment run, or None if the run has no such image.

    Images match by image_uri. The remaining images match by file name, if exactly one remaining image of the run and
    one remaining labelled image have that name. A log line counts images matched by file name and unmatched images.

    Args:
        name: name of the system, for log lines.
        output: OUTPUT of the segment run.
        records: all records to score.
    """
    columns = ["image_id", "image_uri"]
    is_plain_mask = pc.field("selector").is_null() & (pc.field("kind") == "mask")
    rows = open_results(output).to_table(columns=columns, filter=is_plain_mask).to_pylist()
    image_ids = {storage.absolute(row["image_uri"]): row["image_id"] for row in rows}
    uris = [storage.absolute(record.image_uri) for record in records]
    unmatched_uris = {uri for uri in uris if uri not in image_ids}
    unmatched_run_uris = image_ids.keys() - set(uris)
    run_uris_by_name = _group_by_name(unmatched_run_uris)
    matches = {
        same_name[0]: run_uris_by_name[file_name][0]
        for file_name, same_name in _group_by_name(unmatched_uris).items()
        if len(same_name) == len(run_uris_by_name.get(file_name, ())) == 1
    }
    num_missing, num_others = len(unmatched_uris) - len(matches), len(unmatched_run_uris) - len(matches)
    logger.info(
        "masks %s: the segment run has %d of %d labelled images, %d of them matched by file name; %d are missing; "
        "%d images of the run have no label and are not scored",
        *(name, len(set(uris)) - num_missing, len(set(uris)), len(matches), num_missing, num_others),
    )
    return [image_ids.get(matches.get(uri, uri)) for uri in uris]


def _group_by_name(uris: Iterable[str]) -> dict[str, list[str]]:
    """Return the URIs in sorted order, grouped by their file name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for uri in sorted(uris):
        groups[uri.rsplit("/", 1)[-1]].append(uri)
    return groups
