"""A training worker that runs one epoch of a bare loop after each epoch of its own."""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.train_feed import Loaded
from jobs.train_group import Work
from jobs.train_worker import Worker, features_folder
from vlsm.models.prompts import PromptCache
from vlsm.training.losses import segmentation_losses

TURNS_NAME = "turns.json"  # file in OUTPUT: the seconds of both loops, and the worker's niceness, per epoch
LAST_TIME = "bare_s"  # the last of the seconds of an epoch


def train_in_turns(work: Work) -> None:
    """Train with an interleaved bare loop. `jobs.benchmarks.train` passes this function to its workers."""
    torch.set_num_threads(work.size.num_threads)
    with features_folder(work) as folder:
        _InterleavedWorker(work, folder).run()


@dataclass(frozen=True)
class _Batch:
    """One micro-batch of the bare loop, in memory."""

    pixel_values: Tensor
    targets: Tensor
    prompts: Any
    features: Any


class _InterleavedWorker(Worker):
    """A worker that runs one epoch of the bare loop after each epoch of its own."""

    def __init__(self, work: Work, features_folder: Path | None) -> None:
        super().__init__(work, features_folder)
        self._prompt_cache = PromptCache(self.learner.model)
        self._train = self._keep(self.feed.stream(self.order.train(0)))
        self._val = self._keep(self.feed.stream(self.order.evaluate("val", 0)))
        self._turns: list[dict[str, float]] = []
        self._started_s = time.perf_counter()

    def end_epoch(self, epoch: int) -> None:
        """End the epoch of the worker, wait until it is saved, then run a bare epoch."""
        start_s = time.perf_counter()
        self._turns.append({"niceness": os.nice(0), "steps_s": start_s - self._started_s})
        self._write_turns()
        end_epoch = super().end_epoch
        steps: dict[str, Callable[[], object]] = {
            "end_s": lambda: end_epoch(epoch), "beside_s": self.wait_until_saved, LAST_TIME: self._train_bare_epoch
        }  # fmt: skip
        for name, step in steps.items():
            step()
            self._turns[-1][name] = time.perf_counter() - start_s
            start_s += self._turns[-1][name]
        self._write_turns()
        self._started_s = time.perf_counter()

    def _write_turns(self) -> None:
        if self.rank == 0:
            path = Path(self.output, TURNS_NAME)
            path.with_suffix(".new").write_text(json.dumps(self._turns), encoding="utf-8")
            path.with_suffix(".new").replace(path)  # in one step: the driver reads it at any time

    def _keep(self, stream: Iterable[Loaded]) -> list[_Batch]:
        return [self._prepare(*loaded) for loaded in stream]

    @torch.no_grad()
    def _prepare(self, batch: Any, images: np.ndarray, masks: np.ndarray) -> _Batch:
        model = self.learner.model
        pixel_values = model.image_spec.normalize(torch.from_numpy(images))
        features = model.encode_towers(pixel_values) if self.features is not None else None
        prompts = list(batch.prompts) if model.learns_text else self._prompt_cache.encode(batch.prompts)
        return _Batch(pixel_values, torch.from_numpy(masks)[:, None].float(), prompts, features)

    def _train_bare_epoch(self) -> None:
        network, optimizer, optim = self.learner.network, self.learner.optimizer, self.settings.optim
        learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        network.train()
        for batch in self._train:
            logits = network(batch.pixel_values, batch.prompts, batch.features)
            losses = segmentation_losses(logits, batch.targets, optim.dice_weight, optim.ce_weight)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learning, optim.clip_norm or np.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        network.eval()
        with torch.no_grad():
            for batch in self._val:
                network(batch.pixel_values, batch.prompts, batch.features)
