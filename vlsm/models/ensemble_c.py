"""The paper's ensemble C, which joins the ensembles A (`ensemble_a`) and B (`ensemble_b`).

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlsm.models.clipseg import CLIPSegTowers, load_towers, restore_towers
from vlsm.models.contract import Features, SegmentationModel, renormalize
from vlsm.models.decoder import PromptDecoder, load_decoder
from vlsm.models.ensemble_a import EnsembleA
from vlsm.models.ensemble_b import EnsembleB
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.options import EnsembleCOptions


class EnsembleC(SegmentationModel):
    """A and B at the same input size; a convolution joins their logits. In both, the map enters the CNN twice.

    Each member receives the image with its tower's normalisation, and the prompt with its tower's tokens. The public
    code differs: it uses one normalisation for both members, and PubMedBERT's tokens for CLIP.
    """

    def __init__(self, options: EnsembleCOptions, a: EnsembleA, b: EnsembleB) -> None:
        super().__init__()
        self.options = options
        self.image_spec = a.image_spec
        self.a, self.b = a, b
        self.join = nn.Conv2d(2, 1, 1)

    @classmethod
    def build(cls, options: EnsembleCOptions) -> Self:
        """Build both members with pretrained towers.

        Raises:
            CheckpointError: a source cannot be loaded or does not fit.
        """
        towers = OpenCLIPTowers.build(options.biomedclip_source, options.image_size, options.taps)
        model = cls._assemble(options, towers, *load_towers(options.clipseg_source, options.image_size))
        if options.decoder_source:
            load_decoder(model.a.decoder, options.decoder_source)
        return model

    @classmethod
    def restore(cls, options: EnsembleCOptions, folder: Path) -> Self:
        """Build both members from the architectures and tokenizers in a checkpoint directory."""
        towers = OpenCLIPTowers.restore(folder, options.image_size, options.taps)
        return cls._assemble(options, towers, *restore_towers(folder, options.image_size))

    @classmethod
    def _assemble(cls, options: Any, towers: OpenCLIPTowers, clip: CLIPSegTowers, decoder: PromptDecoder) -> Self:
        return cls(options, EnsembleA.assemble(options, towers, 2), EnsembleB.assemble(options, clip, decoder, 2))

    def save_files(self, folder: Path) -> None:
        """Write the files of both members."""
        self.a.save_files(folder)
        self.b.save_files(folder)

    @property
    def num_features(self) -> int:
        """Number of tensors that `encode_images` returns."""
        return self.a.num_features + self.b.num_features

    @property
    def num_text_features(self) -> int:
        """Number of tensors that `encode_prompts` returns."""
        return 2

    def encode_prompts(self, prompts: list[str]) -> Features:
        """Return the text embeddings of A and of B. Each member uses its own tokenizer."""
        return self.a.encode_prompts(prompts) + self.b.encode_prompts(prompts)

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """Return the activations of A, then those of B."""
        return self.a.encode_towers(pixel_values) + self.b.encode_towers(self._normalized_for_b(pixel_values))

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """Return the image features of A, then those of B."""
        split = len(self.a.towers.taps)
        activations_a, activations_b = (
            (None, None) if activations is None else (activations[:split], activations[split:])
        )
        pixels_b = self._normalized_for_b(pixel_values)
        return self.a.encode_images(pixel_values, activations_a) + self.b.encode_images(pixels_b, activations_b)

    def embed_images(self, activations: Features) -> Tensor:
        """Return the embeddings of A's tower."""
        return self.a.embed_images(activations[: len(self.a.towers.taps)])

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """Return the joined logits (B, 1, S, S)."""
        split = self.a.num_features
        logits_a = self.a.decode(image_features[:split], text_features[:1])
        logits_b = self.b.decode(image_features[split:], text_features[1:])
        return self.join(torch.cat([logits_a, logits_b], dim=1))

    def _normalized_for_b(self, pixel_values: Tensor) -> Tensor:
        return renormalize(pixel_values, self.image_spec, self.b.image_spec)
