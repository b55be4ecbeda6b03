"""How figures are taken and written."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
