"""Measure figures fairly, and write them with the machine they come from."""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar


def alternate(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Return the median seconds of each call. The calls are interleaved; a first warm-up round does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, call_s in zip(calls, seconds, strict=True):
            start_s = time.perf_counter()
            call()
            if repeat:
                call_s.append(time.perf_counter() - start_s)
    return [statistics.median(call_s) for call_s in seconds]


T = TypeVar("T")
_LONGEST_S = 90.0  # time limit for quiet rounds


def quietest(repeats: int, measure_round: Callable[[], T]) -> tuple[list[T], float]:
    """Return the `repeats` rounds with the least foreign CPU load, and the largest load among them in cores.

    Foreign load comes from processes other than this one and its children. Measuring stops after `repeats` rounds with
    less than 0.1 foreign cores, or after 90 s if there are `repeats` rounds by then.
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
    """Return the CPU seconds of all processes except this one and its children."""
    import psutil  # imported here: the gpu benchmark must run without psutil

    total = psutil.cpu_times()
    this_process = psutil.Process()
    spent = total.user + total.nice + total.system + total.irq + total.softirq + total.steal
    for process in (this_process, *this_process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent -= times.user + times.system
    return float(spent)


def describe_machine() -> dict[str, Any]:
    """Return the CPU, its number of cores, and the versions of torch and Python."""
    import torch  # here: not every benchmark and its processes need it

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def name_machine(figures: dict[str, Any]) -> str:
    """Return the device, or the CPU, and the torch version of measured figures as text."""
    device = figures.get("device") or f"{figures['cores']} cores of {figures['cpu']}"
    return f"{device}, torch {figures['torch']}"


def write_json(path: str | None, benchmark: str, figures: dict[str, Any]) -> None:
    """Write the figures and the description of this machine to a JSON file, if the user named one with --json."""
    if path:
        report = {"benchmark": benchmark} | describe_machine() | figures
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
