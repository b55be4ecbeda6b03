"""The steady state of the segment job, against the bare model loop."""

import contextlib
import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlsm
from jobs.benchmarks.archives import SIDES_PX, SMALL_PX, write_files, write_manifest
from jobs.benchmarks.figures import quietest, write_json
from jobs.benchmarks.paused_process import hold_job
from jobs.benchmarks.stores import BUCKET, S3Server
from vlsm.checkpoints import load_checkpoint
from vlsm.images.decode import decode_image
from vlsm.models.costs import build_architecture
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.segmenter import Segmenter


@dataclass(frozen=True)
class Case:
    """Model and archive of one measurement.

    Attributes:
        options: options of the model; None for the published architecture.
        batch_size: images per batch.
        shard_rows: images per part file.
        num_rows: rows of the manifest; no run reaches the last one.
        num_files: number of different files that the rows name in order; at least shard_rows.
        sides_px: range of the height and width of the files.
    """

    options: dict[str, Any] | None
    batch_size: int
    shard_rows: int
    num_rows: int
    num_files: int
    sides_px: tuple[int, int]


CASES = {
    "pixel": Case({"image_size": 32}, 64, 256, 500_000, 1024, SMALL_PX),
    "unet_d": Case({"image_size": 224}, 8, 16, 10_000, 64, SIDES_PX),
    "clipseg": Case(None, 4, 8, 10_000, 64, SIDES_PX),
    "vlsm_b": Case(None, 4, 8, 10_000, 64, SIDES_PX),
}
_READ_AHEAD_BYTES = {"cpu": 100 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Efficiency:
    """Measured efficiency of one case from one source.

    Attributes:
        name: name of the case.
        source: "disk" or "S3".
        batch_size: images per batch.
        job_per_s, bare_per_s: median images per second of the job and of the bare loop.
        efficiency: median ratio job_per_s / bare_per_s; each pair is measured directly one after the other.
        lowest, highest: lowest and highest of these ratios.
        foreign_cores: largest CPU load of other programs on this machine during the measurement, in cores.
        core_ms: CPU milliseconds per image in the job, by kind of process.
        bare_core_ms: CPU milliseconds per image in the bare loop.
        core_efficiency: median ratio of bare_core_ms to the sum of core_ms. It is more meaningful than `efficiency` if
            other programs use the same cores.
    """

    name: str
    source: str
    batch_size: int
    job_per_s: float
    bare_per_s: float
    efficiency: float
    lowest: float
    highest: float
    foreign_cores: float
    core_ms: dict[str, float]
    bare_core_ms: float
    core_efficiency: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `python -m jobs.benchmark pipeline`."""
    parser.add_argument("--model", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument(
        "--source", action="append", choices=("disk", "S3"), help="location of the images (default: both)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="rounds; the median counts (5)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="minimum duration of one measurement (5)")


def measure(args: Namespace) -> int:
    """Measure images per second of the segment job and of the bare model loop: same model, batch size and threads.

    The job runs as a user starts it, over a manifest so long that it never finishes. Its start does not count: the
    measurement begins after its third part. The job and the bare loop run interleaved; the job is paused while the bare
    loop runs on tensors in memory. Both use the GPU if there is one. The S3 server runs on the same cores. Weights are
    random.
    """
    figures: dict[str, Any] = {"repeats": args.repeats, "seconds": args.seconds}
    if torch.cuda.is_available():
        figures["device"] = f"{torch.cuda.get_device_name()} beside {os.cpu_count()} cores"
    print(f"{'model':10} {'from':5} {'job/s':>9} {'bare/s':>9} {'efficiency':>11}  core ms an image")
    rows = []
    for name in args.model or CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _save_model(name, folder / "checkpoint")
            case = _case(name)
            files = write_files(folder / "files", case.num_files, case.sides_px)
            for source in args.source or ("disk", "S3"):
                row = _measure(case, name, source, folder, files, args)
                rows.append(asdict(row))
                core_times = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row.core_ms.items())
                core_times += (
                    f"; bare {row.bare_core_ms:.2f}: {row.core_efficiency:.3f}; others {row.foreign_cores:.2f} cores"
                )
                print(
                    f"{name:10} {source:5} {row.job_per_s:9.2f} {row.bare_per_s:9.2f} {row.efficiency:6.3f} "
                    f"({row.lowest:.3f} to {row.highest:.3f})  {core_times}",
                    flush=True,
                )
                write_json(args.json, "pipeline", figures | {"runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """Return the measured figures as lines of Markdown for the documentation."""
    lines = [
        f"The segment job's steady state against the bare model loop, the {figures['repeats']} quietest times of all, "
        "in turns, and the milliseconds of a core that an image costs in each process. The model's threads wait for "
        "each other: what another process takes of one core, the S3 server among them, is lost on all of them.",
        "",
        "| model | images from | job, images/s | bare loop | efficiency | from, to | core ms: bare loop | model | read "
        "and write | driver | Ray | others' cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        ms = row["core_ms"]
        lines.append(
            f"| `{row['name']}` | {row['source']} | {row['job_per_s']:,.2f} | {row['bare_per_s']:,.2f} | "
            f"{row['efficiency']:.3f} | {row['lowest']:.3f} to {row['highest']:.3f} | {row['bare_core_ms']:,.2f} | "
            f"{ms['model']:,.2f} | {ms['tasks']:,.2f} | {ms['driver']:,.2f} | {ms['ray']:,.2f} | "
            f"{row['foreign_cores']:.2f} |"
        )
    return lines


def _save_model(name: str, directory: Path) -> None:
    torch.manual_seed(0)
    options = CASES[name].options
    with tempfile.TemporaryDirectory() as folder:
        model = build_architecture(name, Path(folder), "cpu") if options is None else vlsm.build_model(name, **options)
        vlsm.save_checkpoint(model.eval(), directory, prompt="a small polyp")


def _case(name: str) -> Case:
    """Return the case of a model; on a GPU all models but `pixel` get larger batches, shards and archives."""
    if name == "pixel" or not torch.cuda.is_available():
        return CASES[name]
    return replace(CASES[name], batch_size=32, shard_rows=128, num_rows=500_000, num_files=512)


def _measure(case: Case, name: str, source: str, folder: Path, files: list[Path], args: Namespace) -> Efficiency:
    bare = _BareLoop(folder / "checkpoint", files, case.batch_size)
    with archive_at(source, folder, files) as uris:
        manifest, output = folder / f"{source}.parquet", folder / f"out_{source}"
        write_manifest(manifest, uris, case.num_rows)
        words = [str(manifest), "--set", f"run.batch_size={case.batch_size}"]
        job = hold_job(words, folder / "checkpoint", output, case.shard_rows, _READ_AHEAD_BYTES[bare.device.type])
        with job:
            rounds, foreign_cores = quietest(
                args.repeats, lambda: (bare.measure(args.seconds), job.measure(args.seconds))
            )
    bares, jobs = zip(*rounds, strict=True)
    (bare_rates, bare_s), (job_rates, spent_s) = zip(*bares, strict=True), zip(*jobs, strict=True)
    efficiencies = [job_rate / bare_rate for job_rate, bare_rate in zip(job_rates, bare_rates, strict=True)]
    return Efficiency(
        name,
        source,
        case.batch_size,
        statistics.median(job_rates),
        statistics.median(bare_rates),
        statistics.median(efficiencies),
        min(efficiencies),
        max(efficiencies),
        foreign_cores,
        {kind: 1000 * statistics.median(spent[kind] for spent in spent_s) for kind in spent_s[0]},
        1000 * statistics.median(bare_s),
        statistics.median(one_bare_s / sum(spent.values()) for one_bare_s, spent in zip(bare_s, spent_s, strict=True)),
    )


@contextlib.contextmanager
def archive_at(source: str, folder: Path, files: list[Path]) -> Iterator[list[str]]:
    """Yield the URIs of the files: local paths, or copies on an S3 server that runs meanwhile."""
    if source == "disk":
        yield [str(file) for file in files]
        return
    import s3fs

    server = S3Server(folder / "store")
    server.start()
    try:
        os.environ.update(server.environment())  # the job inherits it
        s3fs.S3FileSystem().put(f"{files[0].parent}/", f"{BUCKET}/files/", recursive=True)
        yield [f"s3://{BUCKET}/files/{file.name}" for file in files]
    finally:
        server.kill()


class _BareLoop:
    """The model as the actors of the job run it, on tensors in memory: no reading, decoding or writing."""

    def __init__(self, checkpoint: Path, files: list[Path], batch_size: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self._segmenter = Segmenter(load_checkpoint(checkpoint), batch_size=batch_size)
        self.device = self._segmenter.device
        spec = self._segmenter.model.image_spec
        images = [spec.square.resize_image(decode_image(file.read_bytes(), file.name)) for file in files[:batch_size]]
        self._pixel_values = spec.normalize(torch.from_numpy(np.stack(images)).to(self.device))
        self._text_features = PromptCache(self._segmenter.model).encode(["a small polyp"] * batch_size)
        self.measure(0)  # warm-up: the first calls also choose kernels

    @torch.inference_mode()
    def measure(self, seconds: float) -> tuple[float, float]:
        """Return images per second, and CPU seconds per image, measured for at least `seconds`."""
        model, num_images, start_s, before_s = self._segmenter.model, 0, time.monotonic(), time.process_time()
        while (passed_s := time.monotonic() - start_s) < seconds or not num_images:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = model.decode(model.encode_images(self._pixel_values), self._text_features)
            if self.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            num_images += len(self._pixel_values)
        return num_images / passed_s, (time.process_time() - before_s) / num_images
