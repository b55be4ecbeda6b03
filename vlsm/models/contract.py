"""The contract of every model. Training and segmentation use models only through it."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlsm.config import Settings
from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.options import Adapted, TowerOptions, Trainable
from vlsm.models.towers import Towers

Features = tuple[Tensor, ...]


class SegmentationModel(nn.Module):
    """A network that turns images and prompts into logits.

    It works in three steps, so that nothing is computed twice: `encode_prompts` once per prompt, `encode_images` once
    per image, and `decode` once per pair. `forward` chains the three.

    B is the number of images, T the number of distinct prompts, S the side of the model's input in pixels. Image
    features and text features are tuples of tensors with one row per image or prompt. Each model chooses the number of
    tensors and their widths.
    """

    options: Settings
    image_spec: ImageSpec
    is_folded = False  # True after `fold_batch_norms`; the model then serves inference only
    has_sizes: ClassVar[bool] = True  # False: names alone describe the network, so no file can make it large
    threshold: ClassVar[float] = 0.5  # probability at or above which the published model marks a pixel as foreground

    @classmethod
    @abstractmethod
    def build(cls, options: Any) -> Self:
        """Build a model from its options, with pretrained weights if the options name a source."""

    @classmethod
    @abstractmethod
    def restore(cls, options: Any, folder: Path) -> Self:
        """Build the architecture of a checkpoint directory. The caller loads its weights afterwards."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write the files that `restore` needs besides the options, such as tokenizer files."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return the text features, tensors of T rows each. They do not depend on the image."""

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the activations of the pretrained image towers. They stay the same while the towers are frozen."""
        return ()

    @abstractmethod
    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the image features, tensors of B rows each. They do not depend on the prompt.

        Args:
            pixel_values: (B, 3, S, S) float, normalised by `image_spec`.
            activations: stored results of `encode_towers` for these images; None computes them.
        """

    @abstractmethod
    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return logits (B, 1, S, S) for B rows of image features and B rows of text features."""

    def decode_with_presence(self, image_features: Features, text_features: Features) -> tuple[Tensor, Tensor | None]:
        """Return the logits of `decode`, and the presence: logits (B,) of the image showing the prompt at all.

        The presence is None for models that do not compute it. Segmentation uses this step, training uses `decode`.
        """
        return self.decode(image_features, text_features), None

    def embed_images(self, activations: Features) -> Tensor:
        """Return an embedding of each image, (B, `embedding_width`) float32 of length 1.

        Args:
            activations: results of `encode_towers` of a model that has towers.
        """
        return functional.normalize(self._towers[0].pool(activations), dim=1)

    @property
    def embedding_width(self) -> int:
        """Width of an embedding; 0 if the model has no image tower, and so no embeddings."""
        return self._towers[0].embedding_width if self._towers else 0

    def forward(
        self, pixel_values: Tensor, prompts: Sequence[str] | Features, activations: Features | None = None
    ) -> Tensor:
        """Return logits (B, 1, S, S) of B images with one prompt each.

        Args:
            pixel_values: (B, 3, S, S) float, normalised by `image_spec`.
            prompts: B texts (each distinct text is encoded once), or text features with B rows.
            activations: stored results of `encode_towers` for these images; None computes them.

        Raises:
            ValueError: the number of prompts differs from the number of images.
        """
        is_encoded = isinstance(prompts, tuple) and len(prompts) > 0 and isinstance(prompts[0], Tensor)
        num_prompts = 1 if isinstance(prompts, str) else len(prompts[0]) if is_encoded else len(prompts)
        if isinstance(prompts, str) or num_prompts != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images but {num_prompts} prompts; give a list with one prompt per image"
            )
        if not is_encoded:
            texts = cast(Sequence[str], prompts)
            distinct = list(dict.fromkeys(texts))
            text_rows = torch.tensor([distinct.index(prompt) for prompt in texts]).to(self.device, non_blocking=True)
            prompts = tuple(features[text_rows] for features in self.encode_prompts(distinct))
        return self.decode(self.encode_images(pixel_values, activations), cast(Features, prompts))

    def set_trainable(
        self,
        trainable: Trainable = "decoder",
        lora_rank: int = 8,
        adapt: Adapted = "image",
        adapter_width: int = 64,
    ) -> Self:
        """Choose which parts of the towers learn, and return the model. All parts outside the towers always learn.

        Args:
            trainable: "decoder" freezes the towers: no gradients, eval mode. "lora" also trains low-rank adapters in
                the attention of the towers, and "dora" their magnitudes too; a saved checkpoint has them in its
                weights. "adapters" trains a small layer after each attention and each MLP, which stays in the model.
                "all" trains the towers.
            lora_rank: rank of the adapters of lora and dora.
            adapt: the towers that lora, dora and adapters adapt.
            adapter_width: channels inside each layer of adapters.

        Raises:
            CheckpointError: trainable is none of these, or the model has no towers that can be adapted this way.
        """
        if trainable not in get_args(Trainable):
            *others, last = get_args(Trainable)
            raise CheckpointError(f"trainable is {trainable!r}; it must be {', '.join(others)} or {last}")
        if trainable not in ("decoder", "all") and not self._towers:
            raise CheckpointError(
                f"{type(self).__name__} has no pretrained towers that {trainable} could adapt; use trainable decoder"
            )
        for towers in self._towers:
            towers.set_trainable(trainable, lora_rank, adapt, adapter_width)
        if trainable == "adapters":  # the options describe the network completely
            names = ("image", "text") if adapt == "both" else (adapt,)
            widths = cast(TowerOptions, self.options).adapters | dict.fromkeys(names, adapter_width)
            self.options = self.options.model_copy(update={"adapters": widths})
        return self.train(self.training)

    def add_adapters(self) -> Self:
        """Add the adapters that the options name, and return the model. The caller loads their weights."""
        if isinstance(self.options, TowerOptions):
            for name, width in self.options.adapters.items():
                for towers in self._towers:
                    towers.add_adapters(name, width)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode (frozen towers stay in eval mode) or eval mode, and return the model.

        Raises:
            CheckpointError: the batch norms are folded; a folded model cannot be trained.
        """
        if mode and self.is_folded:
            raise CheckpointError(
                "a Segmenter has folded the model's batch norms; load the checkpoint again to train the model"
            )
        return super().train(mode)

    @property
    def has_frozen_towers(self) -> bool:
        """Whether the model has image towers and all of them are frozen, so that their activations can be stored."""
        return bool(self._towers) and not any(towers.learns_images for towers in self._towers)

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return 1

    @property
    def num_text_features(self) -> int:
        """Number of tensors that `encode_prompts` returns."""
        return 1

    @property
    def learns_text(self) -> bool:
        """Whether text features change during training, so that prompts must be encoded at every step."""
        return any(towers.learns_text for towers in self._towers)

    @property
    def _towers(self) -> list[Towers]:
        return [module for module in self.modules() if isinstance(module, Towers)]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


class ImageOnlyModel(SegmentationModel):
    """A network that ignores the prompt: every prompt gets the same logits, and each image is computed once.

    Args:
        options: the complete description of the network.
        network: maps pixel_values (B, 3, S, S) to logits (B, 1, S, S).
    """

    def __init__(self, options: Any, network: nn.Module) -> None:
        super().__init__()
        self.options = options
        self.image_spec = ImageSpec(options.image_size)
        self.network = network

    def save_files(self, folder: Path) -> None:
        """Write nothing: the options describe the network completely."""

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return empty text features, (T, 0)."""
        return (torch.zeros(len(prompts), 0, device=self.device),)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the logits (B, 1, S, S) of the whole network as image features."""
        return (self.network(pixel_values),)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return the logits of `encode_images`, the same for every prompt."""
        return image_features[0]


def renormalize(pixel_values: Tensor, current: ImageSpec, wanted: ImageSpec) -> Tensor:
    """Return normalised images (B, 3, S, S) with the mean and std of `wanted` instead of `current`."""
    if (current.mean, current.std) == (wanted.mean, wanted.std):
        return pixel_values

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values).to(pixel_values, non_blocking=True)[:, None, None]

    pixels = pixel_values * column(current.std) + column(current.mean)
    return (pixels - column(wanted.mean)) / column(wanted.std)
