"""A cache of text features, so that each prompt is encoded once."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from vlsm.models.contract import Features, SegmentationModel


class PromptCache:
    """Text features of a model's prompts. They are valid while the model's text towers do not learn.

    Args:
        model: its `encode_prompts` is called with at most 64 prompts at once.
        max_bytes: limit of the stored features in bytes; the least recently used are dropped first.
    """

    def __init__(self, model: SegmentationModel, max_bytes: int = 64 << 20) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._num_bytes = 0

    def encode(self, prompts: Sequence[str]) -> Features:
        """Return text features with one row per prompt, in the order of the prompts."""
        new_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(new_prompts), 64):
            chunk = new_prompts[start : start + 64]
            with torch.no_grad():
                features = self.model.encode_prompts(chunk)
            for prompt, *row in zip(chunk, *features, strict=True):
                self._rows[prompt] = tuple(part.clone() for part in row)  # a view keeps the memory of all 64 rows
                self._num_bytes += _num_bytes(row)
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        columns = zip(*(self._rows[prompt] for prompt in prompts), strict=True)
        features = tuple(torch.stack(column) for column in columns)
        while self._num_bytes > self.max_bytes and self._rows:
            _, evicted = self._rows.popitem(last=False)
            self._num_bytes -= _num_bytes(evicted)
        return features


def _num_bytes(row: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in row)
