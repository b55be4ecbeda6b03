"""The common class of CLIPSeg and related models: towers, CLIPSeg's decoder, and in the ensembles a CNN."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.decoder import PromptDecoder
from vlsm.models.fusion import FusedUNetD
from vlsm.models.towers import Towers


class VLSM(SegmentationModel):
    """CLIPSeg's decoder over image-tower activations and a text embedding, and UNet-D if the model is an ensemble.

    The text tower runs once per prompt. The image tower and the CNN's encoder run once per image. The image tower ends
    at its last tapped layer.

    Args:
        options: the model's options.
        towers: pretrained towers.
        decoder: a decoder that fits the towers.
        fusion: the CNN of an ensemble, or None.
    """

    def __init__(self, options: Any, towers: Towers, decoder: PromptDecoder, fusion: FusedUNetD | None = None) -> None:
        super().__init__()
        self.options = options
        self.image_spec = towers.image_spec
        self.towers = towers
        self.decoder = decoder
        self.fusion = fusion

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return len(self.towers.taps) + (0 if self.fusion is None else self.fusion.num_features)

    def save_files(self, folder: Path) -> None:
        """Write the configuration and tokenizer of the towers in the format of their library."""
        self.towers.save_files(folder)

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return the projected text embeddings, (T, D)."""
        return (self.towers.encode_prompts(prompts),)

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the outputs of the tapped layers, (B, L, W) each."""
        return self.towers.encode_images(pixel_values)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the activations at the decoder's width, (B, L, 64) each, then the CNN's features if there is a CNN."""
        if activations is None:
            activations = self.encode_towers(pixel_values)
        reduced = self.decoder.reduce_activations(activations)
        return reduced if self.fusion is None else reduced + self.fusion.encode_images(activations, pixel_values)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return logits (B, 1, S, S)."""
        (text_embeddings,) = text_features
        num_taps = len(self.towers.taps)
        logits = self.decoder.decode(image_features[:num_taps], text_embeddings, self.towers.num_prefix_tokens)
        size = self.towers.image_spec.size
        if logits.shape[-1] != size:  # the decoder always enlarges 16 times, even if the patch side differs
            logits = nn.functional.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
        return logits if self.fusion is None else self.fusion.decode(image_features[num_taps:], text_embeddings, logits)
