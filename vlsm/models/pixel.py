"""The least that is a model: what a pipeline costs beside its network is measured with it."""

from pathlib import Path
from typing import Self

from torch import nn

from vlsm.models.contract import ImageOnlyModel
from vlsm.models.options import PixelOptions


class Pixel(ImageOnlyModel):
    """Logits from the colour of each pixel alone: a 1x1 convolution, four weights."""

    @classmethod
    def build(cls, options: PixelOptions) -> Self:
        """With random weights."""
        return cls(options, nn.Conv2d(3, 1, kernel_size=1))

    @classmethod
    def restore(cls, options: PixelOptions, folder: Path) -> Self:
        """The network; nothing but the options is needed."""
        return cls.build(options)
