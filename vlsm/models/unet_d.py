"""UNet-D, the low-complexity CNN of VLSM-Ensemble. It sees no text: every prompt gets the same logits."""

from pathlib import Path
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vlsm.config import Settings
from vlsm.images import ImageSpec
from vlsm.models.contract import Features, SegmentationModel


class UNetDOptions(Settings):
    """The published network has width 64; a quarter of it trains on a laptop."""

    image_size: int = Field(352, ge=16, multiple_of=16, description="side of the input square in pixels")
    width: int = Field(
        64, ge=4, description="channels of the first level; all others follow in the published proportions"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="after each encoder level")


class _Down(nn.Module):
    """3x3 conv, 3x3 conv (no activation between the two), batch norm, ReLU, dropout, 2x2 max pool."""

    def __init__(self, channels_in: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.norm(self.conv2(self.conv1(x)))))
        return nn.functional.max_pool2d(x, 2)


class _Up(nn.Module):
    """2x2 stride-2 transposed conv, one 3x3 conv applied twice with the same weights, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(channels_in, channels, 2, stride=2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(self.conv(self.upconv(x)))))


class _ChannelAttention(nn.Module):
    """Efficient channel attention: a 1-d conv over the pooled channels gives each its weight.

    Source: ECA-Net, CVPR 2020, arXiv 1910.03151; kernel 5 by its rule (gamma 2, b 1) for 1240 channels, no bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))  # (B, 1, C)
        return x * weights[:, 0, :, None, None]


class UNetD(SegmentationModel):
    """Four levels down, an attentive bottleneck, four levels up, skips from the pooled outputs.

    Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
    """

    Options = UNetDOptions
    options: UNetDOptions

    def __init__(self, options: UNetDOptions) -> None:
        super().__init__()
        self.options = options
        self.image_spec = ImageSpec(options.image_size)
        c = options.width
        bottleneck, *ups = (round(c * published / 64) for published in (1240, 546, 182, 91, 45))
        self.down = nn.ModuleList(
            _Down(channels_in, channels, options.dropout)
            for channels_in, channels in ((3, c), (c, 2 * c), (2 * c, 4 * c), (4 * c, 8 * c))
        )
        self.expand = nn.Conv2d(8 * c, bottleneck, 1)
        self.attention = _ChannelAttention()
        skips = (0, 4 * c, 2 * c, c)
        self.up = nn.ModuleList(
            _Up(below + skip, channels) for below, skip, channels in zip((bottleneck, *ups), skips, ups, strict=False)
        )
        self.head = nn.Conv2d(ups[-1], 1, 1)

    @classmethod
    def build(cls, options: UNetDOptions) -> Self:
        """An untrained network: there are no published weights."""
        return cls(options)

    @classmethod
    def restore(cls, options: UNetDOptions, folder: Path) -> Self:
        """The network; nothing but the options is needed."""
        return cls(options)

    def save_files(self, folder: Path) -> None:
        """Nothing to write: the options say it all."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """(T, 0): no text enters."""
        return torch.zeros(len(prompts), 0, device=self.device)

    def encode_images(self, pixel_values: Tensor) -> Features:
        """The whole network, since nothing depends on the prompt: logits (B, 1, S, S)."""
        skips = []
        x = pixel_values
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.attention(self.expand(skips.pop()))
        for up in self.up:
            x = up(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
        return (self.head(x),)

    def decode(self, features: Features, text_embeddings: Tensor) -> Tensor:
        """The logits of `encode_images`, whatever the prompt."""
        return features[0]
