"""The options of each model, without its network: a driver checks them and does not import torch or transformers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vlsm.config import Settings
from vlsm.images.preprocess import ImageSpec, Resize

PUBLISHED = "CIDAS/clipseg-rd64-refined"
BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
SOURCE_HELP = "hub id, local folder with open_clip_config.json, or open_clip's NAME/TAG"
PAIR_HELP = "hub id or local folder of a SigLIP, SigLIP 2, CLIP, MetaCLIP 2, AIMv2 or TIPSv2"
DECODER_HELP = "CLIPSeg whose decoder is used, hub id or local folder; null: the decoder is untrained"


STACK = "stack"  # the model whose members are checkpoints
MOST_MEMBERS = 8  # of a stack
Trainable = Literal["decoder", "lora", "dora", "adapters", "all"]
Adapted = Literal["image", "text", "both"]
MAX_SIDE = 4096  # the memory of a larger input is hundreds of gigabytes, whatever the weights
MAX_ADAPTER_WIDTH = 4096  # wider than the towers themselves


class InputOptions(Settings):
    """How an image becomes the input of any model."""

    resize: Resize = Field(
        "squeeze", description="squeeze: stretch images to the square, as published; letterbox: keep the aspect ratio"
    )


class TowerOptions(InputOptions):
    """What a training may add to the towers of a model."""

    adapters: dict[Literal["image", "text"], Annotated[int, Field(ge=1, le=MAX_ADAPTER_WIDTH)]] = Field(
        {},
        description="width of the adapters in each tower, as {image: 64}; a training adds them",
    )


class UNetDSettings(InputOptions):
    """Size and dropout of UNet-D. The published width is 64; a quarter of it trains on a laptop."""

    width: int = Field(
        64, ge=4, description="channels of the first level; the other levels keep the published proportions"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability after each encoder level")


class UNetDOptions(UNetDSettings):
    """Options of UNet-D without a VLSM."""

    image_size: int = Field(352, le=MAX_SIDE, ge=16, multiple_of=16, description="side of the input square in pixels")
    normalize: bool = Field(
        True, description="subtract the mean of ImageNet's images; false: levels from 0 to 1, as published"
    )


class CLIPSegOptions(TowerOptions):
    """Source of the pretrained weights, and the input size."""

    source: str = Field(PUBLISHED, description="hub id or local folder, as for from_pretrained")
    image_size: int = Field(352, le=MAX_SIDE, ge=16, description="side of the input square in pixels")


class BiomedCLIPSegOptions(TowerOptions):
    """BiomedCLIP's towers and an untrained decoder.

    The default taps are the published ones, so that published results can be repeated. They are one block deeper than
    CLIPSeg's taps 3, 6, 9: the published code indexes hidden states as if the embedding were the first, but its list of
    hidden states does not contain the embedding.
    """

    source: str = Field(BIOMEDCLIP, description=SOURCE_HELP)
    image_size: int = Field(224, le=MAX_SIDE, ge=16, description="side of the input square in pixels")
    taps: tuple[int, ...] = Field(
        (4, 7, 10), min_length=1, description="0-based image-tower blocks whose outputs enter the decoder"
    )
    decoder_source: str | None = Field(None, description=DECODER_HELP)


class BiomedCLIPSegDOptions(BiomedCLIPSegOptions):
    """Options of BiomedCLIPSeg, with CLIPSeg's pretrained decoder by default."""

    decoder_source: str | None = Field(PUBLISHED, description=DECODER_HELP)


class OpenCLIPSegOptions(TowerOptions, UNetDSettings):
    """Any vision transformer of open_clip, such as ViT-B-16-SigLIP/webli, and UNet-D if `unet` is set."""

    source: str = Field(description=SOURCE_HELP)
    image_size: int | None = Field(
        None, le=MAX_SIDE, ge=16, description="side of the input square in pixels; null: the tower's side"
    )
    taps: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="0-based image-tower blocks; null: at a quarter, a half and three quarters of the depth",
    )
    decoder_source: str | None = Field(None, description=DECODER_HELP)
    unet: bool = Field(False, description="add UNet-D, as in vlsm_a")


class TransformersSegOptions(OpenCLIPSegOptions):
    """Any pair of towers of transformers, such as google/medsiglip-448, and UNet-D if `unet` is set."""

    source: str = Field(description=PAIR_HELP)


class EnsembleAOptions(BiomedCLIPSegOptions, UNetDSettings):
    """BiomedCLIPSeg's options and UNet-D's."""

    image_size: int = Field(224, le=MAX_SIDE, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleBOptions(CLIPSegOptions, UNetDSettings):
    """CLIPSeg's options and UNet-D's."""

    image_size: int = Field(352, le=MAX_SIDE, ge=16, multiple_of=16, description="side of the input square in pixels")


class EnsembleCOptions(TowerOptions, UNetDSettings):
    """Sources of the members A and B, and their common options."""

    biomedclip_source: str = Field(BIOMEDCLIP, description=SOURCE_HELP)
    clipseg_source: str = Field(PUBLISHED, description="hub id or local folder, as for from_pretrained")
    decoder_source: str | None = Field(None, description=f"for A: {DECODER_HELP}")
    taps: tuple[int, ...] = Field((4, 7, 10), min_length=1, description="for A: 0-based image-tower blocks")
    image_size: int = Field(224, le=MAX_SIDE, ge=16, multiple_of=16, description="side of the input square in pixels")


class CRISOptions(TowerOptions):
    """Options of CRIS. Without `weights`, it starts from CLIP's towers and learns all other parts."""

    source: str = Field("RN50-quickgelu/openai", description=SOURCE_HELP)
    image_size: int = Field(416, le=MAX_SIDE, ge=32, multiple_of=32, description="side of the input square in pixels")
    width: int = Field(
        512, ge=32, multiple_of=32, description="channels of the decoder; the neck has half to twice as many"
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout probability in the decoder")
    enlarge: Literal["bilinear", "published"] = Field(
        "bilinear", description="enlargement of the logits; published: bicubic with aligned corners, as in MedVLSM"
    )
    unet: bool = Field(False, description="add UNet-D, as in vlsm_a")
    unet_width: int = Field(64, ge=4, description="of UNet-D: channels of the first level, as width in vlsm_a")
    unet_dropout: float = Field(0.1, ge=0, lt=1, description="of UNet-D: dropout probability, as dropout in vlsm_a")
    weights: str | None = Field(
        None, description="the public code's CRIS that was trained on RefCOCO, a local cris.pt; source gives its towers"
    )


class SAM3Options(TowerOptions, UNetDSettings):
    """SAM 3 with the masks of its semantic head, UNet-D if `unet` is set, and the presence if `presence` is set."""

    source: str = Field("facebook/sam3", description="hub id or local folder of a SAM 3, or of a SAM 3 LiteText")
    image_size: int = Field(
        1008, le=MAX_SIDE, ge=16, description="side of the input square in pixels; 504 costs less than a quarter"
    )
    unet: bool = Field(
        False, description="add UNet-D, as in vlsm_a; image_size must then be a multiple of 112, such as 448 or 1008"
    )
    presence: bool = Field(
        False,
        description="also compute how probable it is that the image shows the prompt at all, with SAM 3's decoder of "
        "objects; it keeps its published weights in a training, so that the parts that learn may make it wrong",
    )
    weights: str | None = Field(
        None, description="weights in the names of Meta's code, a local .pt file; source gives the rest"
    )


class CNNOptions(InputOptions):
    """Options of the CNN baselines. The defaults are MedVLSM's: ResNet-50 with ImageNet weights."""

    encoder: str = Field(
        "resnet50",
        pattern=r"^[\w.\-]+$",  # no place: a checkpoint must load without a network
        description="any encoder of segmentation_models_pytorch, or tu-NAME for an encoder of timm",
    )
    encoder_weights: str | None = Field(
        "imagenet", description="name of a pretrained set, a local .safetensors file, or null for random weights"
    )
    image_size: int = Field(352, le=MAX_SIDE, ge=32, multiple_of=32, description="side of the input square in pixels")


class PixelOptions(InputOptions):
    """The only option of the pixel model is its input size."""

    image_size: int = Field(32, le=MAX_SIDE, ge=1, description="side of the input square in pixels")


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ImageSettings(Settings):
    """The input of a model, as a checkpoint states it."""

    size: int = Field(ge=1)
    mean: tuple[_Finite, _Finite, _Finite]
    std: tuple[_Positive, _Positive, _Positive]
    resize: Resize = "squeeze"  # absent in checkpoints of version 0

    @property
    def spec(self) -> ImageSpec:
        """The input of the model, as an ImageSpec."""
        return ImageSpec(**self.model_dump())


class StackPart(Settings):
    """What the checkpoint of a stack states of a member: the model, options and input of the member's checkpoint."""

    model: str
    options: dict[str, Any]
    image: ImageSettings


class StackOptions(Settings):
    """Trained checkpoints, which stay as they are, and the convolution that joins their logits.

    In the checkpoint of a stack, `members` has the names of the checkpoints, and `parts` describes their models.
    """

    members: tuple[str, ...] = Field(
        min_length=2,
        max_length=MOST_MEMBERS,
        description="checkpoints to join; they do not learn: --set 'options.members=[first/checkpoint, "
        "second/checkpoint]'",
    )
    kernel: Literal[1, 3, 5] = Field(
        1, description="side of the convolution in pixels; 1: a weight for each member, and a bias"
    )
    image_size: int | None = Field(
        None,
        le=MAX_SIDE,
        ge=1,
        description="side of the square in which logits are joined, in pixels; null: the largest side of the members",
    )
    parts: tuple[StackPart, ...] = ()

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.parts and len(self.parts) != len(self.members):
            raise ValueError(f"there are {len(self.members)} members, but parts describes {len(self.parts)}")
        if any(part.model == STACK for part in self.parts):
            raise ValueError("a member is a stack itself; a stack has no stacks in it")
        return self


OPTIONS: dict[str, type[Settings]] = {
    "clipseg": CLIPSegOptions,
    "biomedclipseg": BiomedCLIPSegOptions,
    "biomedclipseg_d": BiomedCLIPSegDOptions,
    "openclip_seg": OpenCLIPSegOptions,
    "transformers_seg": TransformersSegOptions,
    "cris": CRISOptions,
    "sam3": SAM3Options,
    "unet_d": UNetDOptions,
    "unet": CNNOptions,
    "unetplusplus": CNNOptions,
    "deeplabv3plus": CNNOptions,
    "pixel": PixelOptions,
    "vlsm_a": EnsembleAOptions,
    "vlsm_b": EnsembleBOptions,
    "vlsm_c": EnsembleCOptions,
    STACK: StackOptions,
}
