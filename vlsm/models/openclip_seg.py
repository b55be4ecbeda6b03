"""CLIPSeg's decoder on towers from open_clip: BiomedCLIPSeg, BiomedCLIPSeg-D, and any other vision transformer."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from vlsm.config import Settings
from vlsm.errors import CheckpointError
from vlsm.models.decoder import PUBLISHED, build_decoder, load_decoder
from vlsm.models.fusion import FirstActivationUNetD
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.unet_d import UNetDSettings
from vlsm.models.vlsm import VLSM

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
SOURCE_HELP = "hub id, local folder with open_clip_config.json, or open_clip's NAME/TAG"
DECODER_HELP = "CLIPSeg to take the decoder from, hub id or local folder; untrained without"


class BiomedCLIPSegOptions(Settings):
    """BiomedCLIP's towers and an untrained decoder.

    The taps are the published ones: one block deeper than CLIPSeg's own 3, 6, 9, because the port's list of hidden
    states lacks the embedding that its indices assume. Kept, so that published results can be repeated.
    """

    source: str = Field(BIOMEDCLIP, description=SOURCE_HELP)
    image_size: int = Field(224, ge=16, description="side of the input square in pixels")
    taps: tuple[int, ...] = Field((4, 7, 10), min_length=1, description="0-based image-tower blocks that are tapped")
    decoder_source: str | None = Field(None, description=DECODER_HELP)


class BiomedCLIPSegDOptions(BiomedCLIPSegOptions):
    """The same with CLIPSeg's pretrained decoder."""

    decoder_source: str | None = Field(PUBLISHED, description=DECODER_HELP)


class OpenCLIPSegOptions(UNetDSettings):
    """Any vision transformer that open_clip offers, such as ViT-B-16-SigLIP/webli, and UNet-D where asked."""

    source: str = Field(description=SOURCE_HELP)
    image_size: int | None = Field(None, ge=16, description="side of the input square; the tower's own unless told")
    taps: tuple[int, ...] | None = Field(
        None, min_length=1, description="0-based image-tower blocks; a quarter, a half, three quarters unless told"
    )
    decoder_source: str | None = Field(None, description=DECODER_HELP)
    unet: bool = Field(False, description="add UNet-D, as in vlsm_a")


class OpenCLIPSeg(VLSM):
    """CLIPSeg's decoder on the activations of any open_clip vision transformer, conditioned by its text embedding."""

    Options: ClassVar[type[Settings]] = OpenCLIPSegOptions

    @classmethod
    def build(cls, options: Any) -> Self:
        """Pretrained towers; the decoder untrained, or CLIPSeg's.

        Raises:
            CheckpointError: a source cannot be loaded or does not fit.
        """
        model = cls.assemble(options, OpenCLIPTowers.build(options.source, options.image_size, options.taps))
        if options.decoder_source:
            load_decoder(model.decoder, options.decoder_source)
        return model

    @classmethod
    def restore(cls, options: Any, folder: Path) -> Self:
        """The architecture and tokenizer of a checkpoint directory."""
        return cls.assemble(options, OpenCLIPTowers.restore(folder, options.image_size, options.taps))

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers) -> Self:
        """The towers with an untrained decoder, and the CNN where the options ask for it."""
        size = towers.image_spec.size
        if not options.unet:
            return cls(options, towers, build_decoder(towers))
        if size % 16:
            raise CheckpointError(f"the image tower takes {size} pixels; UNet-D needs a multiple of 16: set image_size")
        return cls(options, towers, build_decoder(towers), FirstActivationUNetD(towers, options))


class BiomedCLIPSeg(OpenCLIPSeg):
    """BiomedCLIP with CLIPSeg's decoder, from scratch.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """

    Options = BiomedCLIPSegOptions

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers) -> Self:
        """The towers with an untrained decoder."""
        return cls(options, towers, build_decoder(towers))


class BiomedCLIPSegD(BiomedCLIPSeg):
    """BiomedCLIP with CLIPSeg's decoder, pretrained.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """

    Options = BiomedCLIPSegDOptions
