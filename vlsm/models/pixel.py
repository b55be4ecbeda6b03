"""The least that is a model: what a pipeline costs beside its network is measured with it."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field
from torch import nn

from vlsm.config import Settings
from vlsm.models.contract import ImageOnlyModel


class PixelOptions(Settings):
    """There is nothing else to choose."""

    image_size: int = Field(32, ge=1, description="side of the input square in pixels")


class Pixel(ImageOnlyModel):
    """Logits from the colour of each pixel alone: a 1x1 convolution, four weights."""

    Options: ClassVar[type[Settings]] = PixelOptions

    @classmethod
    def build(cls, options: PixelOptions) -> Self:
        """With random weights."""
        return cls(options, nn.Conv2d(3, 1, kernel_size=1))

    @classmethod
    def restore(cls, options: PixelOptions, folder: Path) -> Self:
        """The network; nothing but the options is needed."""
        return cls.build(options)
