"""Training losses."""

import torch
from torch import Tensor
from torch.nn import functional

_SMOOTH = 1e-5  # added to numerator and denominator, as in MONAI


def segmentation_losses(logits: Tensor, target_masks: Tensor, dice_weight: float, ce_weight: float) -> Tensor:
    """Return the weighted sum of Dice loss and binary cross entropy of each example, from its own pixels alone.

    The mean over the examples equals MONAI's DiceCELoss with sigmoid=True. MONAI is not used, because its import takes
    ten seconds and hundreds of megabytes in every worker. MedVLSM uses the weights 1 and 0.2 (its public code passes
    probabilities where that loss expects logits). UNet-D's BCE + Dice has the weights 1 and 1.

    Args:
        logits: (B, 1, S, S), any float dtype; the losses are computed in float32.
        target_masks: (B, 1, S, S), values 0 and 1.
        dice_weight: weight of the Dice loss.
        ce_weight: weight of the cross entropy.

    Returns:
        (B,) float32, one loss per example.

    Source: Dice loss from V-Net, 3DV 2016, arXiv 1606.04797, without the squares of its denominator; weights from
        MedVLSM, MIDL 2024, arXiv 2308.07706, and VLSM-Ensemble, MIDL 2025, arXiv 2509.05154.
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
