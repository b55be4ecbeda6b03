"""The optimiser and its parameter groups: the learning rate and the weight decay of each weight."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vlsm.models.towers import Towers
from vlsm.training.settings import OptimSettings

# the name and number of a block in the towers of transformers, open_clip and timm
_BLOCK = re.compile(r"\.(?:layers|layer|blocks|resblocks)\.?(\d+)\.")
_STEM = re.compile(
    r"(?<!attnpool.positional_)embed|cls_token|class_token|\.conv\d|\.bn\d|ln_pre|pre_layrnorm|norm_pre"
    r"|\.backbone\.layer_norm\."  # of SAM 3
)  # before the first block


def build_optimizer(model: nn.Module, optim: OptimSettings, is_fused: bool = False) -> torch.optim.Optimizer:
    """Return the optimiser of all weights that learn, with the groups of `parameter_groups`.

    Args:
        model: model on its device.
        optim: settings of the optimiser.
        is_fused: update all weights with one kernel, which differs from many by rounding, and never waits for the GPU.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.optimizer]
    return kind(parameter_groups(model, optim), lr=optim.lr, fused=is_fused or None)


@torch.no_grad()
def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give each tensor of the optimiser's state the strides of its weight.

    A file keeps no strides, so a state from a file is contiguous, and weights may be channels last. The fused
    optimisers need equal strides.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def parameter_groups(model: nn.Module, optim: OptimSettings) -> list[dict[str, Any]]:
    """Return the weights that learn, grouped by learning rate and weight decay.

    Norms and biases, the weights of one dimension, do not decay unless optim.decay_all is set. Weights in towers have
    the rate optim.tower_lr, times a power of optim.layer_decay: the power is 1 in the last block of a tower, grows by 1
    per block towards the input, and is largest for the embeddings. Weights behind the last block have the full rate.

    Returns:
        Groups with the keys params, lr, base_lr (the rate before any schedule) and weight_decay.

    Source: decay without norms and biases from BERT, arXiv 1810.04805, and timm; rates per layer from ELECTRA, arXiv
        2003.10555, with the numbering of BEiT, arXiv 2106.08254.
    """
    rates = dict(_tower_rates(model, optim))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = optim.weight_decay if parameter.ndim > 1 or optim.decay_all else 0.0
            groups.setdefault((rates.get(id(parameter), optim.lr), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _tower_rates(model: nn.Module, optim: OptimSettings) -> Iterator[tuple[int, float]]:
    """Yield the id and the learning rate of each weight in a tower."""
    for towers in (module for module in model.modules() if isinstance(module, Towers)):
        named = {f".{name}": parameter for name, parameter in towers.named_parameters()}
        numbers: dict[bool, set[int]] = {
            True: set(),
            False: set(),
        }  # of the blocks of the text tower, of the image tower
        for name in named:
            if block := _BLOCK.search(name):
                numbers["text" in name].add(int(block[1]))
        for name, parameter in named.items():
            power = _power(name, sorted(numbers["text" in name]))
            yield id(parameter), (optim.tower_lr or optim.lr) * optim.layer_decay**power


def _power(name: str, numbers: list[int]) -> int:
    if block := _BLOCK.search(name):
        return len(numbers) - numbers.index(int(block[1]))
    return len(numbers) + 1 if _STEM.search(name) else 0
