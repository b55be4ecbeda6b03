"""A moving average of the weights of a model that learns."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of all weights that learn and of all buffers, such as batch statistics.

    After step t, from 0, it moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)). So the first, poor weights
    fade even in a short training. Every process of a group computes the same average of the same weights.

    Args:
        model: its weights are the first average. It must not be sharded.
        decay: largest share of the old average that a step keeps.

    Source: averaging from Polyak and Juditsky, SIAM J. Control Optim. 1992; the decay of early steps from TensorFlow's
        ExponentialMovingAverage; buffers are averaged as in timm's ModelEmaV3.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.is_in_model = False
        buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        self._live = weights | buffers
        self.values = {name: value.clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights. It must be called after each step of the optimiser."""
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_([self.values[name] for name in self._live], list(self._live.values()), weight)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the weights in the model with the average. A second call restores both."""
        self.is_in_model = not self.is_in_model
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor], steps: int) -> None:
        """Continue from saved values and their number of steps."""
        self.steps = steps
        for name, value in values.items():
            self.values[name].copy_(value)
