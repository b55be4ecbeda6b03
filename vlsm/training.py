"""The training loop, torch only: examples in memory, one model, one device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor

from vlsm.errors import VlsmError
from vlsm.images import normalize
from vlsm.models.contract import SegmentationModel
from vlsm.models.prompts import PromptCache


@dataclass(frozen=True)
class Examples:
    """Images at the model's size with their masks: (N, S, S, 3) uint8, (N, S, S) uint8 of 0 and 1, and N prompts."""

    images: np.ndarray
    target_masks: np.ndarray
    prompts: list[str]


def train(
    model: SegmentationModel, examples: Examples, epochs: int, lr: float, seed: int, batch_size: int = 16
) -> Iterator[float]:
    """Train in place, with random flips, AdamW and a one-cycle learning rate; yields the mean loss of each epoch.

    Args:
        model: on the device to train on; parameters that need no gradient are left alone.
        examples: all of them; they stay in memory.
        epochs: passes over the examples.
        lr: the highest learning rate.
        seed: of the order and the flips.
        batch_size: examples a step.

    Raises:
        VlsmError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=1e-3)
    # batch norms need two values at least: a remainder of one joins the batch before
    num_images = len(examples.images)
    sizes = [batch_size] * (num_images // batch_size)
    if remainder := num_images % batch_size:
        sizes = [*sizes, remainder] if remainder > 1 or not sizes else [*sizes[:-1], sizes[-1] + 1]
    steps = len(sizes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=steps)
    dice = DiceLoss(mode="binary", from_logits=True)
    cache = PromptCache(model)
    model.train()
    for epoch in range(epochs):
        losses = []
        order = torch.randperm(len(examples.images), generator=generator)
        for step, chosen in enumerate(torch.split(order, sizes)):
            images, targets = _flip(*_batch(examples, chosen, model.device), generator)
            prompts = [examples.prompts[index] for index in chosen.tolist()]
            logits = model(normalize(images, model.image_spec), prompts if model.learns_text else cache.encode(prompts))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets) + dice(logits, targets)
            if not torch.isfinite(loss):
                raise VlsmError(
                    f"the loss is {loss.item()} at epoch {epoch}, step {step}; try a learning rate below {lr}"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 0.5)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield float(np.mean(losses))
    model.eval()


def _batch(examples: Examples, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    index = chosen.numpy()
    images = torch.from_numpy(examples.images[index]).to(device)
    targets = torch.from_numpy(examples.target_masks[index]).to(device)
    return images, targets[:, None].float()  # (B, S, S, 3) uint8, (B, 1, S, S)


def _flip(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each example mirrored or not, left to right and top to bottom."""
    draws = torch.rand(len(images), 2, generator=generator).to(images.device) < 0.5
    for axis in (0, 1):
        mirrored = draws[:, axis]
        images = torch.where(mirrored[:, None, None, None], images.flip(1 + axis), images)
        targets = torch.where(mirrored[:, None, None, None], targets.flip(2 + axis), targets)
    return images, targets
