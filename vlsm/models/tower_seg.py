"""CLIPSeg's decoder on image and text towers of any library, optionally with UNet-D."""

from pathlib import Path
from typing import Any, ClassVar, Self

from vlsm.models.decoder import build_decoder, load_decoder
from vlsm.models.fusion import build_unet_d
from vlsm.models.towers import Towers
from vlsm.models.vlsm import VLSM


class TowerSeg(VLSM):
    """CLIPSeg's decoder on the activations of a vision transformer, conditioned by a text embedding.

    Attributes:
        towers_class: the class of the towers. It has the class methods `build(source, image_size, taps)` and
            `restore(folder, image_size, taps)`.
    """

    towers_class: ClassVar[Any]

    @classmethod
    def build(cls, options: Any) -> Self:
        """Build the model with pretrained towers; the decoder is untrained or comes from CLIPSeg.

        Raises:
            CheckpointError: a source cannot be loaded, or its decoder does not fit the towers.
        """
        model = cls.assemble(options, cls.towers_class.build(options.source, options.image_size, options.taps))
        if options.decoder_source:
            load_decoder(model.decoder, options.decoder_source)
        return model

    @classmethod
    def restore(cls, options: Any, folder: Path) -> Self:
        """Build the model from the architecture and tokenizer in a checkpoint directory."""
        return cls.assemble(options, cls.towers_class.restore(folder, options.image_size, options.taps))

    @classmethod
    def assemble(cls, options: Any, towers: Towers) -> Self:
        """Build the model from towers, with an untrained decoder, and with UNet-D if `unet` is set."""
        unet = build_unet_d(towers, options, towers.image_spec.size) if options.unet else None
        return cls(options, towers, build_decoder(towers), unet)
