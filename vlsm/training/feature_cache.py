"""Frozen towers' activations on the local disk: computed in the first epoch, read in the others."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlsm.models.contract import Features, SegmentationModel


class FeatureCache:
    """A folder with a file per example, shared by all processes of a node.

    Args:
        folder: made where it does not exist; it must belong to one model and one list of examples.
        max_bytes: of all files; examples beyond it are computed each time.
        num_sharing: processes that write there, each its share of the bytes.
    """

    def __init__(self, folder: str | Path, max_bytes: int, num_sharing: int = 1) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._left_bytes = (max_bytes - sum(file.stat().st_size for file in self.folder.iterdir())) // num_sharing

    @torch.no_grad()
    def fetch(self, examples: Sequence[int], pixel_values: Tensor, model: SegmentationModel) -> Features:
        """What `model.encode_towers` makes of the images, read where it is kept.

        Args:
            examples: B numbers.
            pixel_values: (B, 3, S, S), of these examples.
            model: whose towers are frozen.
        """
        kept = [self._read(example, pixel_values.device) for example in examples]
        missing = [index for index, features in enumerate(kept) if features is None]
        if missing:
            computed = model.encode_towers(pixel_values[missing])
            for row, index in enumerate(missing):
                own = tuple(part[row] for part in computed)
                kept[index] = own
                self._write(examples[index], own)
        return tuple(torch.stack(parts) for parts in zip(*(own for own in kept if own is not None), strict=True))

    def _path(self, example: int) -> Path:
        return self.folder / f"{example}.safetensors"

    def _read(self, example: int, device: torch.device) -> Features | None:
        try:
            tensors = load_file(self._path(example), device=str(device))
        except FileNotFoundError:
            return None
        return tuple(tensors[str(index)] for index in range(len(tensors)))

    def _write(self, example: int, features: Features) -> None:
        num_bytes = sum(part.nbytes for part in features)
        if num_bytes > self._left_bytes:
            return
        self._left_bytes -= num_bytes
        temporary = self.folder / f".{uuid.uuid4().hex}"
        save_file({str(index): part.cpu().contiguous().clone() for index, part in enumerate(features)}, temporary)
        os.replace(temporary, self._path(example))
