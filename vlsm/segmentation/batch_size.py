"""The number of images in one call of the models: on a GPU measured, on CPUs small, unless the user states it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FIRST_BATCH_SIZE = 8  # that is tried on a GPU
_LARGEST = 256
_MOST_ON_CPUS = 8
_LEAST_GAIN = 1.05  # a larger batch must be faster by this factor: it needs more memory, and delays its first image
_MOST_MEMORY = 0.8  # of the GPU; the rest is for making masks
_PROBE_S = 0.3


class Probe(NamedTuple):
    """The measurement of one batch size: images per second, and the used fraction of the device's memory."""

    images_per_s: float
    memory_fraction: float


def cpu_batch_size() -> int:
    """Return the batch size on CPUs: an image for two of torch's threads, at most 8.

    With two threads, UNet-D needs 0.53 s for an image alone and 0.61 s in a batch of 8; CLIPSeg needs the same. And
    the first image is done sooner.
    """
    return max(1, min(_MOST_ON_CPUS, torch.get_num_threads() // 2))


def choose_batch_size(measure: Callable[[int], Probe]) -> int:
    """Return the batch size: it doubles while the speed grows by more than 5 % and the memory suffices.

    Args:
        measure: measures one batch size; it may raise torch.OutOfMemoryError.

    Raises:
        torch.OutOfMemoryError: there is too little memory for a single image.
    """
    size = FIRST_BATCH_SIZE
    while (best := _try(measure, size)) is None:
        size //= 2
    if size < FIRST_BATCH_SIZE:
        return size
    while 2 * size <= _LARGEST:
        larger = _try(measure, 2 * size)
        if larger is None or larger.images_per_s <= _LEAST_GAIN * best.images_per_s:
            break
        size, best = 2 * size, larger
    return size


def _try(measure: Callable[[int], Probe], size: int) -> Probe | None:
    """Return the measurement, or None if the size needs too much memory."""
    try:
        probe = measure(size)
    except torch.OutOfMemoryError:
        if size == 1:
            raise
        return None
    return probe if size == 1 or probe.memory_fraction <= _MOST_MEMORY else None


def probe_gpu(run: Callable[[], None], num_images: int, device: torch.device, share: float = 1.0) -> Probe:
    """Measure a call on a GPU.

    Args:
        run: segments num_images images.
        num_images: their number.
        device: the GPU.
        share: the fraction of the GPU that this process may use.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    run()  # chooses kernels
    torch.cuda.synchronize(device)
    started_s, num_runs = time.monotonic(), 0
    while (taken_s := time.monotonic() - started_s) < _PROBE_S or not num_runs:
        run()
        torch.cuda.synchronize(device)
        num_runs += 1
    used = torch.cuda.max_memory_reserved(device) / (free_bytes * share)
    return Probe(num_images * num_runs / taken_s, used)
