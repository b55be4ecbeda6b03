"""CLIPSeg from transformers. This module calls its two towers and its decoder separately."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPSegConfig
from transformers.models.clipseg.modeling_clipseg import CLIPSegModel

from vlsm.errors import CheckpointError
from vlsm.images.preprocess import ImageSpec
from vlsm.models.decoder import PromptDecoder, load_network
from vlsm.models.options import CLIPSegOptions
from vlsm.models.towers import Towers, cut_tokens, encode_by_length
from vlsm.models.transformers_source import load_tokenizer
from vlsm.models.vlsm import VLSM

_FOLDER = "clipseg"


class CLIPSegTowers(Towers):
    """CLIP's image tower and text tower from transformers' CLIPSeg.

    transformers runs both towers under no_grad, even if their parameters require gradients. This class calls them
    directly, so that they can learn. It leaves out the parts that no output of CLIPSeg depends on: the layers above the
    last tapped layer, the image projection, and the logit scale.
    """

    lora_targets = r".*self_attn\.(q|k|v|out)_proj"
    adapter_targets = r".*\blayers\.\d+\.(self_attn|mlp)"

    def __init__(self, config: CLIPSegConfig, clip: CLIPSegModel, tokenizer: Any, image_size: int) -> None:
        super().__init__()
        vision = config.vision_config
        if image_size % vision.patch_size:
            raise CheckpointError(
                f"image_size is {image_size}; it must be a multiple of the patch size {vision.patch_size}"
            )
        if list(config.extract_layers) != sorted(set(config.extract_layers)):
            raise CheckpointError(
                f"extract_layers of the CLIPSeg are {config.extract_layers!s:.100}; they must increase"
            )
        self.config = config
        self.taps = list(config.extract_layers)
        self.clip = clip
        self.tokenizer = tokenizer
        self.image_spec = ImageSpec(image_size)
        self.text_width, self.image_width = config.projection_dim, vision.hidden_size
        self.grid, self.num_prefix_tokens = image_size // vision.patch_size, 1
        tower = clip.vision_model
        tower.encoder.layers = tower.encoder.layers[: max(self.taps) + 1]
        tower.post_layernorm = clip.visual_projection = nn.Identity()
        del clip.logit_scale
        self.set_trainable("decoder")

    @property
    def image_tower(self) -> nn.Module:
        """The vision transformer."""
        return self.clip.vision_model

    @property
    def text_tower(self) -> nn.Module:
        """CLIP's text transformer, without the projection."""
        return self.clip.text_model

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Return the byte-pair ids of each prompt, (L,) int64; L is at most 77 in the published model."""
        limit = self.config.text_config.max_position_embeddings
        id_rows = self.tokenizer(prompts, verbose=False)["input_ids"]
        tower = f"the text tower of {type(self).__name__.removesuffix('Towers')}"
        return [
            torch.tensor(cut_tokens(prompt, ids, limit, tower)) for prompt, ids in zip(prompts, id_rows, strict=True)
        ]

    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """Return the projected text embeddings, (T, text_width); the published width is 512."""
        device = self.clip.text_projection.weight.device

        def encode(ids: Tensor) -> tuple[Tensor]:
            return (self.clip.get_text_features(input_ids=ids.to(device, non_blocking=True)).pooler_output,)

        return encode_by_length(tokens, encode)[0]

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the layers in `extract_layers`, (B, L, W) each; the published W is 768."""
        tower = self.clip.vision_model
        activations = []
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))
        for index, layer in enumerate(tower.encoder.layers):
            hidden = layer(hidden, None)
            if index in self.taps:
                activations.append(hidden)
        return tuple(activations)

    def save_files(self, folder: Path) -> None:
        """Write the network's configuration and the tokenizer."""
        self.config.save_pretrained(folder / _FOLDER)
        self.tokenizer.save_pretrained(folder / _FOLDER)


def load_towers(source: str, image_size: int) -> tuple[CLIPSegTowers, PromptDecoder]:
    """Return CLIPSeg's pretrained towers and its pretrained decoder."""
    network = load_network(source)
    decoder = PromptDecoder(network.config)
    decoder.load_state_dict(network.decoder.state_dict())
    return CLIPSegTowers(network.config, network.clip, load_tokenizer(source), image_size), decoder


def restore_towers(folder: Path, image_size: int) -> tuple[CLIPSegTowers, PromptDecoder]:
    """Return the towers and the decoder of a checkpoint directory. The caller loads their weights afterwards."""
    config = CLIPSegConfig.from_pretrained(folder / _FOLDER, local_files_only=True)
    tokenizer = load_tokenizer(str(folder / _FOLDER), local_files_only=True)
    return CLIPSegTowers(config, CLIPSegModel(config), tokenizer, image_size), PromptDecoder(config)


class CLIPSeg(VLSM):
    """CLIPSeg from transformers, in the steps of `SegmentationModel`.

    Source: CLIPSeg, CVPR 2022, arXiv 2112.10003.
    """

    @classmethod
    def build(cls, options: CLIPSegOptions) -> Self:
        """Build the network with pretrained weights.

        Raises:
            CheckpointError: the source is neither a folder with a CLIPSeg model nor a hub id that can be reached.
        """
        return cls.assemble(options, *load_towers(options.source, options.image_size))

    @classmethod
    def restore(cls, options: CLIPSegOptions, folder: Path) -> Self:
        """Build the network from the architecture and tokenizer in a checkpoint directory."""
        return cls.assemble(options, *restore_towers(folder, options.image_size))

    @classmethod
    def assemble(cls, options: Any, towers: CLIPSegTowers, decoder: PromptDecoder) -> Self:
        """Build the model from towers and a decoder."""
        return cls(options, towers, decoder)
