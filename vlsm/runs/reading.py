"""Reads the images of a run again, in the same way as the run."""

from collections.abc import Sequence
from typing import Any

from vlsm import storage
from vlsm.config import RunSettings, SegmentSettings
from vlsm.datasets.settings import READING
from vlsm.errors import ResultError
from vlsm.images.reader import Reader
from vlsm.runs.locations import Locations
from vlsm.runs.record import settings_of

_READING = (
    "columns",
    "fields",
    "slices",
    "frames",
    "window",
    "max_pixels",
    "max_image_bytes",
)  # settings that change the decoded image
SHORT_WAIT = RunSettings(outage_patience_s=storage.QUICK_S, image_timeout_s=30.0)


def open_reader(config: dict[str, Any], output: str, allow: Sequence[str]) -> Reader:
    """Return a reader that decodes images in the same way as the run, but waits only a short time for a store."""
    data = config.get("data", {})  # an evaluation has its settings of reading in this group
    if not isinstance(data, dict):
        raise ResultError("config.yaml is damaged: data is no group of settings")
    known = {name: config[name] for name in _READING if name in config}
    known |= {name: data[name] for name in READING if name in data}
    fixed = {"input": "", "output": "", "members": [{"checkpoint": ""}], "run": SHORT_WAIT}
    return Reader(settings_of(fixed | known, SegmentSettings), Locations(output, allow))
