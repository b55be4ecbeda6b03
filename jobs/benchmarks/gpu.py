"""The segment job's work on one GPU: the bare models, and what the job makes of their speed."""

import contextlib
import functools
import importlib.util
import math
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.benchmarks.figures import write_json
from jobs.benchmarks.gpu_models import HEAD, SMALL, ModelBench, Scale, explain, row_of
from vlsm.models import MODELS

if TYPE_CHECKING:
    from jobs.benchmarks.gpu_job import Archive, JobSpeed

_JOB_MODELS = ("clipseg", "vlsm_b", "vlsm_a", "unet_d")
_PIPELINE_S = 5.0  # duration of one measurement of the whole job


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark gpu`."""
    parser.add_argument(
        "--model",
        action="append",
        choices=MODELS,
        help=f"may be repeated (default: the job around {', '.join(_JOB_MODELS)}, then all bare models)",
    )
    parser.add_argument(
        "--prompts", action="append", type=int, choices=range(1, 11), help="of the job; may be repeated (1 and 10)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="rounds; the median counts (5)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, choices=range(1, 4097), metavar="N", help="images per batch (32)"
    )
    parser.add_argument("--device", default="cuda", help="torch device (cuda); cpu tries the benchmark without a GPU")
    parser.add_argument("--seconds-limit", type=float, default=math.inf, metavar="S", help="end after about S s")
    parser.add_argument(
        "--small", action="store_true", help="few small images, no compiler, no Ray: whether all of it works"
    )


def measure(args: Namespace) -> int:
    """Measure the segment job's work on one GPU, then the bare models. It needs no Ray, but uses it if it is there.

    The job is measured around each model, with one prompt and with ten: the bare compiled model on a batch that lies on
    the device, `Segmenter.predict_logits` from pixels of the host, the model actor's work on shards in memory, and the
    whole job with Ray, with the CPU time of its stages. Images are JPEGs of 560 x 560 pixels.

    The bare models have their published sizes and random weights. Three variants run interleaved: eager float32,
    bfloat16 as the Segmenter runs it, and the same compiled. Images are on the GPU as uint8 before the measurement; the
    rates exclude compile time. The peak rate is that of a large bfloat16 matrix product in the same run. The CPU cores
    decode drawn JPEGs with sides of 480 to 640 pixels.

    What is most important comes first. With a limit, no step begins that would end after it, by the longest step of its
    kind so far.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --device cpu tries the benchmark without one", file=sys.stderr)
        return 2
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the job would use a GPU that it sees
    # the fast path of nn.MultiheadAttention computes attention maps; without it torch uses fused attention
    torch.backends.mha.set_fastpath_enabled(False)
    scale = SMALL if args.small else Scale(args.batch_size, repeats=min(3, args.repeats))
    repeats = 1 if args.small else args.repeats
    bench = ModelBench(torch.device(args.device), scale.batch_size, repeats, scale.backend)
    with tempfile.TemporaryDirectory() as folder:
        figures = _take_steps(_Steps(args, Path(folder), scale, bench), args)
    return 0 if figures["runs"] or figures["job"] else 1


def _take_steps(steps: "_Steps", args: Namespace) -> dict[str, Any]:
    """Take the steps for which there is time; write and return their figures."""
    figures, clock = steps.figures, _Clock(args.seconds_limit)
    print(f"{figures['device']}: {figures['peak_tflop_s']:.1f} TFLOP/s in bfloat16, batches of {figures['batch_size']}")
    for kind, name, step in steps:
        if not clock.has_time(kind):
            figures["left_out"].append(name)
            continue
        with clock.step(kind):
            try:
                step()
            except Exception as error:  # any error of a driver, a kernel or the allocator: continue with the next step
                figures["failed"][name] = explain(error)
                print(f"{name:15} failed: {figures['failed'][name]}", flush=True)
        write_json(args.json, "gpu", figures)
    if figures["left_out"]:
        print(f"left out after {args.seconds_limit:.0f} s: {', '.join(figures['left_out'])}")
    write_json(args.json, "gpu", figures)
    return figures


class _Steps:
    """The steps of the measurement, which write their figures.

    Attributes:
        figures: what is measured so far.
    """

    def __init__(self, args: Namespace, folder: Path, scale: Scale, bench: ModelBench) -> None:
        self._args, self._folder, self._scale, self._bench = args, folder, scale, bench
        self._speeds: dict[tuple[str, int], JobSpeed] = {}
        self.figures: dict[str, Any] = bench.describe() | {"job": [], "runs": [], "failed": {}, "left_out": []}

    def __iter__(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        """Yield the kind, the name and the function of each step, the most important first."""
        first, *others = self._args.model or _JOB_MODELS
        counts = self._args.prompts or [1, 10]
        has_ray = not self._args.small and all(importlib.util.find_spec(package) for package in ("ray", "psutil"))
        job_cases = [(name, count) for name in (first, *others) for count in counts]
        cases = [("job", case) for case in job_cases]
        if has_ray:
            cases.insert(len(counts), ("pipeline", (first, counts[0])))
            ranked = sorted(job_cases[1:], key=lambda case: counts.index(case[1]))
            cases += [("pipeline", case) for case in ranked]
        steps = {"job": self._measure_job, "pipeline": self._add_pipeline}
        for kind, (name, count) in cases:
            yield kind, f"{kind} of {name}, {count}", functools.partial(steps[kind], name, count)
        for name in self._args.model or MODELS:
            yield "model", name, functools.partial(self._measure_model, name)

    @functools.cached_property
    def _archive(self) -> "Archive":
        from jobs.benchmarks.gpu_job import Archive

        return Archive.draw(self._folder, self._scale)

    def _measure_job(self, name: str, num_prompts: int) -> None:
        from jobs.benchmarks.gpu_job import measure_job  # here: bare models need torch, but nothing else of a run

        speed = measure_job(name, num_prompts, self._archive, self._scale, self._bench.device)
        if not self._speeds:
            print(_JOB_HEAD)
        self._speeds[name, num_prompts] = speed
        self._keep(speed)

    def _add_pipeline(self, name: str, num_prompts: int) -> None:
        from jobs.benchmarks.gpu_job import add_pipeline

        if speed := self._speeds.get((name, num_prompts)):
            add_pipeline(speed, self._archive, self._scale, _PIPELINE_S)
            self._keep(speed)

    def _keep(self, speed: "JobSpeed") -> None:
        self.figures["job"] = [each.as_dict() for each in self._speeds.values()]
        print(_job_row(speed.as_dict()), flush=True)

    def _measure_model(self, name: str) -> None:
        speed = self._bench.measure(name)
        if not self.figures["runs"]:
            print(HEAD)
        self.figures["runs"].append(asdict(speed))
        print(row_of(speed), flush=True)


class _Clock:
    """Says whether there is time for a step of some kind, by the longest one of this kind so far."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds
        self._longest_s: dict[str, float] = {}

    def has_time(self, kind: str) -> bool:
        return time.monotonic() + self._longest_s.get(kind, 0.0) < self._end_s

    @contextlib.contextmanager
    def step(self, kind: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), time.monotonic() - start_s)


_OWED = (
    "Still to be measured: what `Segmenter`, the model actor and the whole job make of these rates, with one prompt "
    "and with ten."
)


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation. Earlier figures have no part `job`."""
    job = _tell_job(figures["job"], figures["batch_size"]) if figures.get("job") else []
    models = _tell_models(figures) if figures["runs"] else []
    return [*job, *models] if job else [*models, "", _OWED]


def _tell_job(rows: list[dict[str, Any]], batch_size: int) -> list[str]:
    lines = [
        f"The segment job around a model, {batch_size} images at once, and its share of the bare compiled model, on a "
        "batch that lies on the device: `Segmenter` from pixels of the host, the model actor's work from pixels to all "
        "that leaves it, and the whole job with Ray. Milliseconds of a core are for JPEGs of 560 x 560 pixels, on a "
        "local disk. Cores are those that keep the device busy, with those of Ray if they are measured.",
        "",
        "| model | prompts | bare, images/s | Segmenter | actor | whole job | core ms: fetch | actor | write | driver, "
        "Ray | cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bare, ms, of_ray = row["bare_per_s"], row["core_ms"], row["pipeline_core_ms"]
        pipeline = "" if row["pipeline_per_s"] is None else f"{row['pipeline_per_s'] / bare:.2f}"
        ray_ms = f"{of_ray['driver'] + of_ray['ray']:.2f}" if of_ray else ""
        lines.append(
            f"| `{row['name']}` | {row['num_prompts']} | {bare:,.0f} | {row['segmenter_per_s'] / bare:.2f} | "
            f"{row['actor_per_s'] / bare:.2f} | {pipeline} | {ms['fetch']:.2f} | {ms['actor']:.2f} | {ms['write']:.2f} "
            f"| {ray_ms} | {row['device_cores']:.0f} |"
        )
    return [*lines, ""]


def _tell_models(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{figures['peak_tflop_s']:.0f} TFLOP/s of bfloat16 in a large matrix product, {figures['batch_size']} images "
        f"at once, one prompt, medians of {figures['repeats']}. Cores to decode are those that reading and resizing "
        "JPEGs of 560 x 560 pixels keeps busy at that rate.",
        "",
        "| model | pixels | images/s, eager fp32 | bf16 | bf16 compiled | to fp32 | of the peak | cores to decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        best, fp32 = row["compiled_per_s"] or row["bf16_per_s"], row["fp32_per_s"]
        lines.append(
            f"| `{row['name']}` | {row['image_size']} | {fp32:,.0f} | {row['bf16_per_s']:,.0f} | {best:,.0f} | "
            f"{best / fp32:.1f}x | {row['peak_share']:.0%} | {row['decode_cores']:.0f} |"
        )
    return lines


_JOB_HEAD = (
    f"{'':15} {'':>7} {'images/s':>9} {'share of the bare model':>29} {'core ms an image':>29} {'':>6}\n"
    f"{'job of':15} {'prompts':>7} {'bare':>9} {'Segmenter':>9} {'actor':>9} {'job':>9} {'fetch':>7} {'actor':>6} "
    f"{'write':>6} {'Ray':>7} {'cores':>6}"
)


def _job_row(row: dict[str, Any]) -> str:
    bare, ms, of_ray = row["bare_per_s"], row["core_ms"], row["pipeline_core_ms"]
    pipeline = "-" if row["pipeline_per_s"] is None else f"{row['pipeline_per_s'] / bare:.3f}"
    ray_ms = f"{of_ray['driver'] + of_ray['ray']:.2f}" if of_ray else "-"
    line = (
        f"{row['name']:15} {row['num_prompts']:7} {bare:9,.1f} {row['segmenter_per_s'] / bare:9.3f} "
        f"{row['actor_per_s'] / bare:9.3f} {pipeline:>9} {ms['fetch']:7.2f} {ms['actor']:6.2f} {ms['write']:6.2f} "
        f"{ray_ms:>7} {row['device_cores']:6.1f}"
    )
    return "\n".join([line, *(f"{'':15} {part}: {problem}" for part, problem in row["errors"].items())])
