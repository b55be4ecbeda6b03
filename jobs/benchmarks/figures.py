"""How figures are taken and written."""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch


def alternate(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The median seconds of each call, measured in turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, own in zip(calls, seconds, strict=True):
            start_s = time.perf_counter()
            call()
            if repeat:
                own.append(time.perf_counter() - start_s)
    return [statistics.median(own) for own in seconds]


T = TypeVar("T")
_LONGEST_S = 90.0  # in which quiet rounds are waited for


def quietest(repeats: int, measure_round: Callable[[], T]) -> tuple[list[T], float]:
    """The rounds of a measurement in which others did least on this machine, and the most cores that they then took.

    It is over when there are so many in which they took less than a tenth of a core, or so many and no time left.
    """
    rounds: list[tuple[float, int, T]] = []
    deadline_s = time.monotonic() + _LONGEST_S
    while len(rounds) < repeats or (
        time.monotonic() < deadline_s and sum(cores < 0.1 for cores, *_ in rounds) < repeats
    ):
        before_s, start_s = _foreign_core_s(), time.monotonic()
        measured = measure_round()
        foreign_s = max(0.0, _foreign_core_s() - before_s)
        rounds.append((foreign_s / (time.monotonic() - start_s), len(rounds), measured))
    chosen = sorted(rounds)[:repeats]
    return [measured for *_, measured in chosen], chosen[-1][0]


def _foreign_core_s() -> float:
    """Core seconds that were not this process's and its children's."""
    import psutil  # here, for a machine that has torch and the networks' libraries alone

    total = psutil.cpu_times()
    own = psutil.Process()
    spent = total.user + total.nice + total.system + total.irq + total.softirq + total.steal
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent -= times.user + times.system
    return float(spent)


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def name_machine(figures: dict[str, Any]) -> str:
    """The machine that figures come from, in words."""
    device = figures.get("device") or f"{figures['cores']} cores of {figures['cpu']}"
    return f"{device}, torch {figures['torch']}"


def write_json(path: str | None, benchmark: str, figures: dict[str, Any]) -> None:
    """Put the figures, and the machine they come from, where the user wants them."""
    if path:
        told = {"benchmark": benchmark} | describe_machine() | figures
        Path(path).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
