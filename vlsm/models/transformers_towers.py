"""Pairs of an image tower and a text tower from transformers: SigLIP, SigLIP 2, CLIP, MetaCLIP 2, AIMv2, TIPSv2."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.tower_files import PAIRS
from vlsm.models.towers import Towers, choose_taps, cut_tokens, encode_by_length, wrong_side
from vlsm.models.transformers_source import (
    FOLDER,
    build_untrained,
    load_tokenizer,
    load_weights,
    read_config,
    read_image_spec,
)

# SigLIP's text towers attend to padding, were trained with it, and on text in lower case (SigLIP 2's older tokenizers
# do not change the case)
_PADDED = _LOWER = {"siglip", "siglip2"}
_PREFIX = {"clip": 1, "metaclip_2": 1, "tipsv2": 1}  # class tokens before the patches, besides register tokens
# of the model, its image tower and the embeddings: no tapped layer and no text embedding depends on them
_UNUSED = ("logit_scale", "logit_bias", "temperature", "visual_projection")
_UNUSED_IMAGE = ("post_layernorm", "layernorm", "rms_norm", "head")


class TransformersTowers(Towers):
    """The image tower and the text tower of a pair. The image tower ends at its last tapped layer.

    Args:
        model: the pair, such as transformers' SiglipModel.
        tokenizer: its tokenizer.
        image_spec: size, mean and std of the input.
        taps: 0-based indices of the image-tower layers whose outputs are used. None means the layers at a quarter, a
            half and three quarters of the depth.
    """

    lora_targets = r".*\blayers?\.\d+\.(self_attn|attention)\.(q|k|v|out|o)_proj"
    adapter_targets = r".*\blayers?\.\d+\.(self_attn|attention|mlp|ffn)"

    def __init__(self, model: Any, tokenizer: Any, image_spec: ImageSpec, taps: tuple[int, ...] | None = None) -> None:
        super().__init__()
        config, vision, text = model.config, model.config.vision_config, model.config.text_config
        self.config, self.kind = config, config.model_type
        self.model, self.tokenizer, self.image_spec = model, tokenizer, image_spec
        self.context_length = text.max_position_embeddings
        widths = (getattr(text, "projection_size", None), getattr(config, "projection_dim", None), text.hidden_size)
        self.text_width = next(width for width in widths if width)
        self.image_width = vision.hidden_size
        self.num_prefix_tokens = _PREFIX.get(self.kind, 0) + getattr(vision, "num_register_tokens", 0)
        size, patch = image_spec.size, _side(vision.patch_size)
        if size % patch:
            raise wrong_side(size, patch)
        if self.kind == "aimv2" and not vision.is_native and size != _side(vision.image_size):
            raise CheckpointError(f"image_size is {size}; AIMv2 takes its own size only, {vision.image_size}")
        self.grid, self._patch = size // patch, patch
        self._prune(taps)
        self.set_trainable("decoder")

    @classmethod
    def build(cls, source: str, image_size: int | None, taps: tuple[int, ...] | None = None) -> Self:
        """Build towers with pretrained weights.

        Args:
            source: hub id or local folder, as for from_pretrained.
            image_size: side of the input in pixels, or None for the model's size. For another size, the position
                embedding is resampled as in transformers.
            taps: see the class.

        Raises:
            CheckpointError: the source cannot be loaded, or is no pair of towers that is known here.
        """
        config = read_config(source, PAIRS)
        image_spec = read_image_spec(source, image_size or _default_size(config))
        model = load_weights(AutoModel, source, config.model_type, config=config)
        return cls(model, load_tokenizer(source), image_spec, taps)

    @classmethod
    def restore(cls, folder: Path, image_size: int | None, taps: tuple[int, ...] | None = None) -> Self:
        """Build the towers and tokenizer of a checkpoint directory. The caller loads weights, mean and std."""
        source = str(folder / FOLDER)
        config = read_config(source, PAIRS)
        image_spec = ImageSpec(image_size or _default_size(config))
        return cls(build_untrained(config), load_tokenizer(source, local_files_only=True), image_spec, taps)

    @property
    def image_tower(self) -> nn.Module:
        """The vision transformer."""
        return self.model.vision_model

    @property
    def text_tower(self) -> nn.Module:
        """The text transformer."""
        return self.model.text_model

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Return the ids of each prompt, (L,) int64, with padding for SigLIP's text towers, which attend to it."""
        if self.kind in _LOWER:
            prompts = [prompt.lower() for prompt in prompts]
        end, pad, length = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.context_length
        rows = []
        for prompt, ids in zip(prompts, self.tokenizer(prompts, verbose=False)["input_ids"], strict=True):
            ids = cut_tokens(prompt, ids, length, "the text tower", has_end=ids[-1:] == [end])
            # an empty prompt of TIPSv2 has no tokens at all: one of padding stands for it
            padding = [pad] * ((length if self.kind in _PADDED else 1) - len(ids))
            rows.append(torch.tensor(padding + ids if self.tokenizer.padding_side == "left" else ids + padding))
        return rows

    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """Return the text embeddings, (T, text_width)."""
        device = next(self.model.text_model.parameters()).device

        def encode(ids: Tensor) -> tuple[Tensor]:
            ids = ids.to(device)
            return (self.model.get_text_features(input_ids=ids, attention_mask=self._mask(ids)).pooler_output,)

        return encode_by_length(tokens, encode)[0]

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the tapped layers, (B, L, W) each."""
        activations = []
        hidden = self._embed(pixel_values)
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, None)
            if index in self.taps:
                activations.append(hidden)
        return tuple(activations)

    def save_files(self, folder: Path) -> None:
        """Write the configuration of the pair, and its tokenizer."""
        self.config.save_pretrained(folder / FOLDER)
        self.tokenizer.save_pretrained(folder / FOLDER)

    @property
    def _layers(self) -> nn.ModuleList:
        encoder = self.model.vision_model.encoder
        return encoder.layer if self.kind == "tipsv2" else encoder.layers

    def _prune(self, taps: tuple[int, ...] | None) -> None:
        """Remove the layers above the last tap, and all parts that no output depends on."""
        tower = self.model.vision_model
        self.taps = choose_taps(taps, len(self._layers))
        del self._layers[self.taps[-1] + 1 :]
        for owner, names in ((self.model, _UNUSED), (tower, _UNUSED_IMAGE), (tower.embeddings, ("mask_token",))):
            for name in names:
                if hasattr(owner, name):
                    delattr(owner, name)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Return the tokens (B, L, W) that enter the first layer."""
        tower = self.model.vision_model
        if self.kind in ("aimv2", "tipsv2"):
            return tower.embeddings(pixel_values)
        if self.kind != "siglip2":
            hidden = tower.embeddings(pixel_values, interpolate_pos_encoding=True)
            return tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden
        embeddings, grid, patch = tower.embeddings, self.grid, self._patch
        patches = pixel_values.reshape(*pixel_values.shape[:2], grid, patch, grid, patch)
        tokens = embeddings.patch_embedding(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        side = embeddings.position_embedding_size
        return tokens + embeddings.resize_positional_embeddings(
            embeddings.position_embedding.weight.unflatten(0, (side, side)),
            torch.tensor([[grid, grid]], device="cpu"),  # transformers reads them one by one
            grid * grid,
        )

    def _mask(self, ids: Tensor) -> Tensor | None:
        """Return the attention mask of equally long prompts (T, L), or None if the tower needs none."""
        if self.kind == "tipsv2":  # without a mask, an empty prompt would be its padding
            return (ids != self.tokenizer.pad_token_id).long()
        if self.kind == "aimv2":  # transformers' tower is causal only where the batch has padding
            length = ids.shape[1]
            return torch.ones(length, length, dtype=torch.bool, device=ids.device).tril().expand(len(ids), 1, -1, -1)
        return None


def _default_size(config: Any) -> int:
    vision = config.vision_config
    if config.model_type == "siglip2":
        return int(vision.num_patches**0.5) * _side(vision.patch_size)
    return _side(vision.image_size)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise CheckpointError(f"the image tower takes {size} pixels; only squares are supported")
    return sides.pop()
