"""Batch norms folded into the convolutions before them: the same logits with fewer passes over memory."""

from typing import cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlsm.models.contract import SegmentationModel
from vlsm.models.unet_d import UpBlock


def fold_batch_norms(model: SegmentationModel) -> None:
    """Fold in place and leave the model in eval mode, for good: the model can no longer be trained or saved.

    A norm is folded into the convolution that stands directly before it among the children of one module and has its
    channels, which is where every network here and in the encoder libraries keeps what it applies in that order. UNet-D
    applies one convolution twice before the norm; there the second application gets its own, folded weights.
    """
    if model.is_folded:
        return
    model.eval()
    for module in list(model.modules()):
        if isinstance(module, UpBlock):
            module.fold()
        previous: tuple[str, nn.Module] | None = None
        tapped = getattr(module, "return_layers", {})  # timm hands out what these children give: they stay as they are
        for name, child in list(module.named_children()):
            if previous and previous[0] not in tapped and _fits(previous[1], child):
                conv, norm = cast(nn.Conv2d, previous[1]), cast(nn.BatchNorm2d, child)
                setattr(module, previous[0], fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
            previous = (name, child)
    model.is_folded = True


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
    )
