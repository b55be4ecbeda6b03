"""Activations of frozen towers on the local disk. The first epoch computes them; later epochs read them."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlsm.models.contract import Features, SegmentationModel


class FeatureCache:
    """A folder with one file per example. All processes of a node share it.

    A file that is missing, damaged or cannot be written costs time, and nothing else: its features are computed again.

    Args:
        folder: must belong to one model and one list of examples; it is created if it does not exist.
        max_bytes: limit for all files together; examples beyond it are computed again in each epoch.
        num_sharing: number of processes that write to the folder; each may write an equal share of the free bytes.
    """

    def __init__(self, folder: str | Path, max_bytes: int, num_sharing: int = 1) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._left_bytes = (max_bytes - sum(file.stat().st_size for file in self.folder.iterdir())) // num_sharing

    @torch.no_grad()
    def fetch(self, examples: Sequence[int], pixel_values: Tensor, model: SegmentationModel) -> Features:
        """Return the result of `model.encode_towers` for the images, read from the folder where possible.

        Args:
            examples: B positions in the list of examples.
            pixel_values: (B, 3, S, S), the images of these examples.
            model: a model with frozen towers.
        """
        kept = [self._read(example) for example in examples]
        missing = [index for index, features in enumerate(kept) if features is None]
        if missing:
            self._compute(missing, kept, examples, pixel_values, model)
        if len({_form(features) for features in kept}) > 1:  # a damaged file has other tensors than the model gives
            self._compute(range(len(kept)), kept, examples, pixel_values, model)
        complete = [features for features in kept if features is not None]
        return tuple(_upload(torch.stack(parts), pixel_values.device) for parts in zip(*complete, strict=True))

    def _compute(
        self,
        missing: Sequence[int],
        kept: list[Features | None],
        examples: Sequence[int],
        pixel_values: Tensor,
        model: SegmentationModel,
    ) -> None:
        rows = pixel_values if len(missing) == len(kept) else pixel_values[list(missing)]
        computed = tuple(part.cpu() for part in model.encode_towers(rows))  # one transfer per part, not per file
        for row, index in enumerate(missing):
            features = tuple(part[row] for part in computed)
            kept[index] = features
            self._write(examples[index], features)

    def _path(self, example: int) -> Path:
        return self.folder / f"{example}.safetensors"

    def _read(self, example: int) -> Features | None:
        try:
            tensors = load_file(self._path(example))
            return tuple(tensors[str(index)] for index in range(len(tensors))) or None
        except (OSError, SafetensorError, LookupError):
            return None

    def _write(self, example: int, features: Features) -> None:
        num_bytes = sum(part.nbytes for part in features)
        if num_bytes > self._left_bytes:
            return
        self._left_bytes -= num_bytes
        temporary = self.folder / f".{uuid.uuid4().hex}"
        try:
            save_file({str(index): part.contiguous().clone() for index, part in enumerate(features)}, temporary)
            os.replace(temporary, self._path(example))
        except (OSError, SafetensorError):  # such as a full disk
            temporary.unlink(missing_ok=True)
            self._left_bytes = 0


def _upload(features: Tensor, device: torch.device) -> Tensor:
    """Return features on the device. On a GPU the copy runs from pinned memory while the process goes on."""
    return features.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else features.to(device)


def _form(features: Features | None) -> tuple[object, ...]:
    return () if features is None else tuple((part.shape, part.dtype) for part in features)
