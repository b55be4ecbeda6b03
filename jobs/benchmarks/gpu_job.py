"""The segment job's own work around one model on one device, as shares of the bare compiled model."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import vlsm
from jobs import metrics
from jobs.benchmarks.archives import write_files, write_manifest
from jobs.benchmarks.gpu_models import Scale, explain
from jobs.segment_tasks import Task, fetch_shard, write_masks
from vlsm.checkpoints import build_checkpoint
from vlsm.config import MemberSettings, RunSettings, SegmentSettings
from vlsm.images.decode import decode_image
from vlsm.models.costs import build_architecture
from vlsm.models.folding import fold_batch_norms
from vlsm.models.prompts import PromptCache
from vlsm.runs.lifecycle import Run, make_planner, prepare_run
from vlsm.segmentation.predictor import Predictor
from vlsm.segmentation.segmenter import Segmenter
from vlsm.segmentation.shard import ShardBatch, Unguarded

_WORDS = [f"a {size} {shape} polyp" for size in ("small", "large") for shape in ("flat", "round", "bright", "left", "")]
_FOREGROUND = 0.15  # share of the pixels in masks: the mean of Kvasir-SEG


@dataclass
class JobSpeed:
    """Speed of the job around one model with some prompts.

    Attributes:
        name: key of MODELS.
        num_prompts: prompts of each image. One image has one mask for each.
        image_size: side of the model's input in pixels.
        bare_per_s: images per second of the bare model, compiled, on a batch that lies on the device.
        segmenter_per_s: of `Segmenter.predict_logits`, from pixels in the memory of the host.
        actor_per_s: of the model actor's work on shards in memory: from pixels to all that leaves the actor.
        pipeline_per_s: of the whole job with Ray; None if it is not measured.
        core_ms: CPU milliseconds per image by stage, without Ray: "fetch" (read from the disk, decode, resize),
            "actor", "write" (masks to a part file).
        pipeline_core_ms: CPU milliseconds per image of the whole job, by kind of process.
        errors: why a step was not measured, or runs otherwise than planned.
    """

    name: str
    num_prompts: int
    image_size: int
    bare_per_s: float
    segmenter_per_s: float
    actor_per_s: float
    pipeline_per_s: float | None
    core_ms: dict[str, float]
    pipeline_core_ms: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, with the CPU cores that keep the device busy; those of Ray count if they are measured."""
        of_ray = (self.pipeline_core_ms.get(kind, 0.0) for kind in ("driver", "ray"))
        cores = self.actor_per_s * (sum(self.core_ms.values()) + sum(of_ray)) / 1000
        return asdict(self) | {"device_cores": cores}


@dataclass(frozen=True)
class Archive:
    """Drawn images in a folder, as many as one shard has rows, and the checkpoints of models beside them."""

    folder: Path
    files: list[Path]

    @classmethod
    def draw(cls, folder: Path, scale: Scale) -> "Archive":
        """Return a new archive below a folder. Its files differ; it has 32 different pictures."""
        return cls(folder, write_files(folder / "files", scale.shard_rows, scale.sides_px, num_drawings=32))

    def save(self, name: str) -> Path:
        """Return the checkpoint of a model at its published size, with random weights."""
        checkpoint = self.folder / "checkpoints" / name
        if not checkpoint.exists():
            torch.manual_seed(0)
            vlsm.save_checkpoint(build_architecture(name, self.folder / "sources", "cpu"), checkpoint)
        return checkpoint


def measure_job(name: str, num_prompts: int, archive: Archive, scale: Scale, device: torch.device) -> JobSpeed:
    """Return the speed of the job around one model, without Ray."""
    torch.compiler.reset()
    run = _plan(archive, name, num_prompts, scale)
    model_files, prompts = run.members[0].files, list(run.settings.prompts or ())
    segmenter = Segmenter(
        build_checkpoint(model_files, name), str(device), scale.batch_size, compile=device.type == "cuda"
    )
    task = _Alone(run.settings, run.run_id, run.plan.id, (run.members[0].square,), False, None)
    with _without_metrics():
        first_shard = {"shard": np.array([0]), "exists": np.array([False])}
        fetched, fetch_s = _timed(lambda: fetch_shard(first_shard, task), scale)
        batch = ShardBatch.unpack(fetched)
        (pixels,) = batch.pixels.values()
        num_images = len(batch.entries)
        predictor = Predictor(run.settings, {0: model_files}, str(device))
        predictor.warm_up()

        def act() -> pa.Table:  # as `SegmentActor.__call__`
            shard = ShardBatch.unpack(fetched)
            texts = [run.settings.texts_of(prompts) for prompts in fetched["prompts"][0].as_py()]
            predicted = predictor.predict(shard, texts, Unguarded())
            predicted.pixels = {}
            return predicted.pack()

        bare, problem = _bare(build_checkpoint(model_files, name).model, pixels, prompts, scale, device)
        (bare_s, _), (segmenter_s, _), (actor_s, actor_core_s) = _alternate(
            [bare, lambda: segmenter.predict_logits(pixels, [prompts] * num_images), act], scale, device
        )
        predicted = act()
        _, write_s = _timed(lambda: write_masks(predicted, task), scale)
    core_ms = {"fetch": fetch_s, "actor": actor_core_s, "write": write_s}
    return JobSpeed(
        name,
        num_prompts,
        run.members[0].square.size,
        scale.batch_size / bare_s,
        num_images / segmenter_s,
        num_images / actor_s,
        None,
        {stage: 1000 * seconds / num_images for stage, seconds in core_ms.items()},
        errors={"compile": problem} if problem else {},
    )


def add_pipeline(speed: JobSpeed, archive: Archive, scale: Scale, seconds: float) -> None:
    """Measure the whole job with Ray, as a user starts it, and add its figures to those of the model."""
    from jobs.benchmarks.paused_process import hold_job

    num_images = max(1, scale.shard_rows // speed.num_prompts)
    case = archive.folder / f"{speed.name}_{speed.num_prompts}"
    settings = _settings(archive, speed.name, speed.num_prompts, scale)
    manifest = archive.folder / "manifest.parquet"
    if not manifest.exists():
        write_manifest(manifest, [str(file) for file in archive.files], 500_000)
    words = [str(manifest)]
    for assignment in (
        f"prompts={json.dumps(list(settings.prompts or ()))}",
        f"threshold={settings.threshold}",
        "allow_equal_masks=true",
        f"run.batch_size={scale.batch_size}",
    ):
        words += ["--set", assignment]
    read_ahead_bytes = 4 << 30 if torch.cuda.is_available() else 200 << 20
    output = case / "pipeline"
    with hold_job(words, archive.save(speed.name), output, num_images, read_ahead_bytes, speed.num_prompts) as job:
        speed.pipeline_per_s, core_s = job.measure(seconds)
    speed.pipeline_core_ms = {kind: 1000 * kind_s for kind, kind_s in core_s.items()}


class _Alone(Task):
    """The data of a run for stages that run in this process, without Ray: nothing watches their images."""

    def watch(self, stage: str, shard: int) -> Any:
        return contextlib.nullcontext(Unguarded())


@contextlib.contextmanager
def _without_metrics() -> Iterator[None]:
    """Count nothing for Prometheus meanwhile: this needs Ray."""
    with mock.patch.object(metrics, "_metric", mock.Mock()):
        yield


def _settings(archive: Archive, name: str, num_prompts: int, scale: Scale) -> SegmentSettings:
    """Return the settings of a run whose threshold gives masks of the usual area: weights are random."""
    checkpoint, prompts = archive.save(name), _WORDS[:num_prompts]
    path = archive.folder / f"{name}_threshold.txt"
    if not path.exists():
        segmenter = Segmenter(vlsm.load_checkpoint(checkpoint), "cpu", batch_size=2)
        square = segmenter.model.image_spec.square
        images = [decode_image(file.read_bytes(), file.name) for file in archive.files[:2]]
        logits = segmenter.predict_logits(np.stack([square.resize_image(image) for image in images]), [prompts[:1]] * 2)
        cut = np.quantile(np.concatenate(logits).astype(np.float64), 1 - _FOREGROUND)
        path.write_text(repr(float(np.clip(1 / (1 + np.exp(-cut)), 1e-6, 1 - 1e-6))))
    return SegmentSettings(
        input=str(archive.files[0].parent),
        output=str(archive.folder / f"{name}_{num_prompts}" / "run"),
        members=(MemberSettings(checkpoint=str(checkpoint)),),
        prompts=prompts,
        threshold=float(path.read_text()),
        allow_equal_masks=True,
        shard_rows=max(1, scale.shard_rows // num_prompts) * num_prompts,
        run=RunSettings(batch_size=scale.batch_size),
    )


def _plan(archive: Archive, name: str, num_prompts: int, scale: Scale) -> Run:
    run = prepare_run(_settings(archive, name, num_prompts, scale))
    if not run.plan.is_complete:
        with make_planner(run) as planner:
            planner.result()
    return run


def _bare(
    model: Any, pixels: np.ndarray, prompts: list[str], scale: Scale, device: torch.device
) -> tuple[Callable[[], object], str | None]:
    """Return the bare model on one batch that lies on the device, compiled, and why it could not be compiled."""
    fold_batch_norms(model)
    model = model.to(device).to(memory_format=torch.channels_last)
    rows = np.resize(np.arange(len(pixels)), scale.batch_size)
    images = torch.from_numpy(pixels[rows]).to(device)
    texts = [PromptCache(model).encode([prompt] * scale.batch_size) for prompt in prompts]
    normalize = model.image_spec.normalize

    def make(encode: Any, decode: Any) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                features = encode(images)
                for text in texts:
                    logits = decode(features, text)
            return logits

        return run

    plain = make(lambda batch: model.encode_images(normalize(batch)), model.decode)
    encode, decode = (
        torch.compile(part, dynamic=False, backend=scale.backend)
        for part in (lambda batch: model.encode_images(normalize(batch)), model.decode)
    )
    try:
        (compiled := make(encode, decode))()
    except Exception as error:  # the compiler raises errors of many classes
        return plain, explain(error)
    return compiled, None


def _alternate(calls: list[Callable[[], object]], scale: Scale, device: torch.device) -> list[tuple[float, float]]:
    """Return for each function the median seconds of one call, by the clock and of CPU. The functions take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        call()  # warm-up
    for _ in range(scale.repeats):
        for call, call_times in zip(calls, times, strict=True):
            _synchronize(device)
            count, start_s, core_s = 0, time.perf_counter(), time.process_time()
            while not count or time.perf_counter() - start_s < scale.round_s:
                call()
                count += 1
                if count % 8 == 0:
                    _synchronize(device)  # otherwise calls of the bare model pile up
            _synchronize(device)
            call_times.append(((time.perf_counter() - start_s) / count, (time.process_time() - core_s) / count))
    return [
        (statistics.median(wall), statistics.median(core)) for wall, core in (zip(*each, strict=True) for each in times)
    ]


def _timed(call: Callable[[], Any], scale: Scale) -> tuple[Any, float]:
    """Return the result of a function, and the median CPU seconds of one call."""
    result, seconds = call(), []
    for _ in range(scale.repeats):
        start_s = time.process_time()
        result = call()
        seconds.append(time.process_time() - start_s)
    return result, statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
