"""CLIPSeg's decoder on open_clip towers: BiomedCLIPSeg, BiomedCLIPSeg-D, and models with other vision transformers."""

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
        """Build the model with pretrained towers; the decoder is untrained or comes from CLIPSeg.

        Raises:
            CheckpointError: a source cannot be loaded, or its decoder does not fit the towers.
        """
        model = cls.assemble(options, OpenCLIPTowers.build(options.source, options.image_size, options.taps))
        if options.decoder_source:
            load_decoder(model.decoder, options.decoder_source)
        return model

    @classmethod
    def restore(cls, options: Any, folder: Path) -> Self:
        """Build the model from the architecture and tokenizer in a checkpoint directory."""
        return cls.assemble(options, OpenCLIPTowers.restore(folder, options.image_size, options.taps))

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers) -> Self:
        """Build the model from towers, with an untrained decoder, and with UNet-D if `unet` is set."""
        size = towers.image_spec.size
        if not options.unet:
            return cls(options, towers, build_decoder(towers))
        if size % 16:
            raise CheckpointError(
                f"the side of the input is {size} pixels; UNet-D needs a multiple of 16; change image_size"
            )
        return cls(options, towers, build_decoder(towers), FirstActivationUNetD(towers, options))


class BiomedCLIPSeg(OpenCLIPSeg):
    """BiomedCLIP with an untrained decoder of CLIPSeg's architecture.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """

    @classmethod
    def assemble(cls, options: Any, towers: OpenCLIPTowers) -> Self:
        """Build the model from towers, with an untrained decoder."""
        return cls(options, towers, build_decoder(towers))


class BiomedCLIPSegD(BiomedCLIPSeg):
    """BiomedCLIP with CLIPSeg's pretrained decoder.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """
