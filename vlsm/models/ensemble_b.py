"""The paper's ensemble B: CLIPSeg with UNet-D. It imports none of A's libraries, which take seconds.

Source: VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
"""

from typing import Any, Self

from vlsm.models.clipseg import CLIPSeg, CLIPSegTowers
from vlsm.models.decoder import PromptDecoder
from vlsm.models.fusion import AllActivationsUNetD


class EnsembleB(CLIPSeg):
    """CLIPSeg with UNet-D, which takes a text-conditioned map of all activations."""

    @classmethod
    def assemble(cls, options: Any, towers: CLIPSegTowers, decoder: PromptDecoder, copies: int = 1) -> Self:
        """Towers and decoder with an untrained CNN."""
        return cls(options, towers, decoder, AllActivationsUNetD(towers, options, copies))
