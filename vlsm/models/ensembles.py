"""The paper's three ensembles: A (BiomedCLIPSeg with UNet-D), B (CLIPSeg with UNet-D), and C (both, stacked).

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vlsm.config import Settings
from vlsm.images import ImageSpec
from vlsm.models.clipseg import CLIPSeg, CLIPSegOptions, CLIPSegTowers, load_towers, restore_towers
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.decoder import PUBLISHED, PromptDecoder, build_decoder, load_decoder
from vlsm.models.fusion import AllActivationsUNetD, FirstActivationUNetD
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.openclip_seg import BIOMEDCLIP, DECODER_HELP, SOURCE_HELP, BiomedCLIPSeg, BiomedCLIPSegOptions
from vlsm.models.unet_d import UNetDSettings


class EnsembleAOptions(BiomedCLIPSegOptions, UNetDSettings):
    """BiomedCLIPSeg's options and UNet-D's."""

    image_size: int = Field(224, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleA(BiomedCLIPSeg):
    """BiomedCLIPSeg with UNet-D, which takes a text-conditioned map of the first activation."""

    Options = EnsembleAOptions

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers, copies: int = 1) -> Self:
        """The towers with an untrained decoder and CNN."""
        return cls(options, towers, build_decoder(towers), FirstActivationUNetD(towers, options, copies))


class EnsembleBOptions(CLIPSegOptions, UNetDSettings):
    """CLIPSeg's options and UNet-D's."""

    image_size: int = Field(352, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleB(CLIPSeg):
    """CLIPSeg with UNet-D, which takes a text-conditioned map of all activations."""

    Options = EnsembleBOptions

    @classmethod
    def assemble(cls, options: Any, towers: CLIPSegTowers, decoder: PromptDecoder, copies: int = 1) -> Self:
        """Towers and decoder with an untrained CNN."""
        return cls(options, towers, decoder, AllActivationsUNetD(towers, options, copies))


class EnsembleCOptions(UNetDSettings):
    """Sources of both members, and what they share."""

    biomedclip_source: str = Field(BIOMEDCLIP, description=SOURCE_HELP)
    clipseg_source: str = Field(PUBLISHED, description="hub id or local folder, as from_pretrained takes it")
    decoder_source: str | None = Field(None, description=f"for A: {DECODER_HELP}")
    taps: tuple[int, ...] = Field((4, 7, 10), min_length=1, description="for A: 0-based image-tower blocks")
    image_size: int = Field(224, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleC(SegmentationModel):
    """A and B at one size, their logits joined; in both, the map enters the CNN twice.

    Each member sees the image normalised as its own tower wants it, and each text tower its own tokens. (The public
    code feeds both with one normalisation, and CLIP with PubMedBERT's tokens.)
    """

    Options: ClassVar[type[Settings]] = EnsembleCOptions

    def __init__(self, options: EnsembleCOptions, a: EnsembleA, b: EnsembleB) -> None:
        super().__init__()
        self.options = options
        self.image_spec = a.image_spec
        self.a, self.b = a, b
        self.join = nn.Conv2d(2, 1, 1)

    @classmethod
    def build(cls, options: EnsembleCOptions) -> Self:
        """Both members with pretrained towers.

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
        """The architecture and tokenizers of a checkpoint directory."""
        towers = OpenCLIPTowers.restore(folder, options.image_size, options.taps)
        return cls._assemble(options, towers, *restore_towers(folder, options.image_size))

    @classmethod
    def _assemble(cls, options: Any, towers: OpenCLIPTowers, clip: CLIPSegTowers, decoder: PromptDecoder) -> Self:
        return cls(options, EnsembleA.assemble(options, towers, 2), EnsembleB.assemble(options, clip, decoder, 2))

    def save_files(self, folder: Path) -> None:
        """Those of both members."""
        self.a.save_files(folder)
        self.b.save_files(folder)

    def encode_prompts(self, prompts: list[str]) -> Features:
        """A's text embeddings and B's, each from its own tokens."""
        return self.a.encode_prompts(prompts) + self.b.encode_prompts(prompts)

    def encode_towers(self, pixel_values: Tensor) -> Features:
        """A's activations, then B's."""
        return self.a.encode_towers(pixel_values) + self.b.encode_towers(self._normalized_for_b(pixel_values))

    def encode_images(self, pixel_values: Tensor, activations: Features | None = None) -> Features:
        """A's features, then B's."""
        split = len(self.a.towers.taps)
        for_a, for_b = (None, None) if activations is None else (activations[:split], activations[split:])
        pixels_b = self._normalized_for_b(pixel_values)
        return self.a.encode_images(pixel_values, for_a) + self.b.encode_images(pixels_b, for_b)

    def decode(self, image_features: Features, text_features: Features) -> Tensor:
        """The joined logits (B, 1, S, S)."""
        split = self.a.num_features
        logits_a = self.a.decode(image_features[:split], text_features[:1])
        logits_b = self.b.decode(image_features[split:], text_features[1:])
        return self.join(torch.cat([logits_a, logits_b], dim=1))

    def _normalized_for_b(self, pixel_values: Tensor) -> Tensor:
        return renormalize(pixel_values, self.image_spec, self.b.image_spec)


def renormalize(pixel_values: Tensor, current: ImageSpec, wanted: ImageSpec) -> Tensor:
    """Normalised images (B, 3, S, S), normalised by other statistics."""
    if (current.mean, current.std) == (wanted.mean, wanted.std):
        return pixel_values

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=pixel_values.device, dtype=pixel_values.dtype)[:, None, None]

    pixels = pixel_values * column(current.std) + column(current.mean)
    return (pixels - column(wanted.mean)) / column(wanted.std)
