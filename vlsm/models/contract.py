"""What every model is: the one contract that training and segmentation rely on."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vlsm.config import Settings
from vlsm.images import ImageSpec

Features = tuple[Tensor, ...]


class SegmentationModel(nn.Module):
    """Images and prompts to logits, in three steps, so that each is done once: per prompt, per image, per pair.

    `forward` chains them. B images, T distinct prompts, S the model's side in pixels, D the width of a text embedding.
    """

    Options: ClassVar[type[Settings]]
    options: Settings
    image_spec: ImageSpec

    @classmethod
    @abstractmethod
    def build(cls, options: Any) -> Self:
        """A model from its options, with pretrained weights where the options name a source of them."""

    @classmethod
    @abstractmethod
    def restore(cls, options: Any, folder: Path) -> Self:
        """The same architecture from a checkpoint directory, its weights still to be loaded."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write what `restore` needs besides the options, such as tokenizer files."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """One text embedding per prompt: (T, D); D is 0 for models that see no text."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> Features:
        """What the images give to every prompt alike: tensors of B rows each, from pixel_values (B, 3, S, S)."""

    @abstractmethod
    def decode(self, features: Features, text_embeddings: Tensor) -> Tensor:
        """Logits (B, 1, S, S) from B rows of features and B text embeddings (B, D)."""

    def forward(self, pixel_values: Tensor, text_embeddings: Tensor) -> Tensor:
        """Logits (B, 1, S, S) of B images, each with its own prompt.

        Args:
            pixel_values: (B, 3, S, S) float, normalised by `image_spec`.
            text_embeddings: (B, D), from `encode_prompts`.
        """
        return self.decode(self.encode_images(pixel_values), text_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
