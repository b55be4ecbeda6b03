"""What CLIPSeg and all its relatives are: towers, CLIPSeg's decoder on top, and in the ensembles a CNN beside it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.decoder import PromptDecoder
from vlsm.models.fusion import FusedUNetD
from vlsm.models.towers import Towers


class VLSM(SegmentationModel):
    """Image-tower activations and a text embedding, through CLIPSeg's decoder, and where asked through UNet-D as well.

    Each prompt goes through the text tower once, each image through the image tower and the CNN's encoder once, and the
    image tower is only as deep as its last tapped layer.

    Args:
        options: of the model.
        towers: pretrained.
        decoder: fits the towers.
        fusion: the CNN of an ensemble.
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
        """Tensors that `encode_images` gives."""
        return len(self.towers.taps) + (0 if self.fusion is None else self.fusion.num_features)

    def save_files(self, folder: Path) -> None:
        """Configuration and tokenizer of the towers, in their library's own format."""
        self.towers.save_files(folder)

    def encode_prompts(self, prompts: list[str]) -> Features:
        """The projected text embeddings, (T, D)."""
        return (self.towers.encode_prompts(prompts),)

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """The tapped activations, (B, L, W) each."""
        return self.towers.encode_images(pixel_values)

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """The activations reduced to the decoder's width, (B, L, 64) each; then what the CNN needs, if there is one."""
        if activations is None:
            activations = self.encode_towers(pixel_values)
        reduced = self.decoder.reduce_activations(activations)
        return reduced if self.fusion is None else reduced + self.fusion.encode_images(activations, pixel_values)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Logits (B, 1, S, S)."""
        (text_embeddings,) = text_features
        num_taps = len(self.towers.taps)
        logits = self.decoder.decode(image_features[:num_taps], text_embeddings, self.towers.num_prefix_tokens)
        size = self.towers.image_spec.size
        if logits.shape[-1] != size:  # the decoder enlarges by 16, whatever the tower's patches are
            logits = nn.functional.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
        return logits if self.fusion is None else self.fusion.decode(image_features[num_taps:], text_embeddings, logits)
