"""A model that learns, micro-batch by micro-batch: torch only, and indifferent to where examples come from.

Every process of a group has a Learner; what they do together (a step, an epoch's end, a state) they all call.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import ReduceLROnPlateau

from vlsm.errors import VlsmError
from vlsm.images.decode import normalize
from vlsm.models.contract import SegmentationModel
from vlsm.models.prompts import PromptCache
from vlsm.models.towers import Towers
from vlsm.segmentation.metrics import dice_scores
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import History
from vlsm.training.losses import segmentation_losses
from vlsm.training.parallel import broadcast_buffers, gather, parallelize, world_size
from vlsm.training.sampling import MicroBatch
from vlsm.training.settings import TrainSettings


class NotFiniteError(VlsmError):
    """The loss of an example is no finite number; nothing was learned from its step."""

    def __init__(self, example: int, loss: float, epoch: int, step: int) -> None:
        super().__init__(f"the loss of example {example} is {loss} at epoch {epoch + 1}, step {step + 1}")
        self.example = example


@dataclass(frozen=True)
class Score:
    """Of one use of one example: its number, its loss, its Dice at the model's size and threshold."""

    example: int
    loss: float
    dice: float


class Learner:
    """A model, its optimiser and its learning rate.

    Args:
        model: in training mode, on the CPU, the same in every process.
        settings: of the run.
        num_steps: optimiser steps of an epoch.
        device: to train on.
        features: where frozen towers' activations are kept, or None to compute them each time.
    """

    def __init__(
        self,
        model: SegmentationModel,
        settings: TrainSettings,
        num_steps: int,
        device: torch.device,
        features: FeatureCache | None = None,
    ) -> None:
        self.settings, self.num_steps, self.device = settings, num_steps, device
        # torch's shortcut for nn.MultiheadAttention makes attention maps; without it the attention is fused
        torch.backends.mha.set_fastpath_enabled(False)
        layout = torch.contiguous_format if settings.run.fsdp else torch.channels_last  # FSDP takes no other
        self.model = model.to(device).to(memory_format=layout)
        self.network = parallelize(self.model, settings)
        self.features = features if model.has_frozen_towers and settings.data.augment.is_off else None
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=settings.optim.weight_decay)
        precision = settings.optim.precision if device.type == "cuda" else "fp32"
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._prompts = PromptCache(model)
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # of the step under way: example, loss, Dice

    def train(self, batch: MicroBatch, images: Tensor, target_masks: Tensor, history: History) -> list[Score]:
        """Learn from a micro-batch; the optimiser moves where it ends a step.

        The gradient of a step is that of the mean loss over its batch, whoever computed which part of it: the number of
        workers and the size of micro-batches change it by float noise only (and by batch norms' own statistics).

        Args:
            batch: which examples these are.
            images: (B, S, S, 3) uint8.
            target_masks: (B, S, S) uint8 of 0 and 1.
            history: of the run so far, which decides the learning rate.

        Returns:
            The scores of this worker's share where it ends a step; before, nothing.

        Raises:
            NotFiniteError: in every process, where a loss in any of them is not finite.
        """
        self.network.train()
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        # dropout follows from the place in the run alone, so that a run taken up again is the same run
        place = [self.settings.seed, batch.epoch, batch.step, len(self._pending), rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        with contextlib.nullcontext() if batch.ends_step else self._without_sync():
            losses, dice = self._forward(batch, images, target_masks)
            weights = torch.tensor(batch.weights, device=self.device)
            losses = torch.where(weights > 0, losses, 0)
            # workers' gradients are averaged: the sum over all workers is what a batch's mean is made of
            self.scaler.scale(losses.sum() * world_size() / batch.batch_size).backward()  # type: ignore[no-untyped-call]
        self._pending += [
            (example, loss, score)
            for example, weight, loss, score in zip(batch.examples, batch.weights, losses.detach(), dice, strict=True)
            if weight
        ]
        return self._step(batch, history) if batch.ends_step else []

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, images: Tensor, target_masks: Tensor) -> list[Score]:
        """The scores of a micro-batch's examples; arguments as for `train`."""
        self.network.eval()
        losses, dice = self._forward(batch, images, target_masks)
        rows = zip(batch.examples, batch.weights, losses.tolist(), dice.tolist(), strict=True)
        return [Score(example, loss, score) for example, weight, loss, score in rows if weight]

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def end_training(self) -> None:
        """Before an evaluation: all processes take the first one's batch statistics."""
        broadcast_buffers(self.model)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a run is taken up from, whole in rank 0, on the CPU: learning weights, buffers, the optimiser's state.

        What never learns is left out: it is loaded again from where it came from.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights, optimizer = get_state_dict(self.network, self.optimizer, options=options)
        return cast(dict[str, Tensor], weights), dict(optimizer) | {"scaler": self.scaler.state_dict()}

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Go on from a state, the same in every process."""
        optimizer = dict(optimizer)
        self.scaler.load_state_dict(optimizer.pop("scaler"))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=cast(dict[str, Any], weights),
            optim_state_dict=optimizer,
            options=options,
        )

    def _forward(self, batch: MicroBatch, images: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and Dice, (B,) each."""
        optim = self.settings.optim
        pixel_values = normalize(images.to(self.device), self.model.image_spec)
        targets = target_masks.to(self.device)[:, None]
        prompts = list(batch.prompts) if self.model.learns_text else self._prompts.encode(batch.prompts)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            activations = None
            if self.features is not None:
                activations = self.features.fetch(batch.examples, pixel_values, self.model)
            logits = self.network(pixel_values, prompts, activations)
        losses = segmentation_losses(logits, targets, optim.dice_weight, optim.ce_weight)
        masks = torch.sigmoid(logits.detach().float()) >= self.model.threshold
        return losses, dice_scores(masks, targets.bool())

    def _step(self, batch: MicroBatch, history: History) -> list[Score]:
        optim = self.settings.optim
        examples, losses, dice = zip(*self._pending, strict=True) if self._pending else ((), (), ())
        self._pending = []
        scores = [
            Score(example, loss, score)
            for example, loss, score in zip(examples, *self._fetch(losses, dice), strict=True)
        ]
        self._check_finite(batch, scores)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self._lr_factor(batch, history)
        self.scaler.unscale_(self.optimizer)
        if optim.clip_norm is not None:
            learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(learning, optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return scores

    @staticmethod
    def _fetch(losses: Sequence[Tensor], dice: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Off the device, in one transfer each."""
        return (torch.stack(losses).tolist(), torch.stack(dice).tolist()) if losses else ([], [])  # type: ignore[arg-type]

    def _check_finite(self, batch: MicroBatch, scores: list[Score]) -> None:
        bad = [score for score in scores if not np.isfinite(score.loss)]
        if distributed.is_initialized():
            flag = torch.tensor([float(bool(bad))], device=self.device)
            distributed.all_reduce(flag)
            if not flag.item():
                return
        found = gather(bad)
        if found:
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFiniteError(found[0].example, found[0].loss, batch.epoch, batch.step)

    def _lr_factor(self, batch: MicroBatch, history: History) -> float:
        optim = self.settings.optim
        epoch = batch.epoch + (batch.step + 1) / self.num_steps
        factor = min(1.0, epoch / optim.warmup_epochs) if optim.warmup_epochs else 1.0
        if optim.schedule == "cosine":
            length = max(optim.epochs - optim.warmup_epochs, 1e-9)
            factor *= 0.5 * (1 + np.cos(np.pi * min(1.0, max(0.0, epoch - optim.warmup_epochs) / length)))
        if optim.schedule == "plateau":
            factor *= _plateau_factor(history, self.settings)
        return float(factor)

    def _groups(self) -> list[dict[str, Any]]:
        towers = {
            id(parameter)
            for part in self.model.modules()
            if isinstance(part, Towers)
            for parameter in part.parameters()
        }
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optim = self.settings.optim
        groups = [
            {"params": [parameter for parameter in learning if (id(parameter) in towers) == in_towers], "base_lr": lr}
            for in_towers, lr in ((True, optim.tower_lr or optim.lr), (False, optim.lr))
        ]
        return [group | {"lr": group["base_lr"]} for group in groups if group["params"]]

    def _without_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients stay with each worker until the last micro-batch of a step."""
        if hasattr(self.network, "no_sync"):
            return self.network.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()  # FSDP reduces each time; its sums are the same


def _plateau_factor(history: History, settings: TrainSettings) -> float:
    """What ReduceLROnPlateau makes of the epochs so far: a function of them, so that no state of it is to be kept."""
    optim = settings.optim
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    mode: Literal["max", "min"] = "max" if optim.monitor == "dice" else "min"
    schedule = ReduceLROnPlateau(unit, mode, factor=optim.plateau_factor, patience=optim.plateau_patience, eps=0)
    for value in history.monitored(optim.monitor):
        schedule.step(value)
    return float(unit.param_groups[0]["lr"])
