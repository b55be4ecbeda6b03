"""What the pretrained image and text towers of all models have in common, whatever library they come from."""

import copy
import pickle
import textwrap
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from vlsm.images.decode import ImageSpec

ModelT = TypeVar("ModelT", bound=nn.Module)
Trainable = Literal["decoder", "lora", "all"]


class Towers(nn.Module):
    """A pair of pretrained towers: prompts to text embeddings, images to the activations of chosen layers.

    B images, T prompts, L image tokens (patches, and class tokens before them), W the width of the image tower.

    Attributes:
        image_spec: what the image tower was trained on.
        text_width: of a text embedding.
        image_width: W.
        taps: 0-based indices of the image-tower layers whose outputs are wanted.
        grid: patches along one side of the image.
        num_prefix_tokens: class tokens and the like before the patches.
    """

    lora_targets: ClassVar[str]  # a regular expression: the linear layers of the image tower's attention

    image_spec: ImageSpec
    text_width: int
    image_width: int
    taps: Sequence[int]
    grid: int
    num_prefix_tokens: int

    def __init__(self) -> None:
        super().__init__()
        self.trainable: Trainable = "decoder"
        self._adapters: list[Any] = []  # peft's handle; a list, since it must not be registered as a child

    @property
    @abstractmethod
    def image_tower(self) -> nn.Module:
        """The module that `lora` adapts."""

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """The token ids of each prompt, (L,) int64 without padding; a prompt that is too long is cut with a warning."""

    @abstractmethod
    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """(T, text_width) text embeddings, projected, not normalised."""

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The tapped activations, (B, L, W) each, in the order of depth; deeper layers than the last do not exist."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write architecture and tokenizer in the library's own format."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """(T, text_width) text embeddings of texts."""
        return self.encode_tokens(self.tokenize(prompts))

    def set_trainable(self, trainable: Trainable, lora_rank: int = 8) -> None:
        """Freeze both towers, adapt the image tower's attention, or let both learn.

        Source: LoRA, arXiv 2106.09685, through the peft library; alpha is twice the rank.
        """
        self.merge_adapters()
        self.trainable = trainable
        self.requires_grad_(trainable == "all")
        if trainable == "lora":
            from peft import LoraConfig, LoraModel  # slow to import, and inference needs none of it

            config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=self.lora_targets)
            self._adapters = [LoraModel(self.image_tower, config, "default")]
        self.train(self.training)

    def merge_adapters(self) -> None:
        """Add what LoRA learned to the weights it adapts, in place."""
        for adapter in self._adapters:
            adapter.merge_and_unload()
        self._adapters = []

    def train(self, mode: bool = True) -> "Towers":
        """Training mode only where the towers themselves learn: dropout must not disturb frozen ones."""
        return super().train(mode and self.trainable == "all")


def merged_copy(model: ModelT) -> ModelT:
    """The model for inference: itself, or a copy with its LoRA adapters merged."""
    if not any(isinstance(part, Towers) and part._adapters for part in model.modules()):
        return model
    copied = copy.deepcopy(model)
    for part in copied.modules():
        if isinstance(part, Towers):
            part.merge_adapters()
    return copied


def cut_tokens(prompt: str, ids: list[int], limit: int, tower: str) -> list[int]:
    """The ids, cut to the tower's context with the last one (end of text) kept, and a warning that names the prompt."""
    if len(ids) <= limit:
        return ids
    warnings.warn(
        f"prompt {textwrap.shorten(prompt, 80)!r} has {len(ids)} tokens; {tower} reads {limit}, the rest is not seen",
        stacklevel=4,
    )
    return [*ids[: limit - 1], ids[-1]]


def encode_by_length(tokens: list[Tensor], encode: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `encode` makes of each row of tokens, in their order.

    Rows of equal length go through together: padding is never computed, and nothing depends on the other rows.

    Args:
        tokens: T rows of ids, (L,) each.
        encode: (n, L) ids to tensors of n rows.
    """
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(index)
    encoded = [encode(torch.stack([tokens[index] for index in group])) for group in by_length.values()]
    order = torch.tensor([index for group in by_length.values() for index in group]).argsort()
    return tuple(torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*encoded, strict=True))


# what the libraries raise for folders that are incomplete, damaged, or of something else
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
    """Why pretrained weights could not be loaded, on one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "they are a pickle that holds more than tensors, which could run code"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, HFValidationError):
            return "there is no such folder"
        if isinstance(chain, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return "it is no local folder, and the hub cannot be reached"
        chain = chain.__cause__ or chain.__context__
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return textwrap.shorten(str(reason), 300) or type(error).__name__
