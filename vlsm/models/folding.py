"""Folds batch norms into the convolutions before them: the same logits with fewer passes over memory."""

from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlsm.models.contract import SegmentationModel
from vlsm.models.unet_d import UpBlock

_SMALL_PX = 64


def fold_batch_norms(model: SegmentationModel) -> None:
    """Fold batch norms in place and leave the model in eval mode. Afterwards it cannot be trained or saved.

    A norm is folded into a convolution if three conditions hold: both are children of one module and the convolution
    directly precedes the norm; both have the same number of channels; in one forward pass, the output of the
    convolution was the input of the norm. UNet-D applies one convolution twice before the norm; there only the second
    application gets the folded weights.
    """
    if model.is_folded:
        return
    model.eval()
    pairs = _find_pairs(model)
    for module in list(model.modules()):
        if isinstance(module, UpBlock):
            module.fold()
        previous: tuple[str, nn.Module] | None = None
        tapped = getattr(module, "return_layers", {})  # timm returns the outputs of these children: never fold them
        for name, child in list(module.named_children()):
            if previous and previous[0] not in tapped and (previous[1], child) in pairs:
                conv, norm = cast(nn.Conv2d, previous[1]), cast(nn.BatchNorm2d, child)
                setattr(module, previous[0], fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
            previous = (name, child)
    model.is_folded = True


@torch.no_grad()
def _find_pairs(model: SegmentationModel) -> set[tuple[nn.Module, nn.Module]]:
    """Return pairs of a convolution and a norm whose input is the convolution's output in one forward pass.

    The order of children is not enough: timm's RepVit sums several convolutions before the norm that follows one of
    them.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return set()  # a forward pass of a large transformer may take a minute
    conv_outputs: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    pairs: set[tuple[nn.Module, nn.Module]] = set()

    def record_output(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        conv_outputs[id(output)] = (module, output)  # keeps the tensor alive, so that no other tensor gets its id

    def match_input(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        conv, _ = conv_outputs.get(id(inputs[0]), (None, None))
        if conv is not None and _fits(conv, module):
            pairs.add((conv, module))

    hooks = [m.register_forward_hook(record_output) for m in model.modules() if type(m) is nn.Conv2d]
    hooks += [m.register_forward_pre_hook(match_input) for m in model.modules() if type(m) is nn.BatchNorm2d]
    # which layers follow each other does not depend on the size, but towers take one size only
    size = model.image_spec.size if model.embedding_width else min(_SMALL_PX, model.image_spec.size)
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
