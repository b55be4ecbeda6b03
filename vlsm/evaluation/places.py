"""Which places the lists may name that evaluations and sweeps write themselves; `vlsm.archive.places` has the rule.

Such a list lies in OUTPUT and names the images of the datasets. If OUTPUT is on this machine, it may name every place.
Otherwise it needs permission for the places of the datasets. No record of a dataset in a store adds a place.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

from vlsm import storage
from vlsm.config import SegmentSettings
from vlsm.datasets.records import Record
from vlsm.evaluation.settings import EvaluateSettings
from vlsm.locations import LOCAL, lies_in, own_place
from vlsm.training.settings import TrainSettings

JobSettings = TypeVar("JobSettings", SegmentSettings, TrainSettings, EvaluateSettings)


def allow_places(settings: JobSettings, places: Iterable[str]) -> JobSettings:
    """Return the settings of a job with more places in `run.allow`."""
    run = settings.run.model_copy(update={"allow": tuple(dict.fromkeys((*settings.run.allow, *places)))})
    return settings.model_copy(update={"run": run})


def places_of(datasets: Iterable[str]) -> list[str]:
    """Return the own place of each dataset: its bucket or host, or its folder on this machine."""
    return list(dict.fromkeys(map(_place_of, datasets)))


def _place_of(uri: str) -> str:
    if not _is_local(uri):
        return own_place(uri)
    return uri if os.path.isdir(uri) else os.path.dirname(uri)


def allow_images(segment: SegmentSettings, records: Iterable[Record], datasets: Iterable[str]) -> SegmentSettings:
    """Return the settings of a segment run with permission for the places that its manifest in OUTPUT names.

    A dataset on this machine may name every place, so the folders of its images are added.

    Args:
        segment: settings of the run.
        records: records that may be named: `read_dataset` has checked their places.
        datasets: locations of the datasets.
    """
    if _is_local(segment.input):
        return segment
    segment = allow_places(segment, [own_place(uri) for uri in datasets if not _is_local(uri)])
    places = segment.run.allow
    uris = [record.image_uri for record in records]
    folders = {uri.rpartition("/")[0] for uri in uris if not any(lies_in(uri, place) for place in places)}
    return allow_places(segment, sorted(folders))


def _is_local(uri: str) -> bool:
    return storage.split_scheme(uri)[0] in LOCAL
