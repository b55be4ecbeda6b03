"""Micro-batches on their way to the device: a thread copies the next one while the model works on this one."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vlsm.training.sampling import MicroBatch


def stage(
    loaded: Iterator[tuple[MicroBatch, np.ndarray, np.ndarray]], device: torch.device
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Yield micro-batches with their arrays as tensors on the device, in the same order.

    Arrays for a GPU are copied to pinned memory and from there on a stream of their own, so that neither the model nor
    the caller waits for a copy.

    Args:
        loaded: micro-batches with images (B, S, S, 3) uint8 and target masks (B, S, S) uint8; only the thread reads
            from it. A generator is closed at the end.
        device: device of the tensors.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fetch() -> tuple[MicroBatch, list[Tensor]] | None:
        entry = next(loaded, None)
        return None if entry is None else (entry[0], [_copy(array, device, copies) for array in entry[1:]])

    with contextlib.ExitStack() as stack:
        if hasattr(loaded, "close"):
            stack.callback(loaded.close)  # after the thread has ended: a generator that runs cannot be closed
        executor = stack.enter_context(ThreadPoolExecutor(1, "stage"))
        ahead = executor.submit(fetch)
        while (entry := ahead.result()) is not None:
            batch, (images, target_masks) = entry
            for tensor in (images, target_masks):
                _wait_for(tensor, copies)
            ahead = executor.submit(fetch)
            yield batch, images, target_masks


def _copy(array: np.ndarray, device: torch.device, copies: "torch.cuda.Stream | None") -> Tensor:
    """Return the array as a tensor; on a GPU the copy may still run."""
    tensor = torch.from_numpy(array)
    if copies is None:
        return tensor.to(device)
    with torch.cuda.device(device), torch.cuda.stream(copies):  # in a new thread the current GPU is the first one
        return tensor.pin_memory().to(device, non_blocking=True)


def _wait_for(tensor: Tensor, copies: "torch.cuda.Stream | None") -> None:
    """Let the work that follows on the device wait for the copies so far; the caller does not wait."""
    if copies is not None:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_stream(copies)
        tensor.record_stream(current)  # otherwise the next copy may get this memory before the model has read it
