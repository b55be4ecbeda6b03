"""The CNN that VLSM-Ensemble adds to a VLSM: UNet-D receives features of the VLSM, and their logits are joined.

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from vlsm.errors import CheckpointError
from vlsm.models.contract import Features
from vlsm.models.options import UNetDSettings
from vlsm.models.towers import Towers
from vlsm.models.unet_d import UNetDNetwork

_CHANNELS = 128


class FusedUNetD(nn.Module):
    """UNet-D with a map of text-conditioned tower features in its bottleneck, and logits joined with the VLSM's logits.

    Args:
        towers: the VLSM's towers.
        settings: width and dropout of the CNN.
        copies: how many times the map enters the bottleneck; 2 in the paper's ensemble C.
    """

    num_reduced: int  # tensors that `reduce_activations` returns

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
        """Number of tensors that `encode_images` returns."""
        return self.num_reduced + len(self.unet.down)

    @abstractmethod
    def reduce_activations(self, activations: tuple[Tensor, ...]) -> Features:
        """Return the activations at width 128, (B, L, 128) each. They do not depend on the prompt."""

    @abstractmethod
    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """Return the tokens of the map, (B, L, 128), conditioned by the text."""

    @abstractmethod
    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """Return the logits that are joined with the CNN's logits first, (B, 1, S, S)."""

    def encode_images(self, activations: tuple[Tensor, ...], pixel_values: Tensor) -> Features:
        """Return the reduced activations, then the features of the CNN's encoder."""
        return self.reduce_activations(activations) + self.unet.encode(pixel_values)

    def decode(self, features: Features, text_embeddings: Tensor, vlsm_logits: Tensor) -> Tensor:
        """Return the ensemble's logits (B, 1, S, S)."""
        reduced, encoded = features[: self.num_reduced], features[self.num_reduced :]
        tokens = self.fuse(reduced, text_embeddings)
        fused = self.drop_prefix(tokens.transpose(1, 2)).unflatten(2, (self.grid, self.grid))  # (B, 128, grid, grid)
        if fused.shape[2:] != encoded[0].shape[2:]:  # the patch side is not 16 pixels
            fused = nn.functional.interpolate(fused, size=encoded[0].shape[2:], mode="bilinear", align_corners=False)
        cnn_logits = self.unet.decode(encoded, torch.cat([fused] * self.copies, dim=1))
        side = self.side_logits(fused, vlsm_logits)
        return self.join(torch.cat([vlsm_logits, self.join_side(torch.cat([side, cnn_logits], dim=1))], dim=1))

    def _film(self, tokens: Tensor, text_embeddings: Tensor) -> Tensor:
        return self.film_mul(text_embeddings)[:, None] * tokens + self.film_add(text_embeddings)[:, None]


class FirstActivationUNetD(FusedUNetD):
    """The CNN of ensemble A: the map comes from the shallowest activation only, and the side logits from the map."""

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
        """Return the shallowest activation at width 128."""
        return (self.reduce(activations[0]),)

    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """Return the activation, scaled and shifted by the text."""
        return self._film(reduced[0], text_embeddings)

    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """Return logits that are computed from the map."""
        return self.side(fused)


class AllActivationsUNetD(FusedUNetD):
    """The CNN of ensemble B: the map comes from a decoder like CLIPSeg's, with width 128, over the tokens of one image.

    The public code attends across the batch instead, so its map of an image depends on the other images of the batch.
    """

    def __init__(self, towers: Towers, settings: UNetDSettings, copies: int = 1) -> None:
        super().__init__(towers, settings, copies)
        self.num_reduced = num_taps = len(towers.taps)
        self.reduces = nn.ModuleList(nn.Linear(towers.image_width, _CHANNELS) for _ in range(num_taps))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(_CHANNELS, nhead=4, batch_first=True) for _ in range(num_taps)
        )

    def reduce_activations(self, activations: tuple[Tensor, ...]) -> Features:
        """Return all activations at width 128, deepest first."""
        return tuple(reduce(activation) for reduce, activation in zip(self.reduces, reversed(activations), strict=True))

    def fuse(self, reduced: Features, text_embeddings: Tensor) -> Tensor:
        """Return the tokens after one encoder layer per activation. The text conditions the first activation."""
        hidden = self.layers[0](self._film(reduced[0], text_embeddings))
        for activation, layer in zip(reduced[1:], self.layers[1:], strict=True):
            hidden = layer(activation + hidden)
        return hidden

    def side_logits(self, fused: Tensor, vlsm_logits: Tensor) -> Tensor:
        """Return the VLSM's logits."""
        return vlsm_logits


def build_unet_d(towers: Towers, settings: UNetDSettings, image_size: int) -> FirstActivationUNetD:
    """Return the CNN that the option `unet` adds to a model with towers, untrained: the CNN of ensemble A.

    Raises:
        CheckpointError: the side of the input is no multiple of 16 pixels.
    """
    if image_size % 16:
        raise CheckpointError(
            f"the side of the input is {image_size} pixels; UNet-D needs a multiple of 16; change image_size"
        )
    return FirstActivationUNetD(towers, settings)
