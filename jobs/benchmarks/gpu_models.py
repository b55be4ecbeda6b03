"""Images per second of the bare models on one device, and the CPU cores that decode images fast enough for it."""

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from jobs.benchmarks.archives import SMALL_PX, draw_file
from jobs.benchmarks.figures import alternate
from vlsm.images.decode import decode_image
from vlsm.images.preprocess import Square
from vlsm.models.contract import Features, SegmentationModel
from vlsm.models.costs import build_architecture, measure_cost
from vlsm.models.folding import fold_batch_norms
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.metrics import dice_scores

_NUM_FILES = 8
_ROUND_S = 0.2  # minimum duration of one timed series of calls


@dataclass(frozen=True)
class Scale:
    """Amounts of work of the measurement.

    Attributes:
        batch_size: images per batch.
        shard_rows: masks per shard.
        sides_px: range of the height and width of the images; the second value is excluded.
        round_s: minimum duration of one timed series of calls.
        repeats: rounds; the median counts.
        backend: of torch.compile.
    """

    batch_size: int
    shard_rows: int = 256
    sides_px: tuple[int, int] = (560, 561)
    round_s: float = 1.0
    repeats: int = 3
    backend: str = "inductor"


SMALL = Scale(2, 4, SMALL_PX, 0.01, 1, "eager")


@dataclass(frozen=True)
class GpuSpeed:
    """Speed of one model at its published size, with one prompt whose text features are computed beforehand.

    Attributes:
        name: key of MODELS.
        image_size: side of the input in pixels.
        gflop: operations per image in 10^9, counted as in `python -m vlsm.models`.
        fp32_per_s: images per second of the unchanged network: eager, float32, channels first.
        bf16_per_s: images per second as the Segmenter runs it: batch norms folded, channels last, bfloat16.
        compiled_per_s: images per second of the same, compiled; None if it cannot be compiled.
        peak_share: fraction of the measured bfloat16 peak rate that the compiled model, or else bf16_per_s, reaches.
        compile_s: seconds of the first compiled call.
        graph_breaks: number of places where the compiler returns to Python.
        largest_difference: largest absolute difference of probabilities between float32 and compiled (or bfloat16).
        mask_dice: Dice of the masks of the same two. The threshold is the median probability, because random weights
            suggest no better one.
        decoded_per_s: files of about 560 x 560 pixels per second that one CPU core decodes and resizes.
        decode_cores: number of CPU cores that keep the GPU busy.
        error: reason why the model could not be compiled, or None.
    """

    name: str
    image_size: int
    gflop: float
    fp32_per_s: float
    bf16_per_s: float
    compiled_per_s: float | None
    peak_share: float
    compile_s: float
    graph_breaks: int
    largest_difference: float
    mask_dice: float
    decoded_per_s: float
    decode_cores: float
    error: str | None


class ModelBench:
    """A device, its measured peak rate, and JPEG files to decode."""

    def __init__(self, device: torch.device, batch_size: int, repeats: int, backend: str = "inductor") -> None:
        self.device, self.batch_size, self.repeats, self._backend = device, batch_size, repeats, backend
        self.peak_flop_s = self._measure_peak()
        self.files = [draw_file(seed) for seed in range(_NUM_FILES)]
        self._decoded_per_s: dict[int, float] = {}

    def describe(self) -> dict[str, Any]:
        """Return the device, its peak rate, and the settings of the measurement."""
        is_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if is_cuda else "CPU",
            "cuda": torch.version.cuda if is_cuda else None,
            "peak_tflop_s": self.peak_flop_s / 1e12,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "file_bytes": round(float(np.mean([len(data) for data in self.files]))),
        }

    @torch.no_grad()
    def measure(self, name: str) -> GpuSpeed:
        """Return the speed of one model."""
        torch.compiler.reset()  # otherwise the ninth model reaches the recompile limit
        gflop = measure_cost(name).image_gflop
        with tempfile.TemporaryDirectory() as folder:
            model = build_architecture(name, Path(folder), "cpu").to(self.device)
        size = model.image_spec.size
        images = self._load(size)
        text_features = PromptCache(model).encode(["a small polyp"] * self.batch_size)
        folded = copy.deepcopy(model)
        fold_batch_norms(folded)
        folded.to(memory_format=torch.channels_last)
        plain, ours = _forward(model, text_features), _forward(folded, text_features, torch.bfloat16)
        calls = [self._timed(plain, images), self._timed(ours, images)]
        compiled = torch.compile(ours, dynamic=False, backend=self._backend)
        counters.clear()
        start_s, problem = time.perf_counter(), None
        try:
            compiled(images)
            self._synchronize()
            compile_s = time.perf_counter() - start_s
            calls.append(self._timed(compiled, images))
        except Exception as error:  # the compiler raises errors of many classes
            compile_s, problem, compiled = time.perf_counter() - start_s, explain(error), ours
        rates = [self.batch_size / seconds for seconds in self._alternate(calls)]
        difference, dice = _compare(compiled(images), plain(images))
        best, decoded_per_s = max(rates[1:]), self._decode_rate(size)
        return GpuSpeed(
            name,
            size,
            gflop,
            rates[0],
            rates[1],
            compiled_per_s=None if problem else rates[2],
            peak_share=rates[-1] * gflop * 1e9 / self.peak_flop_s,
            compile_s=compile_s,
            graph_breaks=sum(counters["graph_break"].values()),
            largest_difference=difference,
            mask_dice=dice,
            decoded_per_s=decoded_per_s,
            decode_cores=best / decoded_per_s,
            error=problem,
        )

    def _measure_peak(self) -> float:
        """Return the floating-point operations per second of a large matrix product in bfloat16."""
        side = 8192 if self.device.type == "cuda" else 512
        factors = torch.randn(2, side, side, device=self.device).to(torch.bfloat16)  # zeros would be faster
        (seconds,) = self._alternate([self._timed(lambda pair: pair[0] @ pair[1], factors)])
        return 2 * side**3 / seconds

    def _load(self, size: int) -> Tensor:
        """Return a batch of drawn images on the device, (B, S, S, 3) uint8."""
        images = [Square(size).resize_image(decode_image(data, "drawn")) for data in self.files]
        return torch.from_numpy(np.stack([images[index % len(images)] for index in range(self.batch_size)])).to(
            self.device
        )

    def _decode_rate(self, size: int) -> float:
        """Return the files per second that one core decodes and resizes."""
        if size not in self._decoded_per_s:
            (seconds,) = alternate(
                self.repeats, lambda: [Square(size).resize_image(decode_image(data, "drawn")) for data in self.files]
            )
            self._decoded_per_s[size] = len(self.files) / seconds
        return self._decoded_per_s[size]

    def _timed(self, run: Callable[[Tensor], Tensor], argument: Tensor) -> tuple[Callable[[], None], int]:
        """Return a function that repeats `run` for about 0.2 s, and its number of calls."""
        run(argument)
        self._synchronize()
        start_s = time.perf_counter()
        run(argument)
        self._synchronize()
        count = max(1, math.ceil(_ROUND_S / (time.perf_counter() - start_s)))

        def repeat() -> None:
            for _ in range(count):
                run(argument)
            self._synchronize()

        return repeat, count

    def _alternate(self, calls: list[tuple[Callable[[], None], int]]) -> list[float]:
        """Return the median seconds per single call, for each entry of `calls`."""
        medians = alternate(self.repeats, *(repeat for repeat, _ in calls))
        return [seconds / count for seconds, (_, count) in zip(medians, calls, strict=True)]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _forward(
    model: SegmentationModel, text_features: Features, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, S, S, 3) uint8 to logits, in float32 or with autocast to `dtype`."""

    def run(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            pixel_values = model.image_spec.normalize(images)
            if dtype is None:
                pixel_values = pixel_values.contiguous()
            return model.decode(model.encode_images(pixel_values), text_features)

    return run


def _compare(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference of probabilities, and the mean Dice of masks at the median expected probability."""
    actual, wanted = (torch.sigmoid(values.float()) for values in (logits, expected))
    median = wanted.median()
    return float((actual - wanted).abs().max()), float(dice_scores(actual >= median, wanted >= median).mean())


def explain(error: BaseException) -> str:
    """Return the kind and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


HEAD = (
    f"{'':15} {'images/s':>27} {'compiled':>8} {'of':>6} {'compiling':>9} {'graph':>6} {'largest':>10} {'':>6} "
    f"{'decoded/s':>9} {'cores':>6}\n"
    f"{'model':15} {'fp32':>9}{'bf16':>9}{'compiled':>9} {'to fp32':>8} {'peak':>6} {'s':>9} {'breaks':>6} "
    f"{'difference':>10} {'Dice':>6} {'per core':>9} {'':>6}"
)


def row_of(speed: GpuSpeed) -> str:
    """Return the figures of a model as a row below HEAD."""
    compiled = f"{speed.compiled_per_s:9,.1f}" if speed.compiled_per_s else f"{'-':>9}"
    ratio = f"{speed.compiled_per_s / speed.fp32_per_s:7.2f}x" if speed.compiled_per_s else f"{'-':>8}"
    row = (
        f"{speed.name:15} {speed.fp32_per_s:9,.1f}{speed.bf16_per_s:9,.1f}{compiled} {ratio} {speed.peak_share:6.1%} "
        f"{speed.compile_s:9.1f} {speed.graph_breaks:6} {speed.largest_difference:10.4f} {speed.mask_dice:6.4f} "
        f"{speed.decoded_per_s:9.0f} {speed.decode_cores:6.1f}"
    )
    return row if speed.error is None else f"{row}\n{'':15} not compiled: {speed.error}"
