"""CLIPSeg's decoder on pairs of towers of transformers. It does not import open_clip, which takes seconds to load."""

from vlsm.models.tower_seg import TowerSeg
from vlsm.models.transformers_towers import TransformersTowers


class TransformersSeg(TowerSeg):
    """CLIPSeg's decoder on the activations of any pair of towers of transformers."""

    towers_class = TransformersTowers
