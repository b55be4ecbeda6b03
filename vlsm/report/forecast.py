"""How long a run would take and what it would cost, from a sample of its images that this machine segments."""

import contextlib
import itertools
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsm.config import SegmentSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.decode import resize_image
from vlsm.images.reader import open_images
from vlsm.runs.lifecycle import Member
from vlsm.segmentation.image_rows import describe_image
from vlsm.segmentation.masks import mirrored_mean
from vlsm.segmentation.tiles import check_windows, plan_windows

if TYPE_CHECKING:
    from vlsm.segmentation.segmenter import Segmenter

_NODES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Forecast:
    """What was measured.

    Attributes:
        num_measured, num_failed: images of the sample, and those of them that could not be read.
        read_s, write_s: seconds an image takes one CPU, to be read, decoded and resized, and to become masks.
        model_s: seconds it takes one GPU in all models, or where there is none all CPUs.
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
        """Of one node like this: CPUs work beside GPUs, and for the models as well where there are none."""
        cpu_s = (self.read_s + self.write_s) / self.num_cpus
        return max(cpu_s, self.model_s / self.num_gpus) if self.num_gpus else cpu_s + self.model_s


@dataclass
class _Image:
    row: dict[str, Any]
    size: tuple[int, int]  # height, width
    pixels: dict[int, np.ndarray]  # (windows, S, S, 3) uint8 for each S that a member takes


def keep_sample(rows: Iterable[dict[str, Any]], sample: list[dict[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """The rows as they are, so many of which are kept in the sample: each with the same chance, however many come."""
    chance = random.Random(0)
    for number, row in enumerate(rows):
        if number < size:
            sample.append(row)
        elif (place := chance.randrange(number + 1)) < size:
            sample[place] = row
        yield row


def measure(settings: SegmentSettings, members: Sequence[Member], rows: Sequence[dict[str, Any]]) -> Forecast:
    """Segment a sample and keep nothing but the time that it took.

    Args:
        settings: of the run, resolved.
        members: its checkpoints.
        rows: of the plan.

    Raises:
        ConfigError: none of the images can be read.
    """
    import torch

    started_s = time.perf_counter()
    images = _read(settings, rows, {member.image_size for member in members})
    read_s = time.perf_counter() - started_s
    if not images:
        raise ConfigError(f"none of the {len(rows)} images of the sample can be read; a run would fail")
    segmenters = _build(settings, members)
    _predict(settings, segmenters, images[: settings.run.batch_size])  # kernels are chosen, prompts encoded
    started_s = time.perf_counter()
    logits = _predict(settings, segmenters, images)
    model_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    for image, own in zip(images, logits, strict=True):
        list(describe_image(own, image.size, settings))
    write_s = time.perf_counter() - started_s
    num_gpus = torch.cuda.device_count()
    seconds = read_s / len(rows), model_s / len(images), write_s / len(images)
    return Forecast(len(rows), len(rows) - len(images), *seconds, len(os.sched_getaffinity(0)), num_gpus)


def _read(settings: SegmentSettings, rows: Sequence[dict[str, Any]], sizes: set[int]) -> list[_Image]:
    """As a task of a run does it."""
    images = []
    for number, read in open_images(rows, settings):
        with contextlib.suppress(ImageError):
            content, frame = read()
            pixels = content.decode(frame)
            size = pixels.shape[0], pixels.shape[1]
            check_windows(size, settings.tile, content.name)
            cuts = [window.cut(pixels) for window in plan_windows(size, settings.tile)]
            squares = {side: np.stack([resize_image(cut, side) for cut in cuts]) for side in sizes}
            images.append(_Image(rows[number], size, squares))
    return images


def _build(settings: SegmentSettings, members: Sequence[Member]) -> "list[tuple[Segmenter, int]]":
    """Each member's model on its device, and the side of its square."""
    from vlsm.checkpoints import build_checkpoint
    from vlsm.models.sharing import share_towers
    from vlsm.segmentation.segmenter import Segmenter

    built = [
        (
            Segmenter(build_checkpoint(member.files, own.checkpoint), batch_size=settings.run.batch_size),
            member.image_size,
        )
        for member, own in zip(members, settings.members, strict=True)
    ]
    share_towers([segmenter.model for segmenter, _ in built])
    return built


def _predict(
    settings: SegmentSettings, segmenters: "list[tuple[Segmenter, int]]", images: Sequence[_Image]
) -> list[list[list[np.ndarray]]]:
    """Of each image and prompt, each member's logits (texts, windows, S, S), batch by batch as a model actor does."""
    texts: list[list[tuple[str, ...]]] = [
        [settings.classes.get(prompt, (prompt,)) for prompt in image.row["prompts"]] for image in images
    ]
    counts = [len(next(iter(image.pixels.values()))) for image in images]
    places = [(index, window) for index, count in enumerate(counts) for window in range(count)]
    found: list[list[np.ndarray]] = [[] for _ in segmenters]  # of each member and place, (all texts, S, S)
    for start in range(0, len(places), settings.run.batch_size):
        batch = places[start : start + settings.run.batch_size]
        for (segmenter, side), own, logits in zip(segmenters, settings.members, found, strict=True):
            pixels = np.stack([images[index].pixels[side][window] for index, window in batch])
            told = [
                [own.prompts.get(text, text) for texts_of in texts[index] for text in texts_of] for index, _ in batch
            ]
            predicted = segmenter.predict_logits(pixels, told)
            if own.flip:
                flipped = segmenter.predict_logits(pixels[:, :, ::-1], told)
                predicted = list(map(mirrored_mean, predicted, flipped))
            logits += predicted
    joined = []
    for index, (start, end) in enumerate(itertools.pairwise(np.cumsum([0, *counts]).tolist())):
        whole = [np.stack(logits[start:end], axis=1) for logits in found]  # (all texts, windows, S, S)
        ends = np.cumsum([0, *map(len, texts[index])]).tolist()
        joined.append([[own[begin:stop] for own in whole] for begin, stop in itertools.pairwise(ends)])
    return joined


def describe_forecast(forecast: Forecast, num_images: int, node_price: float | None) -> list[str]:
    """The same for a person: what was measured, what follows for the whole archive, and what is assumed.

    Args:
        forecast: of a sample.
        num_images: of the archive.
        node_price: of one node like this, an hour.
    """
    device = f"{forecast.num_gpus} GPUs" if forecast.num_gpus else "no GPU"
    beside = "go on beside the models" if forecast.num_gpus else "share the CPUs with the models"
    lines = [
        f"measured on {forecast.num_measured:,} images, of which {forecast.num_failed:,} could not be read, "
        f"on this machine with {forecast.num_cpus} CPUs and {device}:",
        f"  {forecast.read_s:.4f} s an image to read and decode it, {forecast.write_s:.4f} s to write it, on one CPU",
        f"  {forecast.model_s:.4f} s in the models, on {'one GPU' if forecast.num_gpus else 'all CPUs'}",
    ]
    for num_nodes in _NODES:
        hours = num_images * forecast.seconds_per_image / num_nodes / 3600
        time_taken = f"{hours:,.2f} hours" if hours >= 1 else f"{60 * hours:.2f} minutes"
        cost = hours * num_nodes * (node_price or 0)
        price = "" if node_price is None else f", costs {cost:,.2f}" if cost >= 1 else f", costs {cost:.4f}"
        rate = num_nodes / forecast.seconds_per_image
        what = "node" if num_nodes == 1 else "nodes"
        lines.append(f"  {num_nodes} {what} like this one: {time_taken} at {rate:,.1f} images/s{price}")
    return [
        *lines,
        f"assumed: reading, decoding and writing {beside}, a task on each CPU; nodes add up;",
        "  the store keeps up; the other images are like these; starting run and nodes and counting rows are not in it",
    ]
