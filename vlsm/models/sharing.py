"""Sharing of equal image towers between the models of an ensemble: one copy of the weights, one run per batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.towers import Towers


def share_towers(models: Sequence[SegmentationModel]) -> int:
    """Let models share one image tower if all weights of their image towers are equal. Their logits stay the same.

    The first model that receives a batch runs the shared tower; the other models reuse its activations. This requires
    that all models receive the same batch before any of them receives the next.

    Args:
        models: models that are ready for inference, on one device.

    Returns:
        The number of towers that are replaced by an equal tower.
    """
    unique_towers: list[tuple[Towers, _LastBatch]] = []
    num_replaced = 0
    for towers in (module for model in models for module in model.modules() if isinstance(module, Towers)):
        for first_towers, last_batch in unique_towers:
            if _are_equal(first_towers, towers):
                _share_weights(first_towers.image_tower, towers.image_tower)
                towers.encode_images = last_batch  # type: ignore[method-assign]
                num_replaced += 1
                break
        else:
            unique_towers.append((towers, _LastBatch(towers)))
    if num_replaced:
        for towers, last_batch in unique_towers:
            towers.encode_images = last_batch  # type: ignore[method-assign]
    return num_replaced


class _LastBatch:
    """A replacement of `encode_images` that stores the activations of the last batch."""

    def __init__(self, towers: Towers) -> None:
        self._encode = towers.encode_images
        self._pixel_values: Tensor | None = None
        self._activations: Features = ()

    def __call__(self, pixel_values: Tensor) -> Features:
        if not self._is_last(pixel_values):
            self._activations = self._encode(pixel_values)
            self._pixel_values = pixel_values
        return self._activations

    def _is_last(self, pixel_values: Tensor) -> bool:
        """Return whether this is the last batch. A GPU's values are not compared: that would wait for them."""
        last = self._pixel_values
        if last is pixel_values or last is None or last.is_cuda or last.shape != pixel_values.shape:
            return last is pixel_values
        return torch.equal(last, pixel_values)


def _are_equal(one: Towers, other: Towers) -> bool:
    if type(one) is not type(other) or (one.image_spec, one.taps) != (other.image_spec, other.taps):
        return False
    weights, other_weights = one.image_tower.state_dict(), other.image_tower.state_dict()
    return weights.keys() == other_weights.keys() and all(
        weights[name].shape == other_weights[name].shape and torch.equal(weights[name], other_weights[name])
        for name in weights
    )


def _share_weights(first: nn.Module, other: nn.Module) -> None:
    for first_module, other_module in zip(first.modules(), other.modules(), strict=True):
        other_module._parameters, other_module._buffers = first_module._parameters, first_module._buffers
