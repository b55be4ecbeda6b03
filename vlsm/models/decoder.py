"""CLIPSeg's decoder from transformers, run in two steps: once per image, then once per image and prompt."""

import torch
from torch import Tensor, nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

from vlsm.errors import CheckpointError
from vlsm.models.towers import Towers
from vlsm.models.transformers_source import load_weights

_PATCH = 16  # the published decoder enlarges the patch grid 16 times


class PromptDecoder(CLIPSegDecoder):  # type: ignore[misc] # transformers has no types for mypy
    """A light transformer over the activations of several layers, deepest first, conditioned by the text embedding.

    Source: CLIPSeg, CVPR 2022, arXiv 2112.10003.
    """

    def __init__(self, config: CLIPSegConfig) -> None:
        config.vision_config._attn_implementation = "sdpa"  # transformers sets it only for whole models
        super().__init__(config)

    def reduce_activations(self, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return activations (B, L, W) as (B, L, reduce_dim), deepest first. They do not depend on the prompt."""
        return tuple(reduce(activation) for reduce, activation in zip(self.reduces, reversed(activations), strict=True))

    def decode(self, reduced: tuple[Tensor, ...], text_embeddings: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return logits (B, 1, 16 x grid, 16 x grid) from reduced activations and one text embedding per image."""
        hidden = torch.zeros_like(reduced[0])
        for index, (activation, layer) in enumerate(zip(reduced, self.layers, strict=True)):
            hidden = hidden + activation
            if index == self.conditional_layer:
                scale, shift = self.film_mul(text_embeddings), self.film_add(text_embeddings)
                hidden = scale[:, None] * hidden + shift[:, None]
            hidden = layer(hidden, attention_mask=None)
        patches = hidden[:, num_prefix_tokens:].transpose(1, 2)  # (B, reduce_dim, grid * grid)
        side = round(patches.shape[2] ** 0.5)
        return self.transposed_convolution(patches.reshape(*patches.shape[:2], side, side))


def build_decoder(towers: Towers) -> PromptDecoder:
    """Build an untrained decoder that fits the towers; all other sizes are the published ones.

    Args:
        towers: they provide the decoder's activations and text embeddings.
    """
    config = CLIPSegConfig(
        vision_config={"hidden_size": towers.image_width, "patch_size": _PATCH, "num_attention_heads": 1},
        projection_dim=towers.text_width,
        reduce_dim=64,
        extract_layers=list(range(len(towers.taps))),
        decoder_num_attention_heads=4,
        decoder_intermediate_size=2048,
        use_complex_transposed_convolution=True,
    )
    decoder = PromptDecoder(config)
    initialize_decoder(decoder)
    return decoder


def initialize_decoder(decoder: nn.Module) -> None:
    """Set a decoder's weights to the initial values of the published trainings.

    Linear layers have biases of 0. With width w, the standard deviations are w^-0.5 / 24^0.5 for queries, keys, values
    and the second layer of an MLP, w^-0.5 for the output of an attention, and (2 w)^-0.5 for the first layer of an MLP.
    Other weights have torch's default values. transformers 5 would initialise every linear layer and convolution with a
    standard deviation of 1, and the first logits would be in the hundreds.

    Source: CLIPSeg in transformers 4, which the public code of MedVLSM uses; 24 is twice the depth of its default
        configuration.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for name, module in decoder.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj", "fc2"):
            nn.init.normal_(module.weight, std=(24 * module.out_features) ** -0.5)
        elif kind == "out_proj":
            nn.init.normal_(module.weight, std=module.out_features**-0.5)
        elif kind == "fc1":
            nn.init.normal_(module.weight, std=(2 * module.in_features) ** -0.5)


def load_network(source: str) -> CLIPSegForImageSegmentation:
    """Return CLIPSeg with pretrained weights, float32.

    Raises:
        CheckpointError: the source is neither a complete CLIPSeg folder nor a hub id that can be reached.
    """
    return load_weights(CLIPSegForImageSegmentation, source, "CLIPSeg")


def load_decoder(decoder: PromptDecoder, source: str) -> None:
    """Load CLIPSeg's pretrained weights into a decoder that was built for other towers.

    Raises:
        CheckpointError: the source cannot be loaded, or its decoder has different sizes.
    """
    weights = load_network(source).decoder.state_dict()
    mismatches = [
        f"{key}: {tuple(weights[key].shape) if key in weights else 'none'} instead of {tuple(value.shape)}"
        for key, value in decoder.state_dict().items()
        if key not in weights or weights[key].shape != value.shape
    ]
    if mismatches:
        raise CheckpointError(f"the decoder of {source!r} does not fit these towers: {'; '.join(mismatches[:3])}")
    decoder.load_state_dict(weights)
