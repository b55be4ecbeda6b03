"""Prompts, each encoded once."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from vlsm.models.contract import Features, SegmentationModel


class PromptCache:
    """The text features of a model's prompts, as long as its text towers do not learn.

    Args:
        model: whose `encode_prompts` is called, with at most 64 prompts at once.
        max_bytes: of features kept; the least recently used go first.
    """

    def __init__(self, model: SegmentationModel, max_bytes: int = 64 << 20) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._num_bytes = 0

    def encode(self, prompts: Sequence[str]) -> Features:
        """A row of text features per prompt, in their order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(new), 64):
            with torch.no_grad():
                features = self.model.encode_prompts(new[start : start + 64])
            for prompt, *row in zip(new[start : start + 64], *features, strict=True):
                self._rows[prompt] = tuple(part.clone() for part in row)  # a view would keep all 64 alive
                self._num_bytes += _num_bytes(row)
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        found = zip(*(self._rows[prompt] for prompt in prompts), strict=True)
        features = tuple(torch.stack(parts) for parts in found)
        while self._num_bytes > self.max_bytes and self._rows:
            _, evicted = self._rows.popitem(last=False)
            self._num_bytes -= _num_bytes(evicted)
        return features


def _num_bytes(row: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in row)
