"""Training of a model, micro-batch by micro-batch. This module needs only torch and does not load any data.

Every process of a group has a Learner. Collective work (a step, the end of an epoch, a state) needs a call in each one.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed

from vlsm.errors import VlsmError
from vlsm.models.contract import SegmentationModel
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.metrics import dice_scores
from vlsm.training.average import WeightAverage
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.groups import build_optimizer, match_layout
from vlsm.training.history import History
from vlsm.training.losses import segmentation_losses
from vlsm.training.parallel import broadcast_buffers, gather, parallelize, world_size
from vlsm.training.sampling import MicroBatch
from vlsm.training.schedule import RULES, lr_factor
from vlsm.training.settings import TrainSettings

_FUSED = _LOW_PRECISION = ("cuda",)  # devices with a fused optimiser, and with bf16 and fp16; others keep float32
_AVERAGE = "average "  # before the name of an averaged weight, in a state


class NotFiniteError(VlsmError):
    """The loss of an example is not finite. The optimiser has not made the step."""

    def __init__(self, example: int, loss: float, epoch: int, step: int) -> None:
        super().__init__(f"the loss of example {example} is {loss} at epoch {epoch + 1}, step {step + 1}")
        self.example = example


@dataclass(frozen=True)
class Score:
    """Result of one use of one example: its number, its loss, and its Dice at the model's image size and threshold."""

    example: int
    loss: float
    dice: float


class Learner:
    """A model, its optimiser and its learning rate.

    Args:
        model: in training mode, on the CPU, the same in every process.
        settings: settings of the run.
        num_steps: optimiser steps of an epoch.
        device: device to train on.
        features: cache for the activations of frozen towers, or None to compute them each time.
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
        # torch's fast path for nn.MultiheadAttention builds attention maps; the normal path uses fused attention
        torch.backends.mha.set_fastpath_enabled(False)
        layout = torch.contiguous_format if settings.run.fsdp else torch.channels_last  # FSDP supports no other
        self.model = model.to(device).to(memory_format=layout)
        self.network = parallelize(self.model, settings)
        is_fixed = settings.data.augment.is_off and settings.data.tile_size is None  # each image is always the same
        self.features = features if model.has_frozen_towers and is_fixed else None
        self.optimizer = build_optimizer(self.model, settings.optim, is_fused=device.type in _FUSED)
        self.average = None
        if settings.optim.ema_decay is not None:
            self.average = WeightAverage(self.model, settings.optim.ema_decay)
        precision = settings.optim.precision if device.type in _LOW_PRECISION else "fp32"
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._prompts = PromptCache(model)
        self._pending: list[tuple[MicroBatch, Tensor]] = []  # of the unfinished step, with losses and Dice (2, B)
        self._rules = RULES

    def train(self, batch: MicroBatch, images: Tensor, target_masks: Tensor, history: History) -> list[Score]:
        """Train on a micro-batch. If the micro-batch ends a step, the optimiser updates the weights.

        The gradient of a step is the gradient of the mean loss over the whole batch. The number of workers and the size
        of the micro-batches change it only by rounding errors, and by the batch statistics of batch norms.

        Args:
            batch: numbers, weights and prompts of the examples.
            images: (B, S, S, 3) uint8.
            target_masks: (B, S, S) uint8 of 0 and 1.
            history: metrics of the run so far; schedule "plateau" derives the learning rate from them.

        Returns:
            The scores of this worker's examples in the whole step if the micro-batch ends the step, else an empty list.

        Raises:
            NotFiniteError: a loss is not finite in any process. Every process raises it.
        """
        if self.average is not None and self.average.is_in_model:
            self.average.exchange()
        self.network.train()
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        # dropout depends only on the position in the run, so that a resumed run gives the same result
        num_done = sum(map(bool, (weight for done, _ in self._pending for weight in done.weights)))
        position = [self.settings.seed, batch.epoch, batch.step, num_done, rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))
        with contextlib.nullcontext() if batch.ends_step else self._without_sync():
            losses, dice = self._score(self._predict(batch, images), target_masks)
            weights = torch.tensor(batch.weights).to(self.device, non_blocking=True)
            losses = torch.where(weights > 0, losses, 0)
            # DDP and FSDP average gradients over workers; times world_size, the average is the sum over the workers
            self.scaler.scale(losses.sum() * world_size() / batch.batch_size).backward()  # type: ignore[no-untyped-call]
        self._pending.append((batch, torch.stack([losses.detach(), dice])))
        return self._step(batch, history) if batch.ends_step else []

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, images: Tensor, target_masks: Tensor) -> list[Score]:
        """Return the scores of a micro-batch's examples. The arguments are those of `train`."""
        optim = self.settings.optim
        self.network.eval()
        logits = self._predict(batch, images)
        if optim.val_flip:
            mirrored = self._predict(batch, images.flip(2), is_mirrored=True).flip(3)
            logits = torch.logit((logits.float().sigmoid() + mirrored.float().sigmoid()) / 2, eps=1e-6)
        values = torch.stack(self._score(logits, target_masks, is_validation=True))
        return _scores([batch], values.tolist())

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step, over all parameter groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def end_training(self) -> None:
        """Prepare an evaluation: all processes get the batch statistics of the first one.

        If there is an average of the weights, the model has the averaged weights from here until `train` is called.
        """
        broadcast_buffers(self.model)
        if self.average is not None and not self.average.is_in_model:
            self.average.exchange()
            broadcast_buffers(self.model)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state to resume from: trainable weights, buffers, their averages, and the optimiser's state.

        The state is on the CPU and complete only in rank 0. Frozen weights are not in it; they are loaded from their
        original source again.
        """
        # here and below: this import takes 3 s, and the first step need not wait for it
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        average, is_in_model = self.average, self.average is not None and self.average.is_in_model
        if average is not None and is_in_model:
            average.exchange()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state, optimizer = get_state_dict(self.network, self.optimizer, options=options)
        weights = cast(dict[str, Tensor], state)
        other: dict[str, Any] = {"scaler": self.scaler.state_dict(), "rules": self._rules}
        if average is not None:
            weights |= {f"{_AVERAGE}{name}": value.to("cpu", copy=True) for name, value in average.values.items()}
            other["average_steps"] = average.steps
            if is_in_model:
                weights = {name: value.clone() for name, value in weights.items()}  # on a CPU they are the model's own
                average.exchange()
        return weights, dict(optimizer) | other

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Continue from a state of `state`. Every process must pass the same state.

        The state of an earlier version has other groups of weights. A run with such a state keeps the rules of that
        version, so that it ends as if nothing had happened: all weights decay, and step t has the rate of step t + 1.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        optimizer, weights = dict(optimizer), dict(weights)
        self.scaler.load_state_dict(optimizer.pop("scaler"))
        self._rules = optimizer.pop("rules", 1)
        if self._rules == 1:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.settings.optim.weight_decay
        steps = optimizer.pop("average_steps", 0)
        averaged = {name: weights.pop(name) for name in list(weights) if name.startswith(_AVERAGE)}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=cast(dict[str, Any], weights),
            optim_state_dict=optimizer | {"param_groups": self._named_groups(optimizer["param_groups"])},
            options=options,
        )
        match_layout(self.optimizer)
        if self.average is not None:
            self.average.restore({name.removeprefix(_AVERAGE): value for name, value in averaged.items()}, steps)

    def _named_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the optimiser's own groups by the names of their weights, with the saved rates of the last step."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        rates = {name: group["lr"] for group in saved for name in group["params"]}
        groups = []
        for group in self.optimizer.param_groups:
            members = [names[id(parameter)] for parameter in group["params"]]
            groups.append(group | {"params": members, "lr": rates.get(members[0], group["lr"])})
        return groups

    def _predict(self, batch: MicroBatch, images: Tensor, is_mirrored: bool = False) -> Tensor:
        """Return the logits of the images, (B, 1, S, S). Features of mirror images are not kept."""
        pixel_values = self.model.image_spec.normalize(images.to(self.device, non_blocking=True))
        prompts = list(batch.prompts) if self.model.learns_text else self._prompts.encode(batch.prompts)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            activations = None
            if self.features is not None and not is_mirrored:
                activations = self.features.fetch(batch.examples, pixel_values, self.model)
            return cast(Tensor, self.network(pixel_values, prompts, activations))

    def _score(self, logits: Tensor, target_masks: Tensor, is_validation: bool = False) -> tuple[Tensor, Tensor]:
        """Return losses and Dice, (B,) each."""
        optim, targets = self.settings.optim, target_masks.to(self.device, non_blocking=True)[:, None]
        is_entropy = is_validation and optim.val_loss == "ce"
        weights = (0.0, 1.0) if is_entropy else (optim.dice_weight, optim.ce_weight)
        masks = torch.sigmoid(logits.detach().float()) >= self.model.threshold
        return segmentation_losses(logits, targets, *weights), dice_scores(masks, targets.bool())

    def _step(self, batch: MicroBatch, history: History) -> list[Score]:
        optim = self.settings.optim
        scores, is_finite = self._fetch()
        if not is_finite:
            self._refuse(batch, scores)
        step = batch.epoch * self.num_steps + batch.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(optim, step, self.num_steps, history, self._rules)
        self.scaler.unscale_(self.optimizer)
        if optim.clip_norm is not None:
            trainable = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return scores

    def _fetch(self) -> tuple[list[Score], bool]:
        """Return the scores of the step, and whether the losses of all processes are finite.

        This is the only place of a step where the process waits for the device: it gets all numbers in one transfer.
        """
        batches, values = zip(*self._pending, strict=True)
        self._pending = []
        columns = torch.cat(values, dim=1)
        num_bad = (~columns[0].isfinite()).sum().to(columns.dtype)
        if distributed.is_initialized():
            distributed.all_reduce(num_bad)
        *numbers, bad = torch.cat([columns.flatten(), num_bad[None]]).tolist()
        half = len(numbers) // 2
        return _scores(batches, [numbers[:half], numbers[half:]]), bad == 0

    def _refuse(self, batch: MicroBatch, scores: list[Score]) -> None:
        """Raise a NotFiniteError in every process, with the first bad example of all."""
        first = gather([score for score in scores if not np.isfinite(score.loss)])[0]
        self.optimizer.zero_grad(set_to_none=True)
        raise NotFiniteError(first.example, first.loss, batch.epoch, batch.step)

    def _without_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which each worker keeps its gradients. The last micro-batch of a step combines them."""
        if hasattr(self.network, "no_sync"):
            return self.network.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()  # FSDP combines gradients at each micro-batch; the sums are the same


def _scores(batches: Sequence[MicroBatch], columns: list[list[float]]) -> list[Score]:
    """Return the scores of the examples of micro-batches, without padding, from their losses and Dice."""
    uses = [
        (example, weight) for batch in batches for example, weight in zip(batch.examples, batch.weights, strict=True)
    ]
    rows = zip(uses, *columns, strict=True)
    return [Score(example, loss, dice) for (example, weight), loss, dice in rows if weight]
