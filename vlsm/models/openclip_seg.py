"""CLIPSeg's decoder on towers from open_clip: BiomedCLIPSeg, BiomedCLIPSeg-D, and any other vision transformer."""

from pathlib import Path
from typing import Any, Self

from vlsm.errors import CheckpointError
from vlsm.models.decoder import build_decoder, load_decoder
from vlsm.models.fusion import FirstActivationUNetD
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.vlsm import VLSM


class OpenCLIPSeg(VLSM):
    """CLIPSeg's decoder on the activations of any open_clip vision transformer, conditioned by its text embedding."""

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

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers) -> Self:
        """The towers with an untrained decoder."""
        return cls(options, towers, build_decoder(towers))


class BiomedCLIPSegD(BiomedCLIPSeg):
    """BiomedCLIP with CLIPSeg's decoder, pretrained.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """
