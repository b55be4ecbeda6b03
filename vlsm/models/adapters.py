"""Small weights that adapt a frozen tower: low-rank ones, which merge into it, and bottlenecks, which stay."""

import re
from typing import Any

from torch import Tensor, nn

from vlsm.errors import CheckpointError, optional_packages

_NAME = "adapter"  # of a bottleneck in the part whose output it adapts


class Bottleneck(nn.Module):
    """Two linear layers around a few channels, and the input added to their output. Untrained, it changes nothing.

    Args:
        width: channels of the input and of the output.
        inner_width: channels between the two layers.

    Source: Houlsby et al., ICML 2019, arXiv 1902.00751, with the ReLU of VLSM-Adapter.
    """

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted tokens, (B, L, width) as the input."""
        return x + self.up(self.down(x).relu())


def add_bottlenecks(tower: nn.Module, targets: str, inner_width: int) -> None:
    """Let a bottleneck of each block's attention and of its MLP learn. They are added where there are none yet.

    Args:
        tower: an image tower or a text tower.
        targets: regular expression for the parts of its blocks whose outputs are added to their inputs.
        inner_width: channels inside a bottleneck.

    Raises:
        CheckpointError: the tower has no such blocks, or has bottlenecks of another width.

    Source: the dense adapters of VLSM-Adapter, MICCAI 2024, arXiv 2405.06196. Its decoder stays frozen; ours learns.
    """
    parts = {name: part for name, part in tower.named_modules() if re.fullmatch(targets, name)}
    if not parts:
        raise CheckpointError(
            f"adapters belong into the blocks of a transformer, and the {type(tower).__name__} has none that are known "
            "here; choose another trainable, or adapt=text or adapt=image for the other tower"
        )
    device = next(tower.parameters()).device
    for name, part in parts.items():
        bottleneck = getattr(part, _NAME, None)
        if bottleneck is None:
            linear = _last_linear(part) or _last_linear(tower.get_submodule(name.rpartition(".")[0]))
            bottleneck = Bottleneck(linear.out_features, inner_width).to(device)  # type: ignore[union-attr]
            part.add_module(_NAME, bottleneck)
            if not isinstance(part, nn.Sequential):  # which runs all of its children one after the other
                part.register_forward_hook(_adapt_output)
        elif bottleneck.down.out_features != inner_width:
            raise CheckpointError(
                f"the model has adapters of width {bottleneck.down.out_features} already; adapter_width is "
                f"{inner_width}: set it to {bottleneck.down.out_features}"
            )
        bottleneck.requires_grad_(True)


def _adapt_output(part: nn.Module, args: Any, output: Any) -> Any:
    """Return the adapted output of a part; an attention returns it with others. A hook: a copy of the part keeps it."""
    if isinstance(output, tuple):
        return part.adapter(output[0]), *output[1:]  # type: ignore[operator]
    return part.adapter(output)  # type: ignore[operator]


def _last_linear(module: nn.Module) -> nn.Linear | None:
    return next((part for part in reversed([*module.modules()]) if isinstance(part, nn.Linear)), None)


def add_low_rank(tower: nn.Module, targets: str, rank: int, is_dora: bool = False) -> Any:
    """Add low-rank adapters that learn to the linear layers of a tower's attention, and return peft's LoraModel.

    Args:
        tower: an image tower or a text tower.
        targets: regular expression for the linear layers.
        rank: of the adapters; alpha is twice the rank.
        is_dora: also learn the magnitude of each layer's weights.

    Raises:
        CheckpointError: peft cannot adapt the layers of this tower.
        ConfigError: peft is not installed.

    Source: LoRA, arXiv 2106.09685; DoRA, ICML 2024, arXiv 2402.09353; both by the peft library.
    """
    with optional_packages("train"):
        from peft import LoraConfig, LoraModel  # late import: it is slow, and inference does not need it

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=is_dora)
    try:
        return LoraModel(tower, config, "default")
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"trainable {'dora' if is_dora else 'lora'} cannot adapt the {type(tower).__name__} of this model "
            f"({reason}); choose another trainable"
        ) from error
