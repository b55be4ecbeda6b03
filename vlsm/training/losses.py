"""What training makes small."""

import torch
from torch import Tensor
from torch.nn import functional

_SMOOTH = 1e-5  # MONAI's, above and below


def segmentation_losses(logits: Tensor, target_masks: Tensor, dice_weight: float, ce_weight: float) -> Tensor:
    """The weighted sum of Dice loss and binary cross entropy of each example, each from its own pixels alone.

    Their mean is what MONAI's DiceCELoss gives with the sigmoid inside; importing that takes ten seconds and hundreds
    of megabytes in every worker. MedVLSM weighs them 1 and 0.2 (its public code hands over probabilities where that
    loss expects logits); UNet-D's BCE + Dice is 1 and 1.

    Args:
        logits: (B, 1, S, S), any float type; computed in float32.
        target_masks: (B, 1, S, S) of 0 and 1.
        dice_weight: of the Dice loss.
        ce_weight: of the cross entropy.

    Returns:
        (B,) float32.

    Source: V-Net, 3DV 2016, arXiv 1606.04797, without its squares; the weights as in MedVLSM, MIDL 2024, arXiv
        2308.07706, and VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
    """
    logits, target_masks = logits.float(), target_masks.float()
    losses = torch.zeros(len(logits), device=logits.device)
    if dice_weight:
        probability = torch.sigmoid(logits)
        overlap = (probability * target_masks).flatten(1).sum(1)
        total = probability.flatten(1).sum(1) + target_masks.flatten(1).sum(1)
        losses = losses + dice_weight * (1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH))
    if ce_weight:
        entropy = functional.binary_cross_entropy_with_logits(logits, target_masks, reduction="none")
        losses = losses + ce_weight * entropy.flatten(1).mean(1)
    return losses
