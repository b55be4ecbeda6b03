"""CLIPSeg's decoder on open_clip towers: BiomedCLIPSeg, BiomedCLIPSeg-D, and models with other vision transformers."""

from typing import Any, Self

from vlsm.models.decoder import build_decoder
from vlsm.models.openclip import OpenCLIPTowers
from vlsm.models.tower_seg import TowerSeg
from vlsm.models.towers import Towers


class OpenCLIPSeg(TowerSeg):
    """CLIPSeg's decoder on the activations of any open_clip vision transformer, conditioned by its text embedding."""

    towers_class = OpenCLIPTowers


class BiomedCLIPSeg(OpenCLIPSeg):
    """BiomedCLIP with an untrained decoder of CLIPSeg's architecture.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """

    @classmethod
    def assemble(cls, options: Any, towers: Towers) -> Self:
        """Build the model from towers, with an untrained decoder."""
        return cls(options, towers, build_decoder(towers))


class BiomedCLIPSegD(BiomedCLIPSeg):
    """BiomedCLIP with CLIPSeg's pretrained decoder.

    Source: MedVLSM, MIDL 2024, arXiv 2308.07706; BiomedCLIP, arXiv 2303.00915.
    """
