"""What every model is: the one contract that training and segmentation rely on."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast, get_args

import torch
from torch import Tensor, nn

from vlsm.config import Settings
from vlsm.errors import CheckpointError
from vlsm.images.decode import ImageSpec
from vlsm.models.towers import Towers, Trainable

Features = tuple[Tensor, ...]


class SegmentationModel(nn.Module):
    """Images and prompts to logits, in three steps, so that each is done once: per prompt, per image, per pair.

    `forward` chains them. B images, T distinct prompts, S the model's side in pixels. The features of images and of
    prompts are tuples of tensors with a row per image or prompt; how many and how wide is the model's own business.
    """

    options: Settings
    image_spec: ImageSpec
    is_folded = False  # by `fold_batch_norms`, for inference only
    threshold: ClassVar[float] = 0.5  # a probability: where the published model begins to call a pixel foreground

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
    def encode_prompts(self, prompts: list[str]) -> Features:
        """What prompts give to every image alike: tensors of T rows, from the model's own tokenizers and towers."""

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """What the pretrained image towers make of the images: the part of `encode_images` that stays while they do."""
        return ()

    @abstractmethod
    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """What the images give to every prompt alike: tensors of B rows each, from pixel_values (B, 3, S, S).

        `activations` are those of `encode_towers` where they were kept; they are computed otherwise.
        """

    @abstractmethod
    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Logits (B, 1, S, S) from B rows of image features and as many of text features."""

    def forward(
        self, pixel_values: Tensor, prompts: Sequence[str] | Features, activations: Features | None = None
    ) -> Tensor:
        """Logits (B, 1, S, S) of B images, each with its own prompt.

        Args:
            pixel_values: (B, 3, S, S) float, normalised by `image_spec`.
            prompts: B texts, each distinct one encoded once, or B rows of what `encode_prompts` made of them.
            activations: what `encode_towers` made of the images, where it was kept.

        Raises:
            ValueError: there is not one prompt per image.
        """
        is_encoded = isinstance(prompts, tuple) and len(prompts) > 0 and isinstance(prompts[0], Tensor)
        count = 1 if isinstance(prompts, str) else len(prompts[0]) if is_encoded else len(prompts)
        if isinstance(prompts, str) or count != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} images but {count} prompts; give a list with one prompt per image")
        if not is_encoded:
            texts = cast(Sequence[str], prompts)
            distinct = list(dict.fromkeys(texts))
            rows = torch.tensor([distinct.index(prompt) for prompt in texts], device=self.device)
            prompts = tuple(part[rows] for part in self.encode_prompts(distinct))
        return self.decode(self.encode_images(pixel_values, activations), cast(Features, prompts))

    def set_trainable(self, trainable: Trainable = "decoder", lora_rank: int = 8) -> Self:
        """Choose what learns; everything outside the pretrained towers always does.

        Args:
            trainable: "decoder", the towers stay as published, without gradient and in eval mode; "lora", low-rank
                adapters in the image towers' attention learn too; "all", the towers learn as well.
            lora_rank: of the adapters.

        Raises:
            CheckpointError: lora for a model without towers, or none of the three.
        """
        if trainable not in get_args(Trainable):
            raise CheckpointError(f"trainable is {trainable!r}; it must be decoder, lora or all")
        if trainable == "lora" and not self._towers:
            raise CheckpointError(f"{type(self).__name__} has no pretrained towers that lora could adapt")
        for towers in self._towers:
            towers.set_trainable(trainable, lora_rank)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen towers stay in eval mode.

        Raises:
            CheckpointError: the batch norms are folded, so that the model could not learn what they did.
        """
        if mode and self.is_folded:
            raise CheckpointError(
                "a Segmenter has folded the model's batch norms; load the checkpoint anew to train it"
            )
        return super().train(mode)

    @property
    def has_frozen_towers(self) -> bool:
        """Whether there are towers and all stay as they are, so that what they make of an image can be kept."""
        return bool(self._towers) and all(towers.trainable == "decoder" for towers in self._towers)

    @property
    def learns_text(self) -> bool:
        """Whether text features change from step to step, so that prompts are to be encoded anew."""
        return any(towers.trainable == "all" for towers in self._towers)

    @property
    def _towers(self) -> list[Towers]:
        return [part for part in self.modules() if isinstance(part, Towers)]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class ImageOnlyModel(SegmentationModel):
    """A network that sees no text: every prompt gets the same logits, and the image goes through it once.

    Args:
        options: all that there is to say about it.
        network: pixel_values (B, 3, S, S) to logits (B, 1, S, S).
    """

    def __init__(self, options: Any, network: nn.Module) -> None:
        super().__init__()
        self.options = options
        self.image_spec = ImageSpec(options.image_size)
        self.network = network

    def save_files(self, folder: Path) -> None:
        """Nothing to write: the options say it all."""

    def encode_prompts(self, prompts: list[str]) -> Features:
        """(T, 0): no text enters."""
        return (torch.zeros(len(prompts), 0, device=self.device),)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """The whole network: logits (B, 1, S, S)."""
        return (self.network(pixel_values),)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """The logits of `encode_images`, whatever the prompt."""
        return image_features[0]
