"""The learning rate of each step, as a factor of the highest rate."""

from typing import Literal

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from vlsm.training.history import History
from vlsm.training.settings import OptimSettings

RULES = 2  # version of the rules for rates and weight decay; in version 1 all weights decay, and see `lr_factor`


def lr_factor(optim: OptimSettings, step: int, num_steps: int, history: History, rules: int = RULES) -> float:
    """Return the factor of step t, from 0, of T steps: a schedule is used at t = 0 to T - 1, so no step has rate 0.

    A warmup of w steps has the factors 1 / w, 2 / w, ... 1.

    Args:
        optim: schedule, warmup and number of epochs.
        step: t, counted from the start of the run.
        num_steps: steps of an epoch.
        history: metrics of the finished epochs, which the schedule plateau watches.
        rules: 1 for the rules of an earlier version, whose cosine was used at t = 1 to T.

    Source: cosine from SGDR, arXiv 1608.03983, as in timm; the warmup of Ma and Yarats, arXiv 1910.04209.
    """
    warmup = optim.warmup_epochs * num_steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if optim.schedule == "cosine":
        length = max(optim.epochs * num_steps - warmup, 1e-9)
        done = step + (rules == 1) - warmup
        factor *= 0.5 * (1 + np.cos(np.pi * min(1.0, max(0.0, done) / length)))
    if optim.schedule == "plateau":
        factor *= _plateau_factor(optim, history)
    return float(factor)


def _plateau_factor(optim: OptimSettings, history: History) -> float:
    """Return the factor that ReduceLROnPlateau has reached.

    It is computed from all epochs so far, so that the state of the scheduler need not be saved.
    """
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    monitor = optim.plateau_monitor or optim.monitor
    mode: Literal["max", "min"] = "max" if monitor == "dice" else "min"
    schedule = ReduceLROnPlateau(unit, mode, factor=optim.plateau_factor, patience=optim.plateau_patience, eps=0)
    for value in history.monitored(monitor):
        schedule.step(value)
    return float(unit.param_groups[0]["lr"])
