"""CLIPSeg: transformers' own network, its two towers and its decoder called one by one."""

from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, CLIPSegConfig, CLIPSegForImageSegmentation

from vlsm.config import Settings
from vlsm.errors import CheckpointError
from vlsm.images import ImageSpec
from vlsm.models.contract import Features, SegmentationModel

_FOLDER = "clipseg"


class CLIPSegOptions(Settings):
    """Where the pretrained weights come from, and the input size."""

    source: str = Field("CIDAS/clipseg-rd64-refined", description="hub id or local folder, as from_pretrained takes it")
    image_size: int = Field(352, ge=16, description="side of the input square in pixels")


class CLIPSeg(SegmentationModel):
    """Image-tower activations and a text embedding, through a light transformer decoder.

    Equal to transformers' forward, but each tower runs once, and the image tower only as deep as its last tapped layer.

    Source: CLIPSeg, CVPR 2022, arXiv 2112.10003.
    """

    Options = CLIPSegOptions
    options: CLIPSegOptions

    def __init__(self, options: CLIPSegOptions, network: CLIPSegForImageSegmentation, tokenizer: Any) -> None:
        super().__init__()
        patch = network.config.vision_config.patch_size
        if options.image_size % patch:
            raise CheckpointError(
                f"image_size is {options.image_size}; it must be a multiple of the patch size {patch}"
            )
        self.options = options
        self.image_spec = ImageSpec(options.image_size)
        self.network = network
        self.tokenizer = tokenizer
        self.network.clip.requires_grad_(False)  # the towers stay as published; the decoder learns

    @classmethod
    def build(cls, options: CLIPSegOptions) -> Self:
        """The network with pretrained weights.

        Raises:
            CheckpointError: the source is neither a folder of a CLIPSeg model nor a hub id that can be reached.
        """
        try:
            network = CLIPSegForImageSegmentation.from_pretrained(options.source, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(options.source)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"CLIPSeg weights {options.source!r} cannot be loaded: {str(error).splitlines()[0]}; "
                "give a local folder, or a hub id where the hub can be reached"
            ) from error
        return cls(options, network.float(), tokenizer)

    @classmethod
    def restore(cls, options: CLIPSegOptions, folder: Path) -> Self:
        """The architecture and tokenizer of a checkpoint directory."""
        config = CLIPSegConfig.from_pretrained(folder / _FOLDER)
        return cls(options, CLIPSegForImageSegmentation(config), AutoTokenizer.from_pretrained(folder / _FOLDER))

    def save_files(self, folder: Path) -> None:
        """The network's configuration and the tokenizer, in transformers' own format."""
        self.network.config.save_pretrained(folder / _FOLDER)
        self.tokenizer.save_pretrained(folder / _FOLDER)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """(T, 512) projected text features; prompts longer than the text tower's context are cut there."""
        limit = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            return self.network.clip.get_text_features(
                input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
            ).pooler_output

    def encode_images(self, pixel_values: Tensor) -> Features:
        """The tapped activations, (B, L, 768) each; L counts the patches and the class token."""
        tower = self.network.clip.vision_model
        activations: dict[int, Tensor] = {}
        with torch.no_grad():
            hidden = tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))
            for index, layer in enumerate(tower.encoder.layers[: max(self.network.extract_layers) + 1]):
                hidden = layer(hidden, None)
                if index in self.network.extract_layers:
                    activations[index] = hidden
        return tuple(activations[index] for index in self.network.extract_layers)

    def decode(self, features: Features, text_embeddings: Tensor) -> Tensor:
        """Logits (B, 1, S, S) from the activations and one text embedding per image."""
        return self.network.decoder(features, text_embeddings).logits[:, None]
