"""What a segment run tells Prometheus through Ray, which puts ray_ before each name: how much is done, and how fast.

They count work: what is done twice counts twice. What is there is told by `jobs.status` and `jobs.verify`.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One of Ray's metrics; `tags` are what its values are told apart by, `boundaries` a histogram's, in seconds."""

    kind: Literal["Counter", "Gauge", "Histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

METRICS = {
    # of the driver, about the whole run
    "vlsm_planned_images": Metric("Gauge", "images of the run, as far as they are known", ("output",)),
    "vlsm_done_images": Metric("Gauge", "images whose rows are written, those of earlier runs too", ("output",)),
    "vlsm_failed_images": Metric("Gauge", "failed ones among them", ("output",)),
    # of tasks and actors, wherever they are
    "vlsm_written_images": Metric("Counter", "images whose rows this cluster has written", ("status",)),
    "vlsm_written_parts": Metric("Counter", "part files this cluster has written"),
    "vlsm_segmented_images": Metric("Counter", "images, or windows of large ones, through a pool's models", ("pool",)),
    "vlsm_batch_seconds": Metric("Histogram", "of one batch in a pool's models", ("pool",), _SECONDS),
    "vlsm_stage_seconds": Metric("Histogram", "of one shard in a stage", ("stage",), _SECONDS),
}


def count(name: str, value: float, **tags: str) -> None:
    """Add to a counter. It costs some microseconds and asks nobody."""
    if value > 0:
        _metric(name).inc(value, tags)


def show(name: str, value: float, **tags: str) -> None:
    """Let a gauge have a value."""
    _metric(name).set(value, tags)


def observe(name: str, value: float, **tags: str) -> None:
    """Add a value to a histogram."""
    _metric(name).observe(value, tags)


@functools.cache
def _metric(name: str) -> Any:
    """Ray's own object, one per process; made when it is first used, so that planning needs no Ray."""
    from ray.util import metrics

    metric = METRICS[name]
    options = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
    return getattr(metrics, metric.kind)(name, metric.description, tag_keys=metric.tags, **options)
