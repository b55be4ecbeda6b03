"""The paper's ensemble A: BiomedCLIPSeg with UNet-D.

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from typing import Any, Self

from vlsm.models.decoder import build_decoder
from vlsm.models.fusion import FirstActivationUNetD
from vlsm.models.openclip_seg import BiomedCLIPSeg
from vlsm.models.towers import Towers


class EnsembleA(BiomedCLIPSeg):
    """BiomedCLIPSeg with UNet-D; UNet-D receives a text-conditioned map of the first activation."""

    @classmethod
    def assemble(cls, options: Any, towers: Towers, copies: int = 1) -> Self:
        """Build the ensemble from towers, with an untrained decoder and an untrained CNN."""
        return cls(options, towers, build_decoder(towers), FirstActivationUNetD(towers, options, copies))
