"""Copies between the host and the models' device that overlap with computing. On a CPU there is nothing to copy."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Staging:
    """The copies of one device.

    On a GPU, a stream of its own copies images in, and another one takes results, while the models compute on the
    current stream. Memory on the host is pinned, since other memory would make each copy wait. torch's allocators keep
    pinned memory for later copies, and do not hand it out again before its copy has ended.

    Args:
        device: the models' device.

    Attributes:
        depth: number of batches that are queued on the device while the results of another one are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self.depth = 2 if self._is_gpu else 0
        if self._is_gpu:
            self._uploads, self._results = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, pixels: np.ndarray, rows: Sequence[int]) -> Tensor:
        """Return some rows of an array on the device; work that is queued later waits for them."""
        if not self._is_gpu:
            return torch.from_numpy(pixels[rows])
        pinned = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
        np.take(pixels, rows, axis=0, out=pinned.numpy(), mode="clip")  # the default mode would copy once more
        with torch.cuda.stream(self._uploads):
            images = pinned.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._uploads)
        images.record_stream(current)  # its memory belongs to the other stream, and is in use until this one is done
        return images

    def mark(self) -> "torch.cuda.Event | None":
        """Return the end of all work that is queued on the device so far."""
        return torch.cuda.current_stream(self._device).record_event() if self._is_gpu else None

    @contextlib.contextmanager
    def results(self, end: "torch.cuda.Event | None") -> Iterator[None]:
        """Return a context for work with results that are complete at `end`, beside the work that is queued after them.

        At the end of the context, its work is done.
        """
        if end is None:
            yield
            return
        self._results.wait_event(end)
        with torch.cuda.stream(self._results):
            yield
        self._results.synchronize()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return a new float16 array on the host, into which the device can copy. Its values are undefined."""
        return torch.empty(shape, dtype=torch.float16, pin_memory=self._is_gpu)
