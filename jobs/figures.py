"""How figures are taken and written."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEASURED = Path(__file__).parent / "measured"  # figures that the README shows, as benchmarks have written them


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
    return {"cpu": cpu, "torch": torch.__version__, "python": platform.python_version()}


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Put the figures, and the machine they come from, where the user wants them."""
    if path:
        Path(path).write_text(json.dumps(describe_machine() | figures, indent=2), encoding="utf-8")


def tell_gpu(figures: dict[str, Any]) -> list[str]:
    """The lines of the README about what `python -m jobs.benchmark gpu` has written."""
    lines = [
        f"One {figures['device']} ({figures['peak_tflop_s']:.0f} TFLOP/s of bfloat16 in a large matrix product), torch "
        f"{figures['torch']}, {figures['batch_size']} images at once, one prompt, medians of {figures['repeats']}:",
        "",
        "| model | pixels | images/s, eager fp32 | bf16 | bf16 compiled | to fp32 | of the peak | cores to decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["models"]:
        best, fp32 = row["compiled_per_s"] or row["bf16_per_s"], row["fp32_per_s"]
        lines.append(
            f"| `{row['name']}` | {row['image_size']} | {fp32:,.0f} | {row['bf16_per_s']:,.0f} | {best:,.0f} | "
            f"{best / fp32:.1f}x | {row['peak_share']:.0%} | {row['decode_cores']:.0f} |"
        )
    return lines


def performance_section() -> str:
    """The README's section of measured figures, from the files in `jobs/measured`."""
    lines = []
    for path in sorted(MEASURED.glob("gpu-*.json")):
        lines += [*tell_gpu(json.loads(path.read_text(encoding="utf-8"))), ""]
    return "\n".join(lines)
