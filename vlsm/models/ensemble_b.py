"""The paper's ensemble B: CLIPSeg with UNet-D. It does not import the libraries of A, which take seconds to load.

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from typing import Any, Self

from vlsm.models.clipseg import CLIPSeg, CLIPSegTowers
from vlsm.models.decoder import PromptDecoder
from vlsm.models.fusion import AllActivationsUNetD


class EnsembleB(CLIPSeg):
    """CLIPSeg with UNet-D; UNet-D receives a text-conditioned map of all activations."""

    @classmethod
    def assemble(cls, options: Any, towers: CLIPSegTowers, decoder: PromptDecoder, copies: int = 1) -> Self:
        """Build the ensemble from towers and a decoder, with an untrained CNN."""
        return cls(options, towers, decoder, AllActivationsUNetD(towers, options, copies))
