"""What VLSM-Ensemble adds to a vision-language model: UNet-D, fed with its features, its logits joined with theirs.

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from vlsm.models.contract import Features
from vlsm.models.options import UNetDSettings
from vlsm.models.towers import Towers
from vlsm.models.unet_d import UNetDNetwork

_CHANNELS = 128


class FusedUNetD(nn.Module):
    """UNet-D whose bottleneck takes a map of text-conditioned tower features, and whose logits join the VLSM's.

    Args:
        towers: of the VLSM.
        settings: width and dropout of the CNN.
        copies: how often the map enters the bottleneck; the paper's C lets it in twice.
    """

    num_reduced: int  # tensors that `reduce_activations` gives

    def __init__(self, towers: Towers, settings: UNetDSettings, copies: int = 1) -> None:
        super().__init__()
        self.grid, self.copies = towers.grid, copies
        num_patches = towers.grid**2
        self.film_mul = nn.Linear(towers.text_width, _CHANNELS)
        self.film_add = nn.Linear(towers.text_width, _CHANNELS)
        self.drop_prefix = nn.Linear(num_patches + towers.num_prefix_tokens, num_patches)
        self.unet = UNetDNetwork(settings.width, settings.dropout, copies * _CHANNELS)
        self.join_side = nn.Conv2d(2, 1, 1)
        self.join = nn.Conv2d(2, 1, 1)

    @property
    def num_features(self) -> int:
        """Tensors that `encode_images` gives."""
        return self.num_reduced + len(self.unet.down)

    @abstractmethod
    def reduce_activations(self, activations: tuple[Tensor, ...]) -> Features:
        """The part of the map that no prompt changes, (B, L, 128) each."""

    @abstractmethod
    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """The tokens of the map, (B, L, 128)."""

    @abstractmethod
    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """What joins the CNN's logits first, (B, 1, S, S)."""

    def encode_images(self, activations: tuple[Tensor, ...], pixel_values: Tensor) -> Features:
        """The reduced activations, and what the CNN's encoder gives."""
        return self.reduce_activations(activations) + self.unet.encode(pixel_values)

    def decode(self, features: Features, text_embeddings: Tensor, vlsm_logits: Tensor) -> Tensor:
        """The ensemble's logits (B, 1, S, S)."""
        reduced, encoded = features[: self.num_reduced], features[self.num_reduced :]
        tokens = self.fuse(reduced, text_embeddings)
        fused = self.drop_prefix(tokens.transpose(1, 2)).unflatten(2, (self.grid, self.grid))  # (B, 128, grid, grid)
        if fused.shape[2:] != encoded[0].shape[2:]:  # patches that are not of 16 pixels
            fused = nn.functional.interpolate(fused, size=encoded[0].shape[2:], mode="bilinear", align_corners=False)
        cnn_logits = self.unet.decode(encoded, torch.cat([fused] * self.copies, dim=1))
        side = self.side_logits(fused, vlsm_logits)
        return self.join(torch.cat([vlsm_logits, self.join_side(torch.cat([side, cnn_logits], dim=1))], dim=1))

    def _film(self, tokens: Tensor, text_embeddings: Tensor) -> Tensor:
        return self.film_mul(text_embeddings)[:, None] * tokens + self.film_add(text_embeddings)[:, None]


class FirstActivationUNetD(FusedUNetD):
    """As in A: the map comes from the shallowest activation alone, and gives logits of its own."""

    def __init__(self, towers: Towers, settings: UNetDSettings, copies: int = 1) -> None:
        super().__init__(towers, settings, copies)
        self.num_reduced = 1
        self.reduce = nn.Linear(towers.image_width, _CHANNELS)
        self.side = nn.Sequential(
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(_CHANNELS, _CHANNELS // 2, 4, stride=4),
            nn.ReLU(),
            nn.ConvTranspose2d(_CHANNELS // 2, 1, 4, stride=4),
        )

    def reduce_activations(self, activations: tuple[Tensor, ...]) -> Features:
        """The shallowest activation at width 128."""
        return (self.reduce(activations[0]),)

    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """Scaled and shifted by the text."""
        return self._film(reduced[0], text_embeddings)

    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """From the map."""
        return self.side(fused)


class AllActivationsUNetD(FusedUNetD):
    """As in B: like CLIPSeg's decoder at width 128, over the tokens of one image.

    The public code attends across the batch instead, so that its map of an image depends on the batch mates.
    """

    def __init__(self, towers: Towers, settings: UNetDSettings, copies: int = 1) -> None:
        super().__init__(towers, settings, copies)
        self.num_reduced = num_taps = len(towers.taps)
        self.reduces = nn.ModuleList(nn.Linear(towers.image_width, _CHANNELS) for _ in range(num_taps))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(_CHANNELS, nhead=4, batch_first=True) for _ in range(num_taps)
        )

    def reduce_activations(self, activations: tuple[Tensor, ...]) -> Features:
        """All of them at width 128, deepest first."""
        return tuple(reduce(found) for reduce, found in zip(self.reduces, reversed(activations), strict=True))

    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """Their running sum, conditioned at the first, through an encoder layer each."""
        hidden = self.layers[0](self._film(reduced[0], text_embeddings))
        for activation, layer in zip(reduced[1:], self.layers[1:], strict=True):
            hidden = layer(activation + hidden)
        return hidden

    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """The VLSM's own."""
        return vlsm_logits
