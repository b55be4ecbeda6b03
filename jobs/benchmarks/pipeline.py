"""The segment job's steady state against the bare model loop."""

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
from vlsm.images.decode import decode_image, normalize, resize_image
from vlsm.models.costs import build_architecture
from vlsm.models.prompts import PromptCache
from vlsm.segmentation.segmenter import Segmenter


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        options: of the model, None for the published architecture.
        batch_size: images at once.
        shard_rows: images of a part.
        num_rows: of the manifest; no run gets to its end.
        num_files: that they name in turns, no fewer than a shard has.
        sides_px: of them.
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
    """Of one case from one source.

    Attributes:
        name, source: of the case; "disk" or "S3".
        batch_size: images at once.
        job_per_s, bare_per_s: images a second, medians.
        efficiency: the median ratio of the two, each pair measured one after the other.
        lowest, highest: of these ratios.
        foreign_cores: that others took meanwhile on this machine, at most.
        core_ms: of an image in the job, by kind of process.
        bare_core_ms: of an image in the bare loop.
        core_efficiency: the median ratio of the two, all processes of the job together. Where cores are shared with
            others it tells more than the ratio of rates.
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
    """Those of `python -m jobs.benchmark pipeline`."""
    parser.add_argument("--model", action="append", choices=CASES, help="all of them by default")
    parser.add_argument("--source", action="append", choices=("disk", "S3"), help="where images are; both by default")
    parser.add_argument(
        "--repeats", type=int, default=5, choices=range(1, 1000), metavar="N", help="in turns; the median counts (5)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of one measurement at least (5)")


def measure(args: Namespace) -> int:
    """Images a second of the segment job against the bare model loop: the same model, batch size and threads.

    The job runs as a user starts it, over a manifest that it does not get to the end of. Its start is left
    out: it is looked at from its third part on, and held still while the bare loop runs on tensors that are in memory,
    in turns. Both use the GPU where there is one. The S3 server runs on the same cores. Weights are random.
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
                told = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row.core_ms.items())
                told += (
                    f"; bare {row.bare_core_ms:.2f}: {row.core_efficiency:.3f}; others {row.foreign_cores:.2f} cores"
                )
                print(
                    f"{name:10} {source:5} {row.job_per_s:9.2f} {row.bare_per_s:9.2f} {row.efficiency:6.3f} "
                    f"({row.lowest:.3f} to {row.highest:.3f})  {told}",
                    flush=True,
                )
                write_json(args.json, "pipeline", figures | {"runs": rows})
    return 0


def tell(figures: dict[str, Any]) -> list[str]:
    """The README's lines of what was measured."""
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
    """A GPU is fed in larger pieces; the null model is as on CPUs."""
    if name == "pixel" or not torch.cuda.is_available():
        return CASES[name]
    return replace(CASES[name], batch_size=32, shard_rows=128, num_rows=500_000, num_files=512)


def _measure(case: Case, name: str, source: str, folder: Path, files: list[Path], args: Namespace) -> Efficiency:
    bare = _BareLoop(folder / "checkpoint", files, case.batch_size)
    with _archive(source, folder, files) as uris:
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
    efficiencies = [one / other for one, other in zip(job_rates, bare_rates, strict=True)]
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
        statistics.median(own_s / sum(spent.values()) for own_s, spent in zip(bare_s, spent_s, strict=True)),
    )


@contextlib.contextmanager
def _archive(source: str, folder: Path, files: list[Path]) -> Iterator[list[str]]:
    """The files' URIs, and the store that has them."""
    if source == "disk":
        yield [str(file) for file in files]
        return
    import s3fs

    server = S3Server(folder / "store")
    server.start()
    try:
        os.environ.update(server.environment())  # which the job inherits
        s3fs.S3FileSystem().put(f"{files[0].parent}/", f"{BUCKET}/files/", recursive=True)
        yield [f"s3://{BUCKET}/files/{file.name}" for file in files]
    finally:
        server.kill()


class _BareLoop:
    """The model as the job's actors run it, on tensors in memory: nothing read, decoded or written."""

    def __init__(self, checkpoint: Path, files: list[Path], batch_size: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self._segmenter = Segmenter(load_checkpoint(checkpoint), batch_size=batch_size)
        self.device = self._segmenter.device
        spec = self._segmenter.model.image_spec
        images = [resize_image(decode_image(file.read_bytes(), file.name), spec.size) for file in files[:batch_size]]
        self._pixel_values = normalize(torch.from_numpy(np.stack(images)).to(self.device), spec)
        self._text_features = PromptCache(self._segmenter.model).encode(["a small polyp"] * batch_size)
        self.measure(0)  # else the first time chooses kernels as well

    @torch.inference_mode()
    def measure(self, seconds: float) -> tuple[float, float]:
        """Images per second, and core seconds an image."""
        model, num_images, start_s, before_s = self._segmenter.model, 0, time.monotonic(), time.process_time()
        while (passed_s := time.monotonic() - start_s) < seconds or not num_images:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = model.decode(model.encode_images(self._pixel_values), self._text_features)
            if self.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            num_images += len(self._pixel_values)
        return num_images / passed_s, (time.process_time() - before_s) / num_images
