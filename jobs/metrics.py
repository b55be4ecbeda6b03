"""The Prometheus metrics of a segment run: amount and speed of its work. Ray adds the prefix ray_ to each name.

The counters count work: a repeated shard counts twice. `jobs.status` and `jobs.verify` report the stored results.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """Definition of one Ray metric: `tags` are its label names, `boundaries` the buckets of a histogram in seconds."""

    kind: Literal["Counter", "Gauge", "Histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

METRICS = {
    # set by the driver, for the whole run
    "vlsm_planned_images": Metric("Gauge", "images in the run, as far as they are known", ("output",)),
    "vlsm_done_images": Metric("Gauge", "images whose rows are written, including those of earlier runs", ("output",)),
    "vlsm_failed_images": Metric("Gauge", "failed images among the done images", ("output",)),
    # set by tasks and actors, on any node
    "vlsm_written_images": Metric("Counter", "images whose rows this cluster has written", ("status",)),
    "vlsm_written_parts": Metric("Counter", "part files this cluster has written"),
    "vlsm_segmented_images": Metric("Counter", "images, or windows of large images, segmented by a pool", ("pool",)),
    "vlsm_batch_seconds": Metric("Histogram", "seconds of one batch in the models of a pool", ("pool",), _SECONDS),
    "vlsm_stage_seconds": Metric("Histogram", "seconds of one shard in a stage", ("stage",), _SECONDS),
}


def count(name: str, value: float, **tags: str) -> None:
    """Add a value to a counter. It takes microseconds and needs no network."""
    if value > 0:
        _metric(name).inc(value, tags)


def show(name: str, value: float, **tags: str) -> None:
    """Set a gauge to a value."""
    _metric(name).set(value, tags)


def observe(name: str, value: float, **tags: str) -> None:
    """Add a value to a histogram."""
    _metric(name).observe(value, tags)


@functools.cache
def _metric(name: str) -> Any:
    """Return the Ray metric of this name. Each process creates it at first use, so that planning needs no Ray."""
    from ray.util import metrics

    metric = METRICS[name]
    options = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
    return getattr(metrics, metric.kind)(name, metric.description, tag_keys=metric.tags, **options)
