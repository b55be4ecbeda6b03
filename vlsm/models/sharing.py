"""Models of an ensemble that stand on the same pretrained image tower: its weights are kept once, and it runs once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.towers import Towers


def share_towers(models: Sequence[SegmentationModel]) -> int:
    """Let models use one image tower where theirs are equal, weight by weight; their logits stay the same.

    A batch goes through a shared tower when the first model sees it, and the others take the activations, as long as
    all of them are given the same batch before the next.

    Args:
        models: ready for inference, on one device.

    Returns:
        How many towers are spared.
    """
    known: list[tuple[Towers, _LastBatch]] = []
    spared = 0
    for towers in (part for model in models for part in model.modules() if isinstance(part, Towers)):
        for first, last in known:
            if _are_equal(first, towers):
                _share_weights(first.image_tower, towers.image_tower)
                towers.encode_images = last  # type: ignore[method-assign]
                spared += 1
                break
        else:
            last = _LastBatch(towers)
            known.append((towers, last))
    if spared:
        for towers, last in known:
            towers.encode_images = last  # type: ignore[method-assign]
    return spared


class _LastBatch:
    """A tower that remembers what it made of the last batch."""

    def __init__(self, towers: Towers) -> None:
        self._encode = towers.encode_images
        self._pixel_values: Tensor | None = None
        self._activations: Features = ()

    def __call__(self, pixel_values: Tensor) -> Features:
        last = self._pixel_values
        if last is None or last.shape != pixel_values.shape or not torch.equal(last, pixel_values):
            self._activations = self._encode(pixel_values)
            self._pixel_values = pixel_values
        return self._activations


def _are_equal(one: Towers, other: Towers) -> bool:
    if type(one) is not type(other) or (one.image_spec, one.taps) != (other.image_spec, other.taps):
        return False
    weights, others = one.image_tower.state_dict(), other.image_tower.state_dict()
    return weights.keys() == others.keys() and all(
        weights[name].shape == others[name].shape and torch.equal(weights[name], others[name]) for name in weights
    )


def _share_weights(first: nn.Module, other: nn.Module) -> None:
    for one, same in zip(first.modules(), other.modules(), strict=True):
        same._parameters, same._buffers = one._parameters, one._buffers
