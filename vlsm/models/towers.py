"""The common interface of pretrained image and text towers, and functions for towers from any library."""

import copy
import pickle
import textwrap
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.adapters import add_bottlenecks, add_low_rank
from vlsm.models.options import Adapted, Trainable

ModelT = TypeVar("ModelT", bound=nn.Module)


class Towers(nn.Module):
    """A pretrained text tower (prompts to text embeddings) and image tower (images to activations of chosen layers).

    B is the number of images, T the number of prompts, L the number of image tokens (class tokens, then patches) or of
    a prompt's token ids, W the width of the image tower.

    Attributes:
        image_spec: input size, mean and std that the image tower expects.
        text_width: width of a text embedding.
        image_width: W.
        taps: 0-based indices of the image-tower layers whose outputs are used.
        grid: number of patches along one side of the image.
        num_prefix_tokens: number of tokens before the patches, such as class tokens.
        trainable: the last one of `set_trainable`.
        learns_images, learns_text: whether the results of the image tower, and of the text tower, change in a training.
    """

    # regular expressions for both towers: the linear layers of the attention; attention and MLP of a block
    lora_targets: ClassVar[str]
    adapter_targets: ClassVar[str]

    image_spec: ImageSpec
    text_width: int
    image_width: int
    taps: Sequence[int]
    grid: int
    num_prefix_tokens: int

    def __init__(self) -> None:
        super().__init__()
        self.trainable: Trainable = "decoder"
        self.learns_images = self.learns_text = False
        self._adapters: list[Any] = []  # peft's LoraModel; inside a list, torch does not register it as a child

    @property
    @abstractmethod
    def image_tower(self) -> nn.Module:
        """The image tower, as far as adapters may change it."""

    @property
    @abstractmethod
    def text_tower(self) -> nn.Module:
        """The text tower, as far as adapters may change it."""

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Return the token ids of each prompt, (L,) int64, with padding only if the text tower does not ignore it.

        A prompt that is too long is cut, with a warning.
        """

    @abstractmethod
    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """Return text embeddings, (T, text_width), projected, not normalised."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the tapped layers, (B, L, W) each, shallowest first. The tower ends at the last tap."""

    @property
    def embedding_width(self) -> int:
        """Width of the vectors of `pool`."""
        return self.image_width

    def pool(self, activations: tuple[Tensor, ...]) -> Tensor:
        """Return one vector per image, (B, W) float32, from the results of `encode_images`.

        It is the mean of the patches after the last tapped layer: the layers and the projection behind it, which would
        lead into the space of the text embeddings, are not built.
        """
        return activations[-1][:, self.num_prefix_tokens :].float().mean(dim=1)

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write the architecture and the tokenizer in the format of their library."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the text embeddings of prompts, (T, text_width)."""
        return self.encode_tokens(self.tokenize(prompts))

    def set_trainable(
        self, trainable: Trainable, lora_rank: int = 8, adapt: Adapted = "image", adapter_width: int = 64
    ) -> None:
        """Freeze both towers, let adapters of the chosen towers learn, or all weights; see `SegmentationModel`.

        Raises:
            CheckpointError: a chosen tower cannot be adapted this way.
        """
        self.merge_adapters()
        self.trainable = trainable
        self.requires_grad_(trainable == "all")
        has_adapters = trainable not in ("decoder", "all")
        self.learns_images = trainable == "all" or (has_adapters and adapt != "text")
        self.learns_text = trainable == "all" or (has_adapters and adapt != "image")
        for tower in self._adapted(adapt) if has_adapters else ():
            if trainable == "adapters":
                add_bottlenecks(tower, self.adapter_targets, adapter_width)
            else:
                self._adapters.append(add_low_rank(tower, self.lora_targets, lora_rank, trainable == "dora"))
        self.train(self.training)

    def add_adapters(self, adapt: Adapted, width: int) -> None:
        """Add frozen bottlenecks, whose weights the caller loads."""
        for tower in self._adapted(adapt):
            add_bottlenecks(tower, self.adapter_targets, width)
            tower.requires_grad_(False)

    def _adapted(self, adapt: Adapted) -> list[nn.Module]:
        return {
            "image": [self.image_tower],
            "text": [self.text_tower],
            "both": [self.image_tower, self.text_tower],
        }[adapt]

    def merge_adapters(self) -> None:
        """Add the low-rank adapters to the weights that they adapt, in place, and remove them. Bottlenecks stay."""
        for adapter in self._adapters:
            adapter.merge_and_unload()
        self._adapters = []

    def train(self, mode: bool = True) -> "Towers":
        """Set training mode only if `trainable` is "all": frozen towers must not apply dropout."""
        return super().train(mode and self.trainable == "all")


def merged_copy(model: ModelT) -> ModelT:
    """Return the model for inference: the model itself, or a merged copy if it has low-rank adapters."""
    if not any(isinstance(module, Towers) and module._adapters for module in model.modules()):
        return model
    merged_model = copy.deepcopy(model)
    for module in merged_model.modules():
        if isinstance(module, Towers):
            module.merge_adapters()
    return merged_model


def choose_taps(taps: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Return the taps of an image tower: the given ones, or the layers at a quarter, a half and three quarters.

    Raises:
        CheckpointError: the taps do not increase, or the tower has fewer layers.
    """
    taps = taps or tuple(depth * quarter // 4 for quarter in (1, 2, 3))
    if not all(0 <= tap < depth for tap in taps) or list(taps) != sorted(set(taps)):
        raise CheckpointError(
            f"taps are {list(taps)!s:.99}; they must increase, and the image tower has blocks 0 to {depth - 1}"
        )
    return taps


def wrong_side(size: int, patch: int) -> CheckpointError:
    """Return the error for a side of the input that patches do not divide: the last pixels would be cut off."""
    valid_sizes = f"{size // patch * patch} or {(size // patch + 1) * patch}"
    return CheckpointError(
        f"image_size is {size}; it must be a multiple of the patch size {patch}, such as {valid_sizes}"
    )


def cut_tokens(prompt: str, ids: list[int], limit: int, tower: str, has_end: bool = True) -> list[int]:
    """Return the ids, cut to the tower's limit. A warning names a cut prompt.

    Args:
        prompt: the text of the ids.
        ids: its ids.
        limit: number of ids that the tower reads.
        tower: its name in the warning.
        has_end: the last id is an end of text, which is kept.
    """
    if len(ids) <= limit:
        return ids
    warnings.warn(
        f"prompt {textwrap.shorten(prompt, 80)!r} has {len(ids)} tokens; {tower} reads {limit} and ignores the others",
        stacklevel=4,
    )
    return [*ids[: limit - 1], ids[-1]] if has_end else ids[:limit]


def encode_by_length(tokens: list[Tensor], encode: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the results of `encode` for all rows of tokens, in the order of the rows.

    Rows of equal length are encoded together. No row needs padding, so no result depends on the other rows.

    Args:
        tokens: T rows of ids, (L,) each.
        encode: maps ids (n, L) to tensors of n rows.
    """
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(index)
    encoded = [encode(torch.stack([tokens[index] for index in group])) for group in by_length.values()]
    order = torch.tensor([index for group in by_length.values() for index in group]).argsort()
    return tuple(torch.cat(parts)[order.to(parts[0].device, non_blocking=True)] for parts in zip(*encoded, strict=True))


# exceptions of the libraries for folders that are incomplete, damaged, or of a different kind
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    StrictDataclassError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


def explain_source(error: BaseException) -> str:
    """Return the reason why pretrained weights cannot be loaded, on one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "they are a pickle with objects other than tensors, which could run code"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, HFValidationError):
            return "there is no such folder"
        if isinstance(chain, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return "it is not a local folder, and the hub cannot be reached"
        chain = chain.__cause__ or chain.__context__
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return textwrap.shorten(str(reason), 300) or type(error).__name__
