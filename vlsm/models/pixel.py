"""The smallest possible model. It serves to measure the cost of a pipeline without its network."""

from pathlib import Path
from typing import Self

from torch import nn

from vlsm.models.contract import ImageOnlyModel
from vlsm.models.options import PixelOptions


class Pixel(ImageOnlyModel):
    """A 1x1 convolution with four weights: the logit of a pixel depends only on the pixel's colour."""

    @classmethod
    def build(cls, options: PixelOptions) -> Self:
        """Build the network with random weights."""
        return cls(options, nn.Conv2d(3, 1, kernel_size=1))

    @classmethod
    def restore(cls, options: PixelOptions, folder: Path) -> Self:
        """Build the network from the options alone."""
        return cls.build(options)
