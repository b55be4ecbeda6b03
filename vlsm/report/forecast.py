"""Forecast the time and cost of a run from a sample of its images, which this machine segments."""

import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError
from vlsm.runs.lifecycle import Member
from vlsm.segmentation.image_rows import describe_entry
from vlsm.segmentation.shard import Entry, ShardBatch, Unguarded, read_shard_images
from vlsm.words import count

_NODES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Forecast:
    """The measurements on a sample.

    Attributes:
        num_measured, num_failed: images in the sample, and images of the sample that cannot be read.
        read_s: seconds per image on one CPU to read, decode and resize it.
        model_s: seconds per image in all models, on one GPU, or on all CPUs if there is no GPU.
        write_s: seconds per image on one CPU to make its masks.
        num_cpus, num_gpus: of this machine.
    """

    num_measured: int
    num_failed: int
    read_s: float
    model_s: float
    write_s: float
    num_cpus: int
    num_gpus: int

    @property
    def seconds_per_image(self) -> float:
        """Seconds per image on one node like this machine.

        CPUs work in parallel with GPUs. Without a GPU, they also run the models.
        """
        cpu_s = (self.read_s + self.write_s) / self.num_cpus
        return max(cpu_s, self.model_s / self.num_gpus) if self.num_gpus else cpu_s + self.model_s


def keep_sample(rows: Iterable[dict[str, Any]], sample: list[dict[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """Yield all rows unchanged, and keep a random sample of them in a list.

    Every row has the same chance, although the number of rows is unknown (reservoir sampling).

    Args:
        rows: of the plan.
        sample: an empty list, which receives the sample while the rows are read.
        size: number of rows in the sample.
    """
    chance = random.Random(0)
    for number, row in enumerate(rows):
        if number < size:
            sample.append(row)
        elif (index := chance.randrange(number + 1)) < size:
            sample[index] = row
        yield row


def measure(settings: SegmentSettings, members: Sequence[Member], rows: Sequence[dict[str, Any]]) -> Forecast:
    """Segment a sample with the code of the job, and return only the measured times.

    Args:
        settings: the resolved settings of the run.
        members: the checkpoints of the run.
        rows: the rows of the sample, from the plan.

    Raises:
        ConfigError: none of the images can be read.
    """
    import torch

    from vlsm.segmentation.predictor import Predictor

    squares = [member.square for member in members]
    texts = [settings.texts_of(row["prompts"]) for row in rows]
    entries = [Entry(position, num_texts=sum(map(len, image_texts))) for position, image_texts in enumerate(texts)]
    settings = settings.model_copy(update={"decode": "cpu"})  # so that the reading is measured in one process
    started_s = time.perf_counter()
    batch = read_shard_images(ShardBatch(0, False, entries), rows, squares, settings, Unguarded())
    read_s = time.perf_counter() - started_s
    good = [entry for entry in batch.entries if entry.error is None]
    if not good:
        raise ConfigError(f"none of the {len(rows)} images of the sample can be read; a run needs readable images")
    predictor = Predictor(settings, {number: member.files for number, member in enumerate(members)})
    predictor.warm_up()
    predictor.check_probes()
    # before the measurement: this image makes the models encode its prompts and choose kernels
    first = min(good, key=lambda entry: entry.first_window)
    predictor.predict(replace(batch, entries=[replace(first, first_logit=0)]), [texts[first.position]], Unguarded())
    started_s = time.perf_counter()
    batch = predictor.predict(batch, texts, Unguarded())
    model_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    for entry in good:
        describe_entry(batch, entry, texts[entry.position], settings, squares)
    write_s = time.perf_counter() - started_s
    num_gpus = torch.cuda.device_count()
    seconds = read_s / len(rows), model_s / len(good), write_s / len(good)
    return Forecast(len(rows), len(rows) - len(good), *seconds, len(os.sched_getaffinity(0)), num_gpus)


def describe_forecast(forecast: Forecast, num_images: int, node_price: float | None) -> list[str]:
    """Return lines for a person: the measurements, the forecast for the whole archive, and the assumptions.

    Args:
        forecast: measurements on a sample.
        num_images: number of images in the archive.
        node_price: price of one node like this machine per hour; None for no costs.
    """
    device = count(forecast.num_gpus, "GPU") if forecast.num_gpus else "no GPU"
    beside = "run in parallel with the models" if forecast.num_gpus else "share the CPUs with the models"
    lines = [
        f"measured on {count(forecast.num_measured, 'image')}, of which {forecast.num_failed:,} could not be read, "
        f"on this machine with {count(forecast.num_cpus, 'CPU')} and {device}:",
        f"  {forecast.read_s:.4f} s per image to read and decode it, {forecast.write_s:.4f} s to write it, on one CPU",
        f"  {forecast.model_s:.4f} s per image in the models, on {'one GPU' if forecast.num_gpus else 'all CPUs'}",
    ]
    for num_nodes in _NODES:
        hours = num_images * forecast.seconds_per_image / num_nodes / 3600
        time_taken = f"{hours:,.2f} hours" if hours >= 1 else f"{60 * hours:.2f} minutes"
        cost = hours * num_nodes * (node_price or 0)
        price = "" if node_price is None else f", costs {cost:,.2f}" if cost >= 1 else f", costs {cost:.4f}"
        rate = num_nodes / forecast.seconds_per_image
        lines.append(f"  {count(num_nodes, 'node')} like this one: {time_taken} at {rate:,.1f} images/s{price}")
    return [
        *lines,
        f"assumed: reading, decoding and writing {beside}, one task per CPU; speed grows in proportion to the nodes;",
        "  the store is fast enough; the other images are like the sample. The time to start the run and its nodes",
        "  and to count rows is not included",
    ]
