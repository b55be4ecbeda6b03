"""The options of each model, apart from its network: a driver checks them without importing torch or transformers."""

from pydantic import Field

from vlsm.config import Settings

PUBLISHED = "CIDAS/clipseg-rd64-refined"
BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
SOURCE_HELP = "hub id, local folder with open_clip_config.json, or open_clip's NAME/TAG"
DECODER_HELP = "CLIPSeg to take the decoder from, hub id or local folder; untrained without"


class UNetDSettings(Settings):
    """The published network has width 64; a quarter of it trains on a laptop."""

    width: int = Field(
        64, ge=4, description="channels of the first level; all others follow in the published proportions"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="after each encoder level")


class UNetDOptions(UNetDSettings):
    """Standalone."""

    image_size: int = Field(352, ge=16, multiple_of=16, description="side of the input square in pixels")


class CLIPSegOptions(Settings):
    """Where the pretrained weights come from, and the input size."""

    source: str = Field(PUBLISHED, description="hub id or local folder, as from_pretrained takes it")
    image_size: int = Field(352, ge=16, description="side of the input square in pixels")


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


class EnsembleAOptions(BiomedCLIPSegOptions, UNetDSettings):
    """BiomedCLIPSeg's options and UNet-D's."""

    image_size: int = Field(224, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleBOptions(CLIPSegOptions, UNetDSettings):
    """CLIPSeg's options and UNet-D's."""

    image_size: int = Field(352, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleCOptions(UNetDSettings):
    """Sources of both members, and what they share."""

    biomedclip_source: str = Field(BIOMEDCLIP, description=SOURCE_HELP)
    clipseg_source: str = Field(PUBLISHED, description="hub id or local folder, as from_pretrained takes it")
    decoder_source: str | None = Field(None, description=f"for A: {DECODER_HELP}")
    taps: tuple[int, ...] = Field((4, 7, 10), min_length=1, description="for A: 0-based image-tower blocks")
    image_size: int = Field(224, ge=16, multiple_of=16, description="side of the input square in pixels")


class CRISOptions(Settings):
    """There are no official weights of CRIS: it starts from CLIP's and learns the rest."""

    source: str = Field("RN50-quickgelu/openai", description=SOURCE_HELP)
    image_size: int = Field(416, ge=32, multiple_of=32, description="side of the input square in pixels")
    width: int = Field(512, ge=32, multiple_of=32, description="channels of the decoder; the neck has half to double")
    dropout: float = Field(0.2, ge=0, lt=1, description="in the decoder")


class CNNOptions(Settings):
    """MedVLSM's baselines have ResNet-50 with ImageNet weights."""

    encoder: str = Field("resnet50", description="any encoder of segmentation_models_pytorch, tu-NAME for timm's")
    encoder_weights: str | None = Field(
        "imagenet", description="a pretrained set by name, a local .safetensors file, or null for none"
    )
    image_size: int = Field(352, ge=32, multiple_of=32, description="side of the input square in pixels")


class PixelOptions(Settings):
    """There is nothing else to choose."""

    image_size: int = Field(32, ge=1, description="side of the input square in pixels")


OPTIONS: dict[str, type[Settings]] = {
    "clipseg": CLIPSegOptions,
    "biomedclipseg": BiomedCLIPSegOptions,
    "biomedclipseg_d": BiomedCLIPSegDOptions,
    "openclip_seg": OpenCLIPSegOptions,
    "cris": CRISOptions,
    "unet_d": UNetDOptions,
    "unet": CNNOptions,
    "unetplusplus": CNNOptions,
    "deeplabv3plus": CNNOptions,
    "pixel": PixelOptions,
    "vlsm_a": EnsembleAOptions,
    "vlsm_b": EnsembleBOptions,
    "vlsm_c": EnsembleCOptions,
}
