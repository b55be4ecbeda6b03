"""Batch norms folded into the convolutions before them: the same logits with fewer passes over memory."""

from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlsm.models.contract import SegmentationModel
from vlsm.models.unet_d import UpBlock


def fold_batch_norms(model: SegmentationModel) -> None:
    """Fold in place and leave the model in eval mode, for good: the model can no longer be trained or saved.

    A norm is folded into the convolution that stands directly before it among the children of one module, has its
    channels, and was seen to hand it its output. UNet-D
    applies one convolution twice before the norm; there the second application gets its own, folded weights.
    """
    if model.is_folded:
        return
    model.eval()
    follows = _find_pairs(model)
    for module in list(model.modules()):
        if isinstance(module, UpBlock):
            module.fold()
        previous: tuple[str, nn.Module] | None = None
        tapped = getattr(module, "return_layers", {})  # timm hands out what these children give: they stay as they are
        for name, child in list(module.named_children()):
            if previous and previous[0] not in tapped and (previous[1], child) in follows:
                conv, norm = cast(nn.Conv2d, previous[1]), cast(nn.BatchNorm2d, child)
                setattr(module, previous[0], fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
            previous = (name, child)
    model.is_folded = True


@torch.no_grad()
def _find_pairs(model: SegmentationModel) -> set[tuple[nn.Module, nn.Module]]:
    """Convolutions and the norms that take just what they give, seen in one forward pass.

    Order among children is not enough: timm's RepVit sums several convolutions before the norm that stands behind one.
    """
    given: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    pairs: set[tuple[nn.Module, nn.Module]] = set()

    def give(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        given[id(output)] = (module, output)  # kept alive, so that no other tensor has its id

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        conv, _ = given.get(id(inputs[0]), (None, None))
        if conv is not None and _fits(conv, module):
            pairs.add((conv, module))

    hooks = [m.register_forward_hook(give) for m in model.modules() if type(m) is nn.Conv2d]
    hooks += [m.register_forward_pre_hook(take) for m in model.modules() if type(m) is nn.BatchNorm2d]
    size = model.image_spec.size
    try:
        model(torch.zeros(1, 3, size, size, device=model.device), [""])
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
    )
