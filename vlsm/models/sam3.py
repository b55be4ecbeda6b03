"""SAM 3 from transformers: its semantic masks, in the steps of the contract."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from vlsm.images.preprocess import ImageSpec
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.fusion import build_unet_d
from vlsm.models.options import SAM3Options
from vlsm.models.sam3_weights import load_meta_weights
from vlsm.models.tower_files import SAMS
from vlsm.models.towers import Towers, cut_tokens, encode_by_length, wrong_side
from vlsm.models.transformers_source import FOLDER, build_untrained, load_tokenizer, load_weights, read_config

CONTEXT = 32  # tokens of a prompt, for all published text towers; transformers' processor pads to it
_LITE = "sam3_lite_text"


class SAM3Towers(Towers):
    """SAM 3's image tower with its feature pyramid, and its text tower.

    Args:
        model: transformers' Sam3Model or Sam3LiteTextModel. Its towers become parts of this module.
        tokenizer: its tokenizer.
        image_size: side of the input in pixels.
    """

    lora_targets = r".*\blayers\.\d+\.(attention|self_attn)\.(q|k|v|o|out)_proj"
    adapter_targets = r".*\blayers\.\d+\.(attention|self_attn|mlp)"

    def __init__(self, model: Any, tokenizer: Any, image_size: int) -> None:
        super().__init__()
        self.config, self.tokenizer = model.config, tokenizer
        self.image_spec = ImageSpec(image_size, (0.5,) * 3, (0.5,) * 3)
        self.vision, self.text, self.text_projection = model.vision_encoder, model.text_encoder, model.text_projection
        backbone = self.vision.config.backbone_config
        if image_size % backbone.patch_size:
            raise wrong_side(image_size, backbone.patch_size)
        self.grid, self.num_prefix_tokens = image_size // backbone.patch_size, 0
        self.image_width, self.text_width = backbone.hidden_size, self.text_projection.out_features
        self.taps = (backbone.num_hidden_layers - 1,)
        # masks use all levels of the pyramid but the last, and no pooled text embedding
        self.vision.neck.fpn_layers = self.vision.neck.fpn_layers[:-1]
        self._is_lite = self.config.model_type == _LITE
        setattr(self.text, "projection" if self._is_lite else "text_projection", nn.Identity())
        self.set_trainable("decoder")

    @property
    def image_tower(self) -> nn.Module:
        """The vision transformer, without the pyramid."""
        return self.vision.backbone

    @property
    def text_tower(self) -> nn.Module:
        """The text transformer, without the projection."""
        return self.text

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Return the byte-pair ids of each prompt, (L,) int64, L at most 32, without padding."""
        id_rows = self.tokenizer(prompts, verbose=False)["input_ids"]
        return [
            torch.tensor(cut_tokens(prompt, ids, CONTEXT, "SAM 3's text tower"))
            for prompt, ids in zip(prompts, id_rows, strict=True)
        ]

    def encode_tokens(self, tokens: list[Tensor]) -> Tensor:
        """Return the features of each token, (T, 32, text_width), 0 at padding."""
        return self.encode_words(tokens)[0]

    def encode_words(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the features of each token, (T, 32, text_width), 0 at padding, and a bool (T, 32), true at tokens."""
        device = self.text_projection.weight.device

        def encode(ids: Tensor) -> tuple[Tensor, Tensor]:
            length = ids.shape[1]
            is_token = (torch.arange(CONTEXT, device=device) < length).expand(len(ids), -1)
            ids = ids.to(device)
            if self._is_lite:  # its convolutions and resampled positions see the padding
                ids = functional.pad(ids, (0, CONTEXT - length), value=self.tokenizer.pad_token_id)
                hidden = self.text(input_ids=ids, attention_mask=is_token[:, None, None]).last_hidden_state
            else:  # causal: no token sees the padding after it
                hidden = self.text(input_ids=ids).last_hidden_state
            words = self.text_projection(hidden)[:, :length]
            return functional.pad(words, (0, 0, 0, CONTEXT - length)), is_token

        words, is_token = encode_by_length(tokens, encode)
        return words, is_token

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the last layer, (B, L, W)."""
        return (self.vision.backbone(pixel_values).last_hidden_state,)

    def build_pyramid(self, activations: Tensor) -> tuple[Tensor, ...]:
        """Return maps (B, text_width, H, H) from `encode_images`, with sides of 4, 2 and 1 times the grid."""
        hidden = activations.transpose(1, 2).reshape(len(activations), -1, self.grid, self.grid)
        return tuple(layer(hidden) for layer in self.vision.neck.fpn_layers)

    def positions(self, level: Tensor) -> Tensor:
        """Return the position encoding of a level of the pyramid, (B, text_width, H, H)."""
        one = self.vision.neck.position_encoding(level[:1].shape, level.device, level.dtype)
        return one.expand(len(level), -1, -1, -1)

    def save_files(self, folder: Path) -> None:
        """Write the configuration of the whole model, and the tokenizer."""
        self.config.save_pretrained(folder / FOLDER)
        self.tokenizer.save_pretrained(folder / FOLDER)


class SAM3(SegmentationModel):
    """SAM 3 with masks of its semantic head: all pixels of a prompt's concept in one mask; UNet-D if `unet` is set.

    The parts for instances, their scores and prompts by boxes are left out; no result depends on them. The towers are
    the vision transformer with its pyramid and the text tower; the DETR encoder and the mask decoder are the decoder.
    The DETR decoder, which looks for objects, is there only for the presence. It never learns: no loss depends on it.

    Source: SAM 3, arXiv 2511.16719.
    """

    options: SAM3Options

    def __init__(self, options: SAM3Options, towers: SAM3Towers, network: Any) -> None:
        super().__init__()
        self.options = options
        self.image_spec = towers.image_spec
        self.towers = towers
        self.detr_encoder, self.mask_decoder = network.detr_encoder, network.mask_decoder
        del self.mask_decoder.mask_embedder, self.mask_decoder.instance_projection
        pixels = self.mask_decoder.pixel_decoder
        num_stages = len(towers.vision.neck.fpn_layers) - 1
        pixels.conv_layers, pixels.norms = pixels.conv_layers[:num_stages], pixels.norms[:num_stages]
        self.detr_decoder = network.detr_decoder.requires_grad_(False) if options.presence else None
        self.fusion = build_unet_d(towers, options, options.image_size) if options.unet else None

    @classmethod
    def build(cls, options: SAM3Options) -> Self:
        """Build the model with pretrained weights: the source's, or those of a file of Meta's code.

        Raises:
            CheckpointError: the source is neither a folder with a SAM 3 nor a hub id that can be reached, or the
                weights do not fit it.
        """
        config = _read_config(options.source, options.image_size)
        if options.weights is None:
            network = load_weights(AutoModel, options.source, "SAM 3", config=config)
        else:
            network = build_untrained(config)
        model = cls(options, SAM3Towers(network, load_tokenizer(options.source), options.image_size), network)
        if options.weights is not None:
            load_meta_weights(model, options.weights)
        return model

    @classmethod
    def restore(cls, options: SAM3Options, folder: Path) -> Self:
        """Build the model from the architecture and tokenizer in a checkpoint directory."""
        source = str(folder / FOLDER)
        network = build_untrained(_read_config(source, options.image_size))
        tokenizer = load_tokenizer(source, local_files_only=True)
        return cls(options, SAM3Towers(network, tokenizer, options.image_size), network)

    def save_files(self, folder: Path) -> None:
        """Write the configuration and the tokenizer."""
        self.towers.save_files(folder)

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return self._num_levels + (0 if self.fusion is None else self.fusion.num_features)

    @property
    def num_text_features(self) -> int:
        """Number of tensors that `encode_prompts` returns."""
        return 2

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return the features of each token, (T, 32, D), and a bool (T, 32), true at tokens."""
        return self.towers.encode_words(self.towers.tokenize(prompts))

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the output of the vision transformer, (B, L, W)."""
        return self.towers.encode_images(pixel_values)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the levels of the feature pyramid, finest first, then the CNN's features if there is a CNN."""
        (hidden,) = self.encode_towers(pixel_values) if activations is None else activations
        levels = self.towers.build_pyramid(hidden)
        return levels if self.fusion is None else levels + self.fusion.encode_images((hidden,), pixel_values)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return logits (B, 1, S, S); those of the mask decoder have 4 times the grid's side and are enlarged."""
        return self._decode_mask(self._encode_pair(image_features, text_features), image_features, text_features)

    def decode_with_presence(self, image_features: Features, text_features: Features) -> tuple[Tensor, Tensor | None]:
        """Return the logits of `decode`, and (B,) those of the presence token after the last layer, or None."""
        encoded = self._encode_pair(image_features, text_features)
        logits = self._decode_mask(encoded, image_features, text_features)
        if self.detr_decoder is None:
            return logits, None
        words, is_token = text_features
        presence = self.detr_decoder(
            vision_features=encoded.last_hidden_state,
            text_features=words,
            vision_pos_encoding=encoded.pos_embeds_flattened,
            text_mask=is_token[:, None, None],
            spatial_shapes=torch.tensor([[self.towers.grid] * 2], device="cpu"),  # transformers reads them one by one
        ).presence_logits  # (layers, B, 1)
        return logits, presence[-1, :, 0]

    def _encode_pair(self, image_features: Features, text_features: Features) -> Any:
        """Return the output of the DETR encoder: the coarsest level of the pyramid after it has seen the words."""
        words, is_token = text_features
        coarsest = image_features[self._num_levels - 1]
        return self.detr_encoder(
            vision_features=[coarsest],
            text_features=words,
            vision_pos_embeds=[self.towers.positions(coarsest)],
            text_mask=is_token[:, None, None],  # (B, 1, 1, 32)
        )

    def _decode_mask(self, encoded: Any, image_features: Features, text_features: Features) -> Tensor:
        (words, is_token), hidden = text_features, encoded.last_hidden_state
        *levels, coarsest = image_features[: self._num_levels]
        decoder = self.mask_decoder
        attended, _ = decoder.prompt_cross_attn(
            query=decoder.prompt_cross_attn_norm(hidden), key=words, value=words, attention_mask=is_token[:, None, None]
        )
        hidden = hidden + decoder.prompt_cross_attn_dropout(attended)
        prompted = hidden.transpose(1, 2).unflatten(2, coarsest.shape[2:])  # replaces the coarsest level
        logits = decoder.semantic_projection(decoder.pixel_decoder([*levels, prompted]))
        size = (self.image_spec.size, self.image_spec.size)
        logits = functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        if self.fusion is None:
            return logits
        # one embedding for a prompt, as in SAM 3's own scores of objects: the mean of its tokens; padding is 0
        sentences = words.sum(1) / is_token.sum(1, keepdim=True)
        return self.fusion.decode(image_features[self._num_levels :], sentences, logits)

    @property
    def _num_levels(self) -> int:
        return len(self.towers.vision.neck.fpn_layers)


def _read_config(source: str, image_size: int) -> Any:
    """Return the configuration of a source for an input of another size, from which positions follow."""
    config = read_config(source, SAMS)
    config.image_size = image_size
    return config
