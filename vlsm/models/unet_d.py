"""UNet-D, the low-complexity CNN of VLSM-Ensemble. It ignores the prompt: every prompt gets the same logits."""

from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlsm.models.contract import Features, ImageOnlyModel
from vlsm.models.options import UNetDOptions


class _Down(nn.Module):
    """3x3 conv, 3x3 conv (no activation between the two), batch norm, ReLU, dropout, 2x2 max pool."""

    def __init__(self, channels_in: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu_(self.norm(self.conv2(self.conv1(x)))))
        return nn.functional.max_pool2d(x, 2)


class UpBlock(nn.Module):
    """2x2 stride-2 transposed conv, one 3x3 conv applied twice with the same weights, batch norm, ReLU.

    The input of the transposed conv is the output of the level below, concatenated with the skip. The conv is linear,
    so the skip's term is computed separately, once per image, and added for each prompt.
    """

    def __init__(self, channels_below: int, channels_skip: int, channels: int) -> None:
        super().__init__()
        self.channels_below = channels_below
        self.upconv = nn.ConvTranspose2d(channels_below + channels_skip, channels, 2, stride=2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.last: nn.Module | None = None  # the second application of `conv`, with the folded norm

    def fold(self) -> None:
        """Fold the norm into the second application of the convolution."""
        self.last = fuse_conv_bn_eval(self.conv, cast(nn.BatchNorm2d, self.norm))
        self.norm = nn.Identity()

    def project_skip(self, skip: Tensor) -> Tensor:
        """Return the skip's term of the transposed conv: (B, channels, 2 H, 2 W) from (B, channels_skip, H, W)."""
        return functional.conv_transpose2d(skip, self.upconv.weight[self.channels_below :], stride=2)

    def forward(self, below: Tensor, skip: Tensor | None) -> Tensor:
        """Return (B, channels, 2 H, 2 W) from (B, channels_below, H, W) and the result of `project_skip`."""
        x = functional.conv_transpose2d(below, self.upconv.weight[: self.channels_below], self.upconv.bias, stride=2)
        x = self.conv(x if skip is None else x.add_(skip))
        return torch.relu_(self.norm(self.conv(x)) if self.last is None else self.last(x))


class _ChannelAttention(nn.Module):
    """Efficient channel attention: a 1-d conv over the pooled channels computes one weight per channel.

    Source: ECA-Net, CVPR 2020, arXiv 1910.03151; kernel 5 by its rule (gamma 2, b 1) for 1240 channels; no bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))  # (B, 1, C)
        return x * weights[:, 0, :, None, None]


class UNetDNetwork(nn.Module):
    """Four levels down, a bottleneck with channel attention, four levels up, skips from the pooled outputs.

    Args:
        width: channels of the first level.
        dropout: dropout probability after each encoder level.
        fusion_channels: channels of a map that enters the bottleneck with the deepest pooled output; 0 without a map.

    Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
    """

    def __init__(self, width: int, dropout: float, fusion_channels: int = 0) -> None:
        super().__init__()
        bottleneck, *ups = (round(width * published / 64) for published in (1240, 546, 182, 91, 45))
        self.down = nn.ModuleList(
            _Down(channels_in, channels, dropout)
            for channels_in, channels in (
                (3, width),
                (width, 2 * width),
                (2 * width, 4 * width),
                (4 * width, 8 * width),
            )
        )
        self.expand = nn.Conv2d(8 * width + fusion_channels, bottleneck, 1)
        self.attention = _ChannelAttention()
        self.fusion_channels = fusion_channels
        skips = (0, 4 * width, 2 * width, width)
        self.up = nn.ModuleList(
            UpBlock(below, skip, channels)
            for below, skip, channels in zip((bottleneck, *ups), skips, ups, strict=False)
        )
        self.head = nn.Conv2d(ups[-1], 1, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the network's logits (B, 1, S, S), without a map."""
        return self.decode(self.encode(pixel_values))

    def encode(self, pixel_values: Tensor) -> Features:
        """Return the features that do not depend on the prompt: the bottleneck without the map, then the skip terms."""
        pooled = []
        for down in self.down:
            pixel_values = down(pixel_values)
            pooled.append(pixel_values)
        *skips, deepest = pooled
        expanded = functional.conv2d(deepest, self.expand.weight[:, self.fusion_channels :], self.expand.bias)
        return (
            expanded,
            *(cast(UpBlock, up).project_skip(skip) for up, skip in zip(self.up[1:], reversed(skips), strict=True)),
        )

    def decode(self, encoded: Features, fused: Tensor | None = None) -> Tensor:
        """Return logits (B, 1, S, S) from the result of `encode` and a map (B, fusion_channels, S / 16, S / 16)."""
        x, *skips = encoded
        if fused is not None:
            x = x + functional.conv2d(fused, self.expand.weight[:, : self.fusion_channels])
        x = self.attention(x)
        for up, skip in zip(self.up, (None, *skips), strict=True):
            x = up(x, skip)
        return self.head(x)


class UNetD(ImageOnlyModel):
    """UNet-D without a VLSM.

    Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
    """

    def __init__(self, options: UNetDOptions, network: nn.Module) -> None:
        super().__init__(options, network)
        if not options.normalize:
            self.image_spec = replace(self.image_spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    @classmethod
    def build(cls, options: UNetDOptions) -> Self:
        """Build an untrained network: there are no published weights."""
        return cls(options, UNetDNetwork(options.width, options.dropout))

    @classmethod
    def restore(cls, options: UNetDOptions, folder: Path) -> Self:
        """Build the network from the options alone."""
        return cls.build(options)
